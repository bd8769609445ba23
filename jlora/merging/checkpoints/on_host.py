# SPDX-License-Identifier: Apache-2.0
"""Tells which tensors of a merge NumPy merges, because compiling costs more.

XLA is faster with every entry, but takes up to seconds for every program. Which
of the two a tensor gets depends on sizes alone, not on who is first: a run that
was interrupted goes on with the same bytes.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from jlora.merging.arrays.averages import (
  linear,
  model_stock,
  nearswap,
  passthrough,
)
from jlora.merging.arrays.fusion import arcee_fusion
from jlora.merging.arrays.overlaps import ram
from jlora.merging.arrays.pruning import breadcrumbs, dare, della
from jlora.merging.arrays.singular_vectors import iso_c, tsv
from jlora.merging.arrays.sparsifiers import inverse_keep, match_l1, unscaled
from jlora.merging.arrays.spherical import karcher, multislerp, nuslerp, slerp
from jlora.merging.arrays.task_vectors import (
  by_count,
  by_mass,
  by_mass_or_plus,
  sce,
  task_arithmetic,
  ties,
)
from jlora.merging.checkpoints.piecewise import unbind

#: Entries that a program has to merge, in all its tensors together, to be worth
#: its compilation.
LIMIT = 2**23
#: The largest tensor that NumPy merges as a whole: its copies take more memory.
LARGEST = 2**22
#: Methods that work on NumPy's arrays, and the functions bound to them that do.
METHODS = frozenset([
  linear, model_stock, nearswap, passthrough, arcee_fusion, ram, breadcrumbs,
  dare, della, iso_c, tsv, karcher, multislerp, nuslerp, slerp, sce,
  task_arithmetic, ties,
])  # fmt: skip
_OPTIONS = frozenset(
  [by_count, by_mass, by_mass_or_plus, inverse_keep, match_l1, unscaled]
)


def works_on_host(method: Callable[..., Any]) -> bool:
  """Returns whether a method merges NumPy's arrays without JAX.

  Args:
    method: a function, or options bound to one by `functools.partial`.

  Returns:
    bool; False for what others wrote, which may call JAX.

  Example:
    >>> works_on_host(linear), works_on_host(lambda stack, *_, **__: stack[0])
    (True, False)
  """
  plain, options = unbind(method)
  bound = [value for value in options.values() if callable(value)]
  return plain in METHODS and all(value in _OPTIONS for value in bound)


def small_programs(
  merges: Iterable[tuple[Hashable, int]],
) -> frozenset[Hashable]:
  """Returns the programs that are not worth their compilation.

  Args:
    merges: the program of each tensor, and how many entries the tensor has.

  Returns:
    Programs.

  Example:
    >>> small_programs([("a", 2**22), ("a", 2**22), ("b", 5)])
    frozenset({'b'})
  """
  entries: Counter[Hashable] = Counter()
  for program, size in merges:
    entries[program] += size
  return frozenset(one for one, size in entries.items() if size < LIMIT)
