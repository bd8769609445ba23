# SPDX-License-Identifier: Apache-2.0
"""Which adapter for which token: finetunes as experts of a mixture."""

from jlora.routing.mixture_folders import save_mixture as save_mixture
from jlora.routing.mixtures import mix_experts as mix_experts
from jlora.routing.mixtures import random_rows as random_rows
from jlora.routing.mixtures import router_rows as router_rows

__all__ = [
  "mix_experts",
  "random_rows",
  "router_rows",
  "save_mixture",
]
