# SPDX-License-Identifier: Apache-2.0
"""Hidden units of networks put in one order (Git Re-Basin).

A `Symmetry` says, as data, which permutations leave a network's function alone;
matching finds those that bring one network's units to another's.
"""

from jlora.alignment.matching import Alignment as Alignment
from jlora.alignment.matching import match_activations as match_activations
from jlora.alignment.matching import match_weights as match_weights
from jlora.alignment.matching import merge_many as merge_many
from jlora.alignment.permutations import Permutations as Permutations
from jlora.alignment.permutations import permute as permute
from jlora.alignment.permutations import permute_loras as permute_loras
from jlora.alignment.symmetries import Symmetry as Symmetry
from jlora.alignment.symmetries import chain as chain
from jlora.alignment.symmetries import decoder as decoder
from jlora.alignment.symmetries import gpt2 as gpt2

__all__ = [
  "Alignment",
  "Permutations",
  "Symmetry",
  "chain",
  "decoder",
  "gpt2",
  "match_activations",
  "match_weights",
  "merge_many",
  "permute",
  "permute_loras",
]
