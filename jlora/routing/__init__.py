# SPDX-License-Identifier: Apache-2.0
"""Which adapter for which token: mixtures, and programs that act by the input.

`Gated` of `jlora.adapting` weighs a bank of Loras by what a layer reads; here
is what computes the weights. `arrow` needs no training, `remix` trains
selections, a basis of LoRWeB is mixed by an example's query, `routes` goes by
modalities.
"""

from jlora.routing.choices import by_sequence as by_sequence
from jlora.routing.choices import by_token as by_token
from jlora.routing.choices import given as given
from jlora.routing.lorweb import Basis as Basis
from jlora.routing.lorweb import adapt_basis as adapt_basis
from jlora.routing.lorweb import as_basis as as_basis
from jlora.routing.lorweb import as_programs as as_programs
from jlora.routing.lorweb import coefficients as coefficients
from jlora.routing.lorweb import fold as fold
from jlora.routing.lorweb import init_basis as init_basis
from jlora.routing.lorweb import kaiming_of_stack as kaiming_of_stack
from jlora.routing.lorweb import mixed as mixed
from jlora.routing.mixture_folders import save_mixture as save_mixture
from jlora.routing.mixtures import mix_experts as mix_experts
from jlora.routing.mixtures import random_rows as random_rows
from jlora.routing.mixtures import router_rows as router_rows
from jlora.routing.modalities import Routes as Routes
from jlora.routing.modalities import check_cache as check_cache
from jlora.routing.modalities import routes as routes
from jlora.routing.modalities import used_only as used_only
from jlora.routing.policy_gradients import remix as remix
from jlora.routing.policy_gradients import with_mask as with_mask
from jlora.routing.prototype_gates import arrow as arrow
from jlora.routing.prototype_gates import prototypes as prototypes
from jlora.routing.selections import Selection as Selection
from jlora.routing.selections import draw as draw
from jlora.routing.selections import effective as effective
from jlora.routing.selections import gate as gate
from jlora.routing.selections import log_prob as log_prob
from jlora.routing.selections import routed as routed

__all__ = [
  "Basis",
  "Routes",
  "Selection",
  "adapt_basis",
  "arrow",
  "as_basis",
  "as_programs",
  "by_sequence",
  "by_token",
  "check_cache",
  "coefficients",
  "draw",
  "effective",
  "fold",
  "gate",
  "given",
  "init_basis",
  "kaiming_of_stack",
  "log_prob",
  "mix_experts",
  "mixed",
  "prototypes",
  "random_rows",
  "remix",
  "routed",
  "router_rows",
  "routes",
  "save_mixture",
  "used_only",
  "with_mask",
]
