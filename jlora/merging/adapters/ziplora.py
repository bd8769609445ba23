# SPDX-License-Identifier: Apache-2.0
"""Merges adapters with a learned coefficient for every input (ZipLoRA).

    a = [m_1 ∘ a_1; m_2 ∘ a_2],   b = [s_1 b_1; s_2 b_2]          m_i (in,)

A coefficient multiplies a column of a: one number that a layer reads. They are
trained so that the sum does what each adapter alone did on its own data.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt
from jlora.loras import Lora, Loras
from jlora.merging.adapters.concatenation import (
  by_path,
  concat,
  leading_of,
)
from jlora.merging.adapters.soups import Adapters, Granularity, Learner
from jlora.messages import name_some

with epy.lazy_imports():  # only where something is trained
  import optax

Columns = Mapping[str, Any]


class Losses(NamedTuple):
  """What a step of `learn_columns` found before it.

  Attributes:
    keep: (n,), how far the sum is from each adapter alone, on its data.
    overlap: (), the penalty, before its strength.
    cosine: (), mean absolute cosine of two adapters' coefficients.
  """

  keep: jax.Array
  overlap: jax.Array
  cosine: jax.Array


def init_columns(
  adapters: Adapters,
  start: Any = 1.0,
  *,
  granularity: Granularity | None = None,
) -> dict[str, jax.Array]:
  """Makes the coefficients that training starts from.

  Args:
    adapters: n adapters of one base, at least 2.
    start: a number, or one for each adapter; 1 is the direct sum.
    granularity: None gives every input of a module a coefficient; `by_module`,
      `by_layer` and `by_adapter` one number for all of it.

  Returns:
    {name: (..., n, in)}, with a granularity (..., n, 1), float32. What only one
    adapter has is not in it and stays as it is.

  Raises:
    ValueError: fewer than 2 adapters, or malformed Loras.

  Example:
    >>> one = {"q": Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(1))}
    >>> init_columns([one, one])["q"].shape
    (2, 2)
  """
  start = jnp.asarray(start, jnp.float32)[..., None]
  found = {}
  for path, loras in _shared(adapters).items():
    name, leading, width = path, leading_of(loras), _width(loras)
    if granularity is not None:
      (name, leading), width = granularity(path, leading), 1
    shape = (*leading, len(adapters), width)
    if found.setdefault(name, shape) != shape:
      raise ValueError(
        f"{name} would need coefficients of {found[name]} and {shape}. Let "
        "granularity= give other names."
      )
  return {name: jnp.broadcast_to(start, shape) for name, shape in found.items()}


def zip_columns(
  adapters: Adapters,
  columns: Columns,
  *,
  granularity: Granularity | None = None,
) -> Loras:
  """Adds adapters exactly, each input with its coefficients.

      Δ = Σ_i s_i (m_i ∘ a_i)ᵀ b_i

  Args:
    adapters: n adapters of one base; each may lack modules.
    columns: {name: (..., n, in)} as `init_columns` makes them, any sign. The
      inputs are those of the adapters' views: of (in, out) kernels, (out, in)
      weights and convolutions alike the last axis of a.
    granularity: as for `init_columns`.

  Returns:
    Loras of all modules: rank Σ r_i, scale 1, in the first's dtype, for any
    reader of Loras. Does not depend on the factorisations (R a, R⁻ᵀ b). Moves
    no more data than the factors; keeps shardings.

  Raises:
    ValueError: fewer than 2 adapters, coefficients that lack, are left over or
      have another shape; or as `concat`.

  Example:
    >>> one = {"q": Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(1))}
    >>> zip_columns([one, one], {"q": np.float32([[1, 0], [0, 1]])})["q"].a
    array([[1., 0.],
           [0., 1.]])

  References:
    ZipLoRA (Shah et al., 2023), arXiv 2311.13600.
  """
  shared = _shared(adapters)
  names = _names(shared, granularity)
  _check_columns(columns, names, shared, len(adapters))
  merged: Loras = {}
  for own in adapters:
    merged |= {path: x for path, x in own.items() if path not in merged}
  for path, lora in merged.items():
    parts = [lora]
    if path in shared:
      m = columns[names[path]]
      parts = [_scaled(x, m, at) for at, x in shared[path].items()]
    merged[path] = concat(parts, np.ones(len(parts), np.float32))
  return merged


def _scaled(lora: Lora, m: Any, at: int) -> Lora:
  """Multiplies the columns of a by an adapter's coefficients."""
  own = m[..., at, :]
  own = own.reshape(
    *own.shape[:-1], *(1,) * (lora.a.ndim - 1 - own.ndim), 1, own.shape[-1]
  )
  a = (own * lora.a.astype(np.float32)).astype(lora.a.dtype)
  return Lora(a, lora.b, lora.scale)


