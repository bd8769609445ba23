# SPDX-License-Identifier: Apache-2.0
"""Batches of which every row is computed with adapters of its own.

y_i = fn(params + Σ_s weight_is adapter_(ids_is), x_i)
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax import lax
from jax.core import Tracer

from jlora.adapting.adapted import is_adapted
from jlora.adapting.banks import as_ids
from jlora.adapting.binding import bind
from jlora.adapting.roles import outputs_that_depend
from jlora.adapting.transforms import adapt, is_dynamic
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.paths import flatten
from jlora.views import ViewRule

with epy.lazy_imports():  # a quarter of a second
  from pallas_kernels import lora_dot as kernels


def adapt_rows(
  fn: Callable[..., Any],
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  strict: bool = False,
  views: Iterable[ViewRule] | None = None,
) -> Callable[..., Any]:
  """Wraps a function so that every row of a batch uses its own adapters.

      y_i = fn(params + Σ_s weight_is adapter_(ids_is), x_i)

  Args:
    fn: `(params, *args, **kwargs) -> results`, for batches of any size, each
      row of which is computed independently.
    in_axes: where the rows of `args` lie, as for `jax.vmap`: an axis for all, a
      tuple with one for each, or a tree of axes within; None is shared by all
      rows, as a mask or a key is. Rows of `kwargs` lie on axis 0. Numbers
      without axes, such as a cache's index, and what is no array are shared.
    out_axes: where the rows of the results lie, likewise. None, and numbers
      without axes: the same for all rows.
    strict: as for `adapt`.
    views: as for `bind`.

  Returns:
    `(params, bank, ids, *args, weights=None, **kwargs) -> results`: bank from
    `make_bank`, ids (B,) or (B, s) integers of any dtype, -1 for none, weights
    of the shape of ids. The whole batch is one program, which fetches each
    row's adapters or masks those of other rows, whichever is less work. Rows of
    id -1 equal the base's. Other ids, weights and adapters of the same shapes
    do not recompile. Traces fn twice where an argument is shared. Warns where
    JAX cannot map fn (`ragged_dot`): its rows run one after the other, each of
    which reads all weights.

  Raises:
    ValueError: from the returned function: ids that are no integers, or out of
      range, unless they are traced; an argument without a row for each id; a
      result without one axis of rows, or that should be shared and is not;
      names up to three.

  Example:
    >>> lora = Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 2)),
    ...             jnp.array([0.5, 1.0]))
    >>> run = adapt_rows(lambda params, x: x @ params["w"])
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> run(params, {"w": lora}, jnp.array([1, -1, 0]), jnp.ones((3, 3)))
    Array([[3. , 3. ],
           [0. , 0. ],
           [1.5, 1.5]], dtype=float32)
    >>> run = adapt_rows(lambda p, x, at, scale: (x @ p["w"] * scale, at + 1),
    ...                  in_axes=(1, None), out_axes=(1, None))
    >>> y, at = run(params, {"w": lora}, jnp.array([1, -1]),
    ...             jnp.ones((4, 2, 3)), jnp.arange(2), scale=2)
    >>> y.shape, at
    ((4, 2, 2), Array([1, 2], dtype=int32))
  """
  adapted = adapt(fn, strict=strict)

  def run(params, bank, ids, *args, weights=None, **kwargs):
    """Runs fn on a batch, each row with the adapters of its ids."""
    ids = _checked(ids, weights, bank)
    batch = len(ids)
    leaves, tree = jax.tree.flatten((args, kwargs))
    axes = _axes_in(in_axes, args, kwargs, batch)
    at = {i: axis for i, axis in enumerate(axes) if axis is not None}

    def whole(rows):
      """Puts rows, each with its axis, into the arguments."""
      given = list(leaves)
      for i, row in zip(at, rows, strict=True):
        given[i] = row
      return jax.tree.unflatten(tree, given)

    def row(ids, weights, parts):
      """Runs fn on a batch of one row."""
      own = bind(params, bank, weights, ids=ids, batch=batch, views=views)
      rows = [
        jnp.expand_dims(x, axis)
        for axis, x in zip(at.values(), parts, strict=True)
      ]
      own_args, own_kwargs = whole(rows)
      results = adapted(own, *own_args, **own_kwargs)
      own_axes = out or _spread(out_axes, results, "out_axes")
      places[:] = [jax.tree.structure(results), own_axes]
      return _first(results, own_axes)

    out: list[int | None] = []
    places: list[Any] = []
    is_shared = [
      is_dynamic(x) and axes[i] is None for i, x in enumerate(leaves)
    ]
    if any(is_shared) or None in _leaves(out_axes):
      out = _axes_out(fn, params, bank, leaves, axes, whole, out_axes)
    parts = [jnp.moveaxis(leaves[i], axis, 0) for i, axis in at.items()]
    found = _each(row, (ids, weights, parts), [axis is None for axis in out])
    return _laid_out(found, *places)

  return run


def _each(row: Callable[..., list[jax.Array]], given, is_shared) -> Any:
  """Runs a function of one row on all; first axes are rows."""
  # Rows go where out_axes says later, whatever holds the results.
  first = [None if is_one else 0 for is_one in is_shared] or 0
  try:
    return jax.vmap(row, 0, first)(*given)
  except NotImplementedError as error:  # such as products of ragged groups
    warnings.warn(
      f"JAX has no program for all rows at once ({error}); they are computed "
      "one after the other.", stacklevel=3,
    )  # fmt: skip
  found = lax.map(lambda parts: row(*parts), given)
  each = is_shared or [False] * len(found)
  return [x[0] if one else x for x, one in zip(found, each, strict=True)]


def _laid_out(rows: Sequence[jax.Array], tree: Any, axes) -> Any:
  """Puts the rows of each result on its axis, in a tree."""
  found = [
    x if axis is None else jnp.moveaxis(x, 0, axis)
    for x, axis in zip(rows, axes, strict=True)
  ]
  return jax.tree.unflatten(tree, found)


def _checked(ids, weights, bank: Mapping[str, Lora]) -> jax.Array:
  """Returns ids as int32 where they and their weights fit the bank."""
  count = {lora.a.shape[0] for lora in bank.values()}
  if len(count) > 1:
    raise ValueError(
      f"The bank's Loras hold {sorted(count)} adapters; all need as many: "
      "make it with make_bank."
    )
  shape = jnp.shape(ids)
  if len(shape) not in (1, 2):
    raise ValueError(f"ids are {shape}; needed are (B,) or (B, s).")
  if weights is not None and jnp.shape(weights) != shape:
    raise ValueError(
      f"weights are {jnp.shape(weights)}; ids {shape} need as many."
    )
  found = as_ids(ids, *count or (0,))
  if not isinstance(ids, Tracer) and count:
    kernels.check_ids(ids, *count)
  return found


def _leaves(axes: Any) -> list[Any]:
  """Lists the axes of a tree of them, None among them."""
  return jax.tree.leaves(axes, is_leaf=lambda x: x is None)


def _spread(axes: Any, tree: Any, name: str) -> list[Any]:
  """Returns the axis of each leaf of a tree; a list may stand for a tuple."""
  given = tuple(axes) if type(axes) is list and type(tree) is tuple else axes
  try:
    each = jax.tree.map(
      lambda axis, part: [axis] * len(jax.tree.leaves(part)),
      given, tree, is_leaf=lambda x: x is None,
    )  # fmt: skip
  except ValueError as error:
    raise ValueError(
      f"{name}={axes} does not fit {jax.tree.structure(tree)}: give one axis, "
      "or a tree of axes that the values' own tree extends."
    ) from error
  found = jax.tree.leaves(each, is_leaf=lambda x: x is None)
  if wrong := [repr(axis) for axis in found if not _is_axis(axis)]:
    raise ValueError(
      f"{name} has {name_some(dict.fromkeys(wrong))}; an axis is an integer, "
      "or None."
    )
  return found


def _is_axis(axis: Any) -> bool:
  """Returns whether something can say where rows lie."""
  return axis is None or (
    isinstance(axis, int | np.integer) and not isinstance(axis, bool)
  )


def _names(tree: Any, root: str) -> list[str]:
  """Names the leaves of a tree."""
  return [
    root + jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _axes_in(in_axes, args, kwargs, batch: int) -> list[int | None]:
  """Returns the axis of rows of each argument's leaf, None if it is shared."""
  axes = _spread(in_axes, args, "in_axes")
  axes += [0] * len(jax.tree.leaves(kwargs))
  names = [*_names(args, "args"), *_names(kwargs, "kwargs")]
  leaves = jax.tree.leaves((args, kwargs))
  found: list[int | None] = []
  wrong = []
  for name, axis, leaf in zip(names, axes, leaves, strict=True):
    if axis is None or not is_dynamic(leaf) or leaf.ndim == 0:
      found.append(None)
      continue
    found.append(axis % leaf.ndim)
    fits = -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] == batch
    if not fits:
      wrong.append(f"{name} {leaf.shape} along axis {axis}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} arguments have no row for each of {batch} ids: "
      f"{name_some(wrong)}; say in in_axes where their rows lie, or None for "
      "what all rows share (for a keyword: pass it by place)."
    )
  return found


