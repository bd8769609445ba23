# SPDX-License-Identifier: Apache-2.0
"""Initial adapters for training: LoRA, rsLoRA, PiSSA and OLoRA.

`init_lora` makes adapters that change nothing yet. `split_base` moves a part of
the weights into an adapter, and `relative_to_base` undoes that after training.

There is no DoRA here. Its layer is `m ⊙ (x@w + scale (x@aᵀ)@b) / ‖w + scale
aᵀb‖`: it scales the base's own product by a norm that depends on a and b. That
is neither a gate on the rank axis nor a sum of changes, so stacking, gating,
truncating and merging would silently be wrong for it. Import a finished DoRA
adapter by `extract`, as the change of weights it amounts to.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapting.transforms import apply
from jlora.factoring.factorisers import Factoriser, krylov
from jlora.loras import Lora, Loras, check_loras, from_factors
from jlora.messages import name_some
from jlora.paths import (
  arrays_of,
  check_same_paths,
  first_match,
  flatten,
  key_for,
)
from jlora.selection import (
  EMBEDDINGS,
  Select,
  is_linear,
  is_matrix,
  ranks_of,
  warn_of_waste,
)
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, as_matrix, views_of

# (key, (..., in, out), rank) -> a (..., rank, in), b (..., rank, out).
Init = Callable[[jax.Array, tuple[int, ...], int], tuple[Any, Any]]
# (alpha, rank) -> scale.
Scaling = Callable[[float, int], float]


def kaiming(key: jax.Array, shape: tuple[int, ...], rank: int):
  """Draws a uniform a and sets b to zero, as loralib does.

      a ~ U(-1/√in, 1/√in),   b = 0

  Args:
    key: PRNG key.
    shape: (..., in, out) of the parameter read as a matrix.
    rank: number of units.

  Returns:
    a (..., rank, in), b (..., rank, out), float32.

  Example:
    >>> a, b = kaiming(jax.random.key(0), (4, 3), 2)
    >>> a.shape, bool((jnp.abs(a) <= 0.5).all()), float(b.sum())
    ((2, 4), True, 0.0)

  References:
    microsoft/LoRA, loralib: Kaiming's initialisation with a = √5. The paper
    uses a Gaussian.
  """
  bound = 1 / math.sqrt(shape[-2])
  return _drawn(jax.random.uniform, key, shape, rank, 2 * bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int):
  """Draws a normal a and sets b to zero, as the LoRA paper does.

      a ~ N(0, 1/rank²),   b = 0

  Args:
    key: PRNG key.
    shape: (..., in, out) of the parameter read as a matrix.
    rank: number of units.

  Returns:
    a (..., rank, in), b (..., rank, out), float32.

  Example:
    >>> a, b = gaussian(jax.random.key(0), (4, 3), 2)
    >>> a.shape, float(b.sum())
    ((2, 4), 0.0)

  References:
    Hu et al. (2021), section 4.1, which gives no variance; PEFT's is used.
  """
  return _drawn(jax.random.normal, key, shape, rank, 1 / rank, 0.0)


def reversed_normal(key: jax.Array, shape: tuple[int, ...], rank: int):
  """Sets a to zero and draws a normal b, for embedding tables.

      a = 0,   b ~ N(0, 1)

  A token that is never read keeps a zero column of a, and so its row.

  Args:
    key: PRNG key.
    shape: (..., tokens, features).
    rank: number of units.

  Returns:
    a (..., rank, tokens), b (..., rank, features), float32.

  References:
    microsoft/LoRA, loralib, `Embedding`.
  """
  drawn, zero = _drawn(
    jax.random.normal, key, (*shape[:-2], shape[-1], shape[-2]), rank, 1.0, 0.0
  )
  return zero, drawn


#: loralib's initialisation; the first rule that matches a path counts.
LORALIB: tuple[tuple[str, Init], ...] = (
  (EMBEDDINGS, reversed_normal),
  (r".*", kaiming),
)


def by_rank(alpha: float, rank: int) -> float:
  """Returns the scale of LoRA, alpha / rank.

  Args:
    alpha: a number chosen once for all ranks.
    rank: of the module.

  Returns:
    float, the scale.

  Example:
    >>> [by_rank(16, rank) for rank in (1, 16, 64, 256)]
    [16.0, 1.0, 0.25, 0.0625]
  """
  return alpha / rank


def by_root(alpha: float, rank: int) -> float:
  """Returns the scale of rank-stabilised LoRA, alpha / √rank.

  Args:
    alpha: a number chosen once for all ranks.
    rank: of the module.

  Returns:
    float, the scale.

  Example:
    >>> [by_root(16, rank) for rank in (1, 16, 64, 256)]
    [16.0, 4.0, 2.0, 1.0]

  References:
    Kalajdzievski (2023), rsLoRA: with alpha / rank, training stalls at high
    ranks.
  """
  return alpha / math.sqrt(rank)


def init_lora(
  params: Any,
  rank: int | Mapping[str, int],
  key: jax.Array | None = None,
  *,
  select: Select = is_linear,
  init: Init | Iterable[tuple[str, Init]] = LORALIB,
  alpha: float = 16.0,
  scaling: Scaling = by_rank,
  views: Iterable[ViewRule] | None = None,
  dtype: Any = jnp.float32,
) -> Loras:
  """Makes a new adapter for training, which changes nothing yet.

      a, b = init(key of the path, (..., in, out), rank),   scale(alpha, rank)

  Args:
    params: a pytree of arrays, or of anything with a shape and a dtype. Other
      leaves are passed over.
    rank: of every module, or {path: rank}: modules not named are left out. It
      is not clipped.
    key: PRNG key; None is `key(0)`. Each module uses `key_for(key, path)`.
    select: `(path, leaf) -> bool`, which parameters get a Lora; by default all
      layers' matrices and no embedding.
    init: a function, or rules (regex of the path, function).
    alpha: the numerator of the scale. The paper uses the first rank it tries,
      loralib 1; no value is right everywhere.
    scaling: `by_rank`, `by_root`, or any function of (alpha, rank).
    views: rules for reading a parameter as a matrix; by default those for the
      names found.
    dtype: of a and b. Train in float32, whatever the base's dtype.

  Returns:
    {path: Lora}, scale float32. Allocates the factors alone.

  Raises:
    ValueError: nothing selected, a rank below 1 or for a path that is not a
      module, a path that no rule of `init` matches, or a parameter that can be
      read as different matrices (`jlora.views.views_of`).

  Warns:
    UserWarning: adapters that hold more numbers than their weights.

  Example:
    >>> params = {"q": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}}
    >>> loras = init_lora(params, rank=2, alpha=8)
    >>> loras["q/kernel"].b.shape, float(loras["q/kernel"].scale)
    ((2, 5), 4.0)

  References:
    Hu et al. (2021); microsoft/LoRA.
  """
  modules = matrices_of(params, select, views)
  ranks = ranks_of(rank, modules)
  shapes = {path: modules[path][1].shape(modules[path][0].shape)
            for path in ranks}  # fmt: skip
  warn_of_waste(ranks, shapes)
  rules = [(r"(?s).*", init)] if callable(init) else list(init)
  inits = {path: first_match(rules, path) for path in ranks}
  if without := [path for path, found in inits.items() if found is None]:
    raise ValueError(
      f"no rule of init matches {name_some(without)}; end the rules with "
      '(".*", kaiming).'
    )
  loras = {}
  for path, r in ranks.items():
    shape = shapes[path]
    a, b = inits[path](key_for(key, path), shape, r)  # pyright: ignore
    scale = jnp.full(shape[:-2], scaling(alpha, r), jnp.float32)
    loras[path] = Lora(a.astype(dtype), b.astype(dtype), scale)
  check_loras(loras)
  return loras


# ((..., in, out), rank, scale, key) -> a (..., rank, in), b (..., rank, out).
Start = Callable[[Any, int, float, jax.Array], tuple[Any, Any]]


def principal(
  weight: Any,
  rank: int,
  scale: float,
  key: jax.Array,
  *,
  factor: Factoriser = krylov,
):
  """Takes the weight's largest singular triplets as the factors (PiSSA).

      weight ≈ u diag(s) vt,   a = √(s/scale) uᵀ,   b = √(s/scale) vt

  Args:
    weight: (..., in, out).
    rank: number of units.
    scale: of the adapter.
    key: PRNG key of the factoriser.
    factor: a factoriser.

  Returns:
    a (..., rank, in), b (..., rank, out), float32.

  Example:
    >>> weight = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> a, b = principal(weight, 1, 1.0, jax.random.key(0))
    >>> (a * b).round(4)
    Array([[3., 0., 0.]], dtype=float32)

  References:
    Meng et al. (2024), PiSSA.
  """
  lora = from_factors(factor(weight, rank, key))
  return lora.a / math.sqrt(scale), lora.b / math.sqrt(scale)


def orthogonal(weight: Any, rank: int, scale: float, key: jax.Array):
  """Takes the first units of the weight's QR decomposition (OLoRA).

      weightᵀ = Q R,   b = (the first columns of Q)ᵀ,   a = the first rows of R

  Args:
    weight: (..., in, out).
    rank: number of units.
    scale: unused: `split_base` subtracts the adapter times its scale.
    key: unused.

  Returns:
    a (..., rank, in), b (..., rank, out), float32. Decomposes the whole weight.

  Example:
    >>> a, b = orthogonal(jnp.eye(3)[:, :2], 1, 1.0, jax.random.key(0))
    >>> jnp.abs(a), jnp.abs(b)
    (Array([[1., 0., 0.]], dtype=float32), Array([[1., 0.]], dtype=float32))

  References:
    Büyükakyüz (2024), OLoRA; PEFT's code.
  """
  del scale, key
  q, r = jnp.linalg.qr(jnp.swapaxes(weight.astype(jnp.float32), -1, -2))
  return r[..., :rank, :], jnp.swapaxes(q[..., :rank], -1, -2)


def split_base(
  params: Any,
  rank: int | Mapping[str, int],
  key: jax.Array | None = None,
  *,
  start: Start = principal,
  select: Select = is_linear,
  alpha: float = 16.0,
  scaling: Scaling = by_rank,
  views: Iterable[ViewRule] | None = None,
) -> tuple[Loras, Any]:
  """Splits weights into an adapter to be trained and a frozen rest.

      rest = w - scale aᵀ b

  Train the adapter on the rest, then call `relative_to_base`: the trained
  adapter does not fit the original base.

  Args:
    params: a pytree of arrays.
    rank: as for `init_lora`; at most the matrix's shorter side.
    key: as for `init_lora`.
    start: which part of a weight: `principal` (PiSSA) or `orthogonal` (OLoRA).
    select: as for `init_lora`.
    alpha: as for `init_lora`.
    scaling: as for `init_lora`.
    views: as for `init_lora`.

  Returns:
    Loras in float32, and a pytree like params in its dtypes. Adapter and rest
    sum to params up to one rounding to the leaf's dtype, which is not a small
    error in bfloat16.

  Raises:
    ValueError: as `init_lora`, or a rank above the matrix's shorter side.

  Example:
    >>> params = {"q": {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}}
    >>> loras, rest = split_base(params, rank=1)
    >>> jnp.diagonal(rest["q"]["kernel"]).round(4)
    Array([0., 2., 1.], dtype=float32)
  """
  modules = matrices_of(params, select, views)
  ranks = ranks_of(rank, modules)
  loras, high = {}, []
  for path, r in ranks.items():
    leaf, view = modules[path]
    matrix, scale = as_matrix(leaf, view), scaling(alpha, r)
    if r > min(matrix.shape[-2:]):
      high.append(f"{path}: {r} for {matrix.shape}")
      continue
    a, b = start(matrix, r, scale, key_for(key, path))
    full = jnp.full(matrix.shape[:-2], scale, jnp.float32)
    loras[path] = Lora(a, b, full)
  if high:
    raise ValueError(
      f"rank above what the matrix has: {name_some(high)}; ask for less there."
    )
  negative = {
    path: dataclasses.replace(lora, scale=-lora.scale)
    for path, lora in loras.items()
  }
  return loras, apply(params, negative, views=views)


def relative_to_base(
  trained: Mapping[str, Lora], start: Mapping[str, Lora]
) -> Loras:
  """Converts an adapter trained after `split_base` to one of the original base.

      scale' a'ᵀ b' - scale aᵀ b,   one adapter of twice the rank, exactly

  Args:
    trained: path -> Lora, after training on the rest.
    start: path -> Lora, as `split_base` returned them.

  Returns:
    Loras with a (..., 2r, in), b (..., 2r, out) and the scale of `trained`; the
    factors are only concatenated.

  Raises:
    ValueError: the paths differ.

  Example:
    >>> one = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> relative_to_base({"w": one}, {"w": one})["w"].rank
    2

  References:
    Meng et al. (2024), appendix on conversion.
  """
  check_same_paths(trained, start, "trained", "start")
  found = {}
  for path, lora in trained.items():
    first = start[path]
    ratio = (first.scale / lora.scale)[..., None, None]
    a = jnp.concatenate([lora.a, first.a.astype(lora.a.dtype)], axis=-2)
    minus = (-ratio * first.b).astype(lora.b.dtype)
    b = jnp.concatenate([lora.b, minus], axis=-2)
    found[path] = Lora(a, b, lora.scale)
  return found


def matrices_of(
  params: Any, select: Select, views: Iterable[ViewRule] | None = None
) -> dict[str, tuple[Any, MatrixView]]:
  """Returns the selected parameters that can be read as matrices.

  Returns:
    {path: (leaf, view)}, in the order of the tree.

  Example:
    >>> params = {"q": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    >>> list(matrices_of(params, is_linear))
    ['q/kernel']
  """
  flat = arrays_of(flatten(params))
  table = table_for(flat, tree=params) if views is None else tuple(views)
  wanted = {
    path: leaf.shape
    for path, leaf in flat.items()
    if is_matrix(path, leaf) and select(path, leaf)
  }
  return {
    path: (flat[path], view) for path, view in views_of(wanted, table).items()
  }


def _drawn(draw, key, shape, rank, width, below):
  """Returns `width * draw - below` for a, zeros for b."""
  *batch, n_in, n_out = shape
  a = width * draw(key, (*batch, rank, n_in), jnp.float32) - below
  return a, jnp.zeros((*batch, rank, n_out), jnp.float32)