def dot(m: Any) -> Any:
  """Sums absolute inner products of the adapters' coefficients.

      Σ_{i<j} |<m_i, m_j>|

  Args:
    m: (k, in) of one module.

  Returns:
    (). The paper's penalty; it grows with the width of a layer.

  Example:
    >>> float(dot(jnp.array([[1.0, 0.5], [0.5, 1.0]])))
    1.0
  """
  return _over_pairs(jnp.abs(m @ m.T))


def mean_absolute(m: Any) -> Any:
  """Averages absolute products of the adapters' coefficients.

      Σ_{i<j} mean |m_i ∘ m_j|

  Args:
    m: (k, in) of one module.

  Returns:
    (), the penalty of a well-known implementation: at equal coefficients the
    paper's divided by `in`.

  Example:
    >>> float(mean_absolute(jnp.array([[1.0, 0.5], [0.5, 1.0]])))
    0.5
  """
  return _over_pairs(jnp.abs(m) @ jnp.abs(m).T / np.float32(m.shape[-1]))


def absolute_cosine(m: Any) -> Any:
  """Sums absolute cosines of the adapters' coefficients: no length shrinks.

      Σ_{i<j} |<m_i, m_j>| / (|m_i| |m_j|)

  Args:
    m: (k, in) of one module.

  Returns:
    (), 0 where coefficients are all zero.

  Example:
    >>> float(absolute_cosine(jnp.array([[2.0, 0.0], [3.0, 0.0]])))
    1.0
  """
  squares = jnp.sum(m**2, axis=-1, keepdims=True)
  there = squares > 0
  lengths = jnp.sqrt(jnp.where(there, squares, jnp.float32(1)))
  unit = jnp.where(there, m, jnp.float32(0)) / lengths
  return _over_pairs(jnp.abs(unit @ unit.T))


def _over_pairs(table: Any) -> Any:
  """Sums what is above the diagonal."""
  return jnp.sum(jnp.triu(table, 1))


def mean_square(found: Any, wanted: Any) -> jax.Array:
  """Computes the mean square of a difference, in float32.

  Args:
    found: a prediction, an array.
    wanted: another of its shape.

  Returns:
    ().

  Example:
    >>> float(mean_square(jnp.ones(2), jnp.zeros(2)))
    1.0
  """
  off = found.astype(jnp.float32) - wanted.astype(jnp.float32)
  return jnp.mean(off**2)


