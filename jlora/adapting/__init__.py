# SPDX-License-Identifier: Apache-2.0
"""Loras beside the weights of any JAX function, never summed into them.

    y = x @ w + ((x @ aᵀ) * gate) @ b

`bind` puts programs on parameters, `adapt` makes a function compute with them,
`apply` adds them to the weights once and for all.
"""

from jlora.adapting.adapted import Adapted as Adapted
from jlora.adapting.banks import make_bank as make_bank
from jlora.adapting.binding import bind as bind
from jlora.adapting.program_views import views_from as views_from
from jlora.adapting.programs import Branch as Branch
from jlora.adapting.programs import Gated as Gated
from jlora.adapting.programs import Rows as Rows
from jlora.adapting.programs import Shift as Shift
from jlora.adapting.programs import prepend as prepend
from jlora.adapting.rows import adapt_rows as adapt_rows
from jlora.adapting.serving import Lease as Lease
from jlora.adapting.serving import Room as Room
from jlora.adapting.serving import Shelf as Shelf
from jlora.adapting.serving import fetch_rows as fetch_rows
from jlora.adapting.transforms import adapt as adapt
from jlora.adapting.transforms import apply as apply
from jlora.adapting.transforms import lora_dot as lora_dot

__all__ = [
  "Adapted",
  "Branch",
  "Gated",
  "Lease",
  "Room",
  "Rows",
  "Shelf",
  "Shift",
  "adapt",
  "adapt_rows",
  "apply",
  "bind",
  "fetch_rows",
  "lora_dot",
  "make_bank",
  "prepend",
  "views_from",
]
