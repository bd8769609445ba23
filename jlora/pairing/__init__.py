# SPDX-License-Identifier: Apache-2.0
"""Finding which tensors of two checkpoints belong together.

Names may differ by a prefix, a head may be tied on one side, experts fused, a
vocabulary grown. `pair_up` matches what it can and notes how.
"""

from jlora.pairing.layer_numbers import configure_layers as configure_layers
from jlora.pairing.match import common_rows as common_rows
from jlora.pairing.match import keep_whole as keep_whole
from jlora.pairing.match import pair_up as pair_up
from jlora.pairing.match import same_rows as same_rows

__all__ = [
  "common_rows",
  "configure_layers",
  "keep_whole",
  "pair_up",
  "same_rows",
]