def learn_columns(
  fn: Callable[..., Any],
  optimiser: "optax.GradientTransformation",
  *,
  distance: Callable[[Any, Any], jax.Array] = mean_square,
  penalty: Callable[[Any], Any] | None = dot,
  strength: float = 0.01,
  granularity: Granularity | None = None,
  bound: Callable[..., Any] = bind,
) -> Learner:
  """Makes the functions that train coefficients of inputs.

      Σ_i distance(f(sum; x_i), f(adapter i; x_i)) + λ Σ_modules penalty(m)

  Each adapter alone, on its own data, is the target of its term; no labels are
  needed, and only the coefficients have a gradient.

  Args:
    fn: `(params, *batch) -> prediction`, any function that `adapt` takes.
    optimiser: an optax transformation of {name: (..., n, in)}.
    distance: (found, wanted) -> (); for logits a KL.
    penalty: `dot` as in the paper, `mean_absolute`, `absolute_cosine`, or any
      function (k, in) -> (); None leaves orthogonality out.
    strength: λ, multiplied by the penalty and divided by nothing.
    granularity: as for `init_columns`.
    bound: puts Loras on parameters, `bind` or a partial of it with views.

  Returns:
    Learner; `update(columns, state, params, adapters, batches)`, where batches
    holds a tuple for each adapter, gives (columns, state, Losses). A step is n
    forward passes for the targets and n steps of LoRA training of rank Σ r_i.

  Raises:
    ValueError: from `update`, as `zip_columns`, or not one batch per adapter.

  Example:
    >>> one = Lora(jnp.ones((1, 2)), jnp.ones((1, 1)), jnp.float32(1))
    >>> adapters, params = [{"w": one}, {"w": one}], {"w": jnp.zeros((2, 1))}
    >>> init, update = learn_columns(
    ...   lambda params, x: x @ params["w"], optax.sgd(0.1), penalty=None)
    >>> columns = init_columns(adapters)
    >>> batches = [(jnp.ones((1, 2)),)] * 2
    >>> _, _, losses = update(columns, init(columns), params, adapters, batches)
    >>> losses.keep.tolist()
    [4.0, 4.0]

  References:
    ZipLoRA (Shah et al., 2023), arXiv 2311.13600.

  Approximation: the paper gives λ = .01 and at most 100 updates but no learning
    rate. At the 5e-5 of a well-known implementation 100 steps of Adam move a
    coefficient by at most .005: the result is the direct sum.
  """
  run = adapt(fn)

  def losses_of(columns, params, adapters, batches, targets):
    """Computes the sum that is trained, and its parts."""
    merged = zip_columns(adapters, columns, granularity=granularity)
    on = bound(params, merged)
    keep = jnp.stack(
      [
        distance(run(on, *batch), target)
        for batch, target in zip(batches, targets, strict=True)
      ]
    )
    parts = _modules(adapters, columns, granularity)
    overlap = _total(penalty, parts) if penalty else jnp.float32(0)
    pairs = sum(k * (k - 1) // 2 * n for k, n in map(_sizes, parts))
    cosine = _total(absolute_cosine, parts) / np.float32(max(pairs, 1))
    whole = keep.sum() + jnp.float32(strength) * overlap
    return whole, Losses(keep, overlap, cosine)

  def update(columns, state, params, adapters, batches):
    """Takes a step; returns coefficients, state and the losses before it."""
    if len(batches) != len(adapters):
      raise ValueError(
        f"{len(batches)} batches for {len(adapters)} adapters; give each one "
        "of its own data."
      )
    targets = [
      jax.lax.stop_gradient(run(bound(params, own), *batch))
      for own, batch in zip(adapters, batches, strict=True)
    ]
    columns = dict(columns)
    gradient, losses = jax.grad(losses_of, has_aux=True)(
      columns, params, adapters, batches, targets
    )
    change, state = optimiser.update(gradient, state, columns)
    moved: Any = optax.apply_updates(columns, change)
    return moved, state, losses

  return Learner(lambda columns: optimiser.init(dict(columns)), update)


def _modules(
  adapters: Adapters, columns: Columns, granularity: Granularity | None
) -> list[Any]:
  """Returns coefficients (..., k, in) of each module's k adapters."""
  shared = _shared(adapters)
  names = _names(shared, granularity)
  parts = []
  for path, loras in shared.items():
    m = columns[names[path]][..., np.asarray([*loras]), :]
    parts.append(jnp.broadcast_to(m, (*m.shape[:-1], _width(loras))))
  return parts


def _sizes(m: Any) -> tuple[int, int]:
  """Returns how many adapters and how many layers a module has."""
  return m.shape[-2], int(np.prod(m.shape[:-2], dtype=int))


def _total(penalty: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
  """Adds a penalty over all modules and the layers of stacks."""
  total = jnp.float32(0)
  for m in parts:
    layers = m.reshape(-1, *m.shape[-2:])
    total = total + jnp.sum(jax.vmap(penalty)(layers))
  return total


def _shared(adapters: Adapters) -> dict[str, dict[int, Lora]]:
  """Returns Loras by path and place of what two adapters or more have."""
  if len(adapters) < 2:
    raise ValueError(
      f"{len(adapters)} adapters: columns are weighed against each other's; "
      "give at least 2, or use the one as it is."
    )
  whole = by_path(adapters)
  return {path: loras for path, loras in whole.items() if len(loras) > 1}


def _width(loras: Mapping[int, Lora]) -> int:
  """Returns how many inputs one module's Loras read."""
  return next(iter(loras.values())).a.shape[-1]


def _names(shared, granularity: Granularity | None) -> dict[str, str]:
  """Returns what the coefficients of each path are called."""
  if granularity is None:
    return {path: path for path in shared}
  return {
    path: granularity(path, leading_of(loras))[0]
    for path, loras in shared.items()
  }


def _check_columns(columns, names, shared, count) -> None:
  """Raises unless there are coefficients for all that is shared."""
  lacking = sorted({*names.values()} - columns.keys())
  more = sorted(columns.keys() - {*names.values()})
  wrong = []
  for path, name in names.items():
    if name in columns:
      width, leading = _width(shared[path]), leading_of(shared[path])
      shape = np.shape(columns[name])
      *lead, rows, inputs = shape if len(shape) > 1 else (0, 0)
      fits = tuple(lead) == leading[: len(lead)] and inputs in (1, width)
      if rows != count or not fits:
        needed = (*leading, count, width)
        wrong.append(f"{name}: {shape}, needed is {needed}")
  said = [f"none for {name_some(lacking)}"] if lacking else []
  said += [f"for nothing: {name_some(more)}"] if more else []
  said += [f"of another shape: {name_some(wrong)}"] if wrong else []
  if said:
    raise ValueError(
      f"Coefficients {'; '.join(said)}. Make them by init_columns with the "
      "same adapters and granularity."
    )
