# SPDX-License-Identifier: Apache-2.0
"""Views of a model's parameters, read from what the model computes."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jlora.adapting.uses import Use, Uses, read_uses
from jlora.messages import name_some
from jlora.paths import flatten
from jlora.views import MatrixView, ViewRule


def views_from(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> tuple[ViewRule, ...]:
  """Reads from a function which axes of each parameter it sums over.

  Traces `fn(params, *args, **kwargs)` on shapes; nothing is computed. An axis
  that a product contracts is an input, one that it keeps an output, one that
  repeats it (scanned layers, experts, vmap) a batch axis; rows of a table are
  inputs, and what a row holds are outputs (tables of which all rows are taken
  by the same numbers are one table of wide rows). Followed through transposes,
  reshapes, slices, casts, sums of parameters, jit, remat, scan, loops,
  branches, vmap, shard_map and custom derivatives.

  Args:
    fn: the model; may be jitted.
    params: a pytree of arrays or of `jax.ShapeDtypeStruct`; what else is in it
      (numbers, strings, functions) is no parameter, and passed on as it is.
    *args: pytrees of arrays, or of anything with `.shape` and `.dtype`; what
      else is in them is passed on as it is, as by `adapt`.
    **kwargs: the same, by name.

  Returns:
    Rules for the `views=` of `extract`, `init_lora`, `apply`, `bind`: one for
    each parameter of two axes or more; those that are no matrix in this program
    (biases of scanned layers) have none. Warns, by name, of
    parameters that are used as different matrices (the first use counts; a
    transposed one is the same matrix), that the program does not use, and whose
    use cannot be read.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"q": jnp.ones((3, 2, 4)), "norm": jnp.ones(3)}
    >>> fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x * p["norm"][None], p["q"])
    >>> for path, axes, view in views_from(fn, params, jnp.ones((5, 3))):
    ...   print(path, axes, view)
    q 3 MatrixView(batch=(), inputs=(0,), outputs=(1, 2))
  """
  uses, shapes = uses_of(fn, params, *args, **kwargs)
  found = {path: _first_matrix(uses[path]) for path in uses}
  _warn(uses, shapes, found)
  rules = []
  for path, shape in shapes.items():
    if len(shape) > 1:
      use = found[path] or Use("", tuple(range(len(shape))))
      view = MatrixView(use.batch, use.inputs, use.outputs)
      rules.append((re.escape(path), len(shape), view))
  return tuple(rules)


def uses_of(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> tuple[Uses, dict[str, tuple[int, ...]]]:
  """Lists what a function does with each of its parameters.

  Args:
    fn: the function.
    params: its parameters, of which only shapes and dtypes are looked at.
    *args: its further arguments, likewise; what has none is passed on.
    **kwargs: those by name.

  Returns:
    {path: uses} and {path: shape}.

  Example:
    >>> import jax.numpy as jnp
    >>> uses, _ = uses_of(lambda p, i: p["e"][i], {"e": jnp.ones((9, 4))},
    ...                   jnp.arange(3))
    >>> uses["e"][0].inputs, uses["e"][0].outputs
    ((0,), (1,))
  """
  flat = {p: x for p, x in flatten(params).items() if _is_traced(x)}
  leaves, tree = jax.tree.flatten((params, args, kwargs))
  at = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]
  given = [leaves[i] for i in at]
  given[: len(flat)] = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat.values()
  ]

  def run(arrays):
    """Calls fn with its arrays replaced."""
    whole = list(leaves)
    for i, array in zip(at, arrays, strict=True):
      whole[i] = array
    own, args, kwargs = jax.tree.unflatten(tree, whole)
    return fn(own, *args, **kwargs)

  closed = jax.make_jaxpr(run)(given)
  shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
  return read_uses(closed, list(flat), shapes), shapes


def _is_traced(leaf: Any) -> bool:
  """Returns whether a leaf is an array, or stands for one."""
  # Scalars of NumPy are numbers, as for `adapt`; its types have a `shape` too.
  is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
  return is_array and not isinstance(leaf, type | np.generic)


def _first_matrix(uses: list[Use]) -> Use | None:
  """Returns the first use as a matrix, if possible without split axes."""
  matrices = [use for use in uses if use.is_matrix]
  whole = [use for use in matrices if not use.is_split]
  return next(iter(whole or matrices), None)


def _is_same(one: Use, other: Use) -> bool:
  """Returns whether two uses are of the same matrix, or of its transpose."""
  sides = {one.inputs, one.outputs}
  return one.batch == other.batch and sides == {other.inputs, other.outputs}


def _warn(
  uses: Uses,
  shapes: Mapping[str, tuple[int, ...]],
  found: Mapping[str, Use | None],
) -> None:
  """Warns of what is not clear."""
  wide = [path for path, shape in shapes.items() if len(shape) > 1]
  unused = [path for path in uses if not uses[path]]
  unclear, unread = [], []
  for path in wide:
    use = found[path]
    if use is None and uses[path]:
      unread.append(f"{path} ({uses[path][0].how})")
    others = [u for u in uses[path] if u.is_matrix]
    if use and (use.is_split or not all(_is_same(use, u) for u in others)):
      unclear.append(f"{path} ({len(others)} uses)")
  for paths, what in (
    (unclear, "are used as different matrices; the first use counts"),
    (unused, "are not used by the program"),
    (unread, "are no matrices in the program"),
  ):
    if paths:
      warnings.warn(
        f"{len(paths)} parameters {what}: {name_some(paths)}.", stacklevel=3
      )
