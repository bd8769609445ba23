# SPDX-License-Identifier: Apache-2.0
"""Which adapter for which token: mixtures, and programs that act by the input.

`Gated` of `jlora.adapting` weighs a bank of Loras by what a layer reads; here
is what computes the weights. `arrow` needs no training, `remix` trains
selections, a basis of LoRWeB is mixed by an example's query, `routes` goes by
modalities.
"""

from jlora.routing.choices import by_sequence as by_sequence
from jlora.routing.choices import by_token as by_token
from jlora.routing.mixture_folders import save_mixture as save_mixture
from jlora.routing.mixtures import mix_experts as mix_experts
from jlora.routing.mixtures import random_rows as random_rows
from jlora.routing.mixtures import router_rows as router_rows
from jlora.routing.prototype_gates import arrow as arrow
from jlora.routing.prototype_gates import prototypes as prototypes

__all__ = [
  "arrow",
  "by_sequence",
  "by_token",
  "mix_experts",
  "prototypes",
  "random_rows",
  "router_rows",
  "save_mixture",
]