def _first(results, axes: Sequence[int | None]) -> list[jax.Array]:
  """Takes the only row of each result."""
  leaves = jax.tree.leaves(results)
  names = _names(results, "results")
  wrong = [
    f"{name} {x.shape} along axis {axis}"
    for name, x, axis in zip(names, leaves, axes, strict=True)
    if axis is not None
    and not (-x.ndim <= axis < x.ndim and x.shape[axis] == 1)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} results of one row are not one: {name_some(wrong)}; "
      "say in out_axes where the rows lie, or None for what all share."
    )
  return [
    x if axis is None else lax.index_in_dim(x, 0, axis, keepdims=False)
    for x, axis in zip(leaves, axes, strict=True)
  ]


def _one_row(x: jax.Array, axis: int) -> jax.Array:
  """Returns the first row, zeros where there is none."""
  if x.shape[axis]:
    return lax.slice_in_dim(x, 0, 1, axis=axis)
  return jnp.zeros(
    [n if i != axis else 1 for i, n in enumerate(x.shape)], x.dtype
  )


def _axes_out(
  fn, params, bank, leaves, axes: Sequence[int | None], whole, out_axes
) -> list[int | None]:
  """Returns the axis of rows of each result's leaf, None if it is shared.

  Which results are the same for all rows is read from the program: those that
  no row and no adapter goes into.
  """
  flat = flatten(params, is_adapted)
  tree = jax.tree.structure(params, is_leaf=is_adapted)
  bases = [x.w if is_adapted(x) else x for x in flat.values()]
  at = [i for i, axis in enumerate(axes) if axis is not None]
  shared = [
    i for i, x in enumerate(leaves) if axes[i] is None and is_dynamic(x)
  ]

  def one(bases, rows, others):
    """Runs fn on the first row."""
    rows = [_one_row(x, axes[i] or 0) for i, x in zip(at, rows, strict=True)]
    args, kwargs = whole(rows)
    given, places = jax.tree.flatten((args, kwargs))
    for i, x in zip(shared, others, strict=True):
      given[i] = x
    args, kwargs = jax.tree.unflatten(places, given)
    return fn(jax.tree.unflatten(tree, bases), *args, **kwargs)

  closed, results = jax.make_jaxpr(one, return_shape=True)(
    bases, [leaves[i] for i in at], [leaves[i] for i in shared]
  )
  marks = [path in bank for path in flat]
  marks += [True] * len(at) + [False] * len(shared)
  depends = outputs_that_depend(closed.jaxpr, marks)
  each = _spread(out_axes, results, "out_axes")
  wrong, found = [], []
  for name, axis, x, is_own in zip(
    _names(results, "results"), each, jax.tree.leaves(results), depends,
    strict=True,
  ):  # fmt: skip
    is_one = axis is None or x.ndim == 0
    found.append(None if is_one else axis)
    if is_one and is_own:
      wrong.append(f"{name} {x.shape}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} results are not the same for all rows: "
      f"{name_some(wrong)}; return one for each row, and say in out_axes where."
    )
  return found
