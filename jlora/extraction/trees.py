# SPDX-License-Identifier: Apache-2.0
"""Extracts LoRAs from two pytrees of parameters; can be jitted.

The extraction from disk does the same, one parameter at a time.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.factoring.deltas import difference
from jlora.factoring.factorisers import Factoriser, krylov
from jlora.loras import Lora, Loras, exchange, from_factors
from jlora.messages import name_some
from jlora.numerics.meshes import (
  constrain,
  place_array,
  run_automatic,
  sharding_of,
)
from jlora.pairing.match import pair_up
from jlora.pairing.pairs import (
  Pair,
  Pairing,
  Side,
  TensorPart,
  read_region_of_side,
  read_side,
)
from jlora.paths import check_same_paths, flatten, key_for
from jlora.selection import Select, is_matrix, ranks_of
from jlora.sharding import Rules, assign, of_adapter, spread
from jlora.tree_views import table_for
from jlora.views import (
  MatrixView,
  ViewRule,
  in_stored_order,
  views_of,
)


def extract(
  base: Any,
  finetuned: Any,
  *,
  rank: int | Mapping[str, int] = 64,
  factor: Factoriser = krylov,
  select: Select = is_matrix,
  views: Iterable[ViewRule] | None = None,
  key: jax.Array | None = None,
  dtype: Any = jnp.float32,
  mesh: Any = None,
  rules: Rules | None = None,
) -> Loras:
  """Extracts a finetune's LoRAs: the best low-rank change of every matrix.

      finetuned[path] - base[path]  ≈  scale aᵀ b      read (in, out), scale 1

  Args:
    base: a pytree of arrays of mixed floating dtype (plain dicts, linen
      variables, NNX state), or an open checkpoint.
    finetuned: the same structure; names of checkpoints may differ as `pair_up`
      says.
    rank: rank of every module, or {path: rank}, which leaves out the modules
      not named. A rank above min(in, out) is clipped, as `lora.rank` shows.
    factor: a factoriser; set its options by `functools.partial`.
    select: `(path, leaf) -> bool`, which parameters are factored.
    views: rules that say how a parameter is read as a matrix; None takes those
      that fit the names found.
    key: PRNG key; None is `key(0)`. Each module uses `key_for(key, path)`, so
      neither order nor subset of modules changes a result.
    dtype: storage dtype of a and b.
    mesh: devices to place every parameter on, with Auto or Explicit axes; of an
      open checkpoint, each shard is read by itself. None leaves parameters
      where they are.
    rules: pairs (regex for a whole path of the base, PartitionSpec); the first
      match decides, and without one a parameter is whole on every device. None
      cuts each module over the mesh by its sides (`jlora.sharding.spread`).

  Returns:
    {path: Lora}, a (..., r, in), b (..., r, out), scale (...) ones. Modules
    that did not change give zero factors: the structure never depends on
    values, so the call can be jitted. A change that is not finite gives a
    scale of NaN. Of open checkpoints, one pair of tensors is in memory at a
    time, and tensors without a partner or of another shape are left out with a
    warning; `extract_checkpoint` reports them one by one.

    Factors are sharded as `jlora.sharding.of_adapter` says if their parameter's
    sharding is known: it was placed here, is an array with a NamedSharding, or
    has a type with Explicit axes. A sharded parameter is not gathered, only its
    thin factors are: by `krylov` along both sides, by `gram` along the long
    one. If the short side is cut, `gram` gathers it (and `krylov` uses `gram`
    where a parameter is little larger than its thin factors); `svd` gathers
    the whole parameter.

  Raises:
    ValueError: structures or shapes that differ, a rank below 1 or for a path
      that does not exist, a selection that leaves nothing, or rules without a
      mesh or that do not fit it (`jlora.sharding.assign`).

  Example:
    >>> base = {"mlp": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
    >>> finetuned = jax.tree.map(lambda w: w + 1.0, base)
    >>> loras = extract(base, finetuned, rank=1)
    >>> loras["mlp/kernel"].a.shape, loras["mlp/kernel"].b.shape
    ((1, 3), (1, 5))

  References:
    Eckart and Young (1936). Loss of extraction from full finetunes: Biderman
    et al. (2024), section 4.6.
  """
  for tree in (base, finetuned):
    if isinstance(tree, Checkpoint):
      check_dequantised(tree)
  left, right = _leaves(base), _leaves(finetuned)
  if isinstance(left, dict) or isinstance(right, dict):
    check_same_paths(left, right, "base", "finetuned")
  sides = getattr(left, "spec", left), getattr(right, "spec", right)
  pairing = pair_up(*sides)
  _warn_of_missing(pairing)
  pairs = {pair.path: pair for pair in pairing.pairs}
  model_type = getattr(left, "model_type", None)
  table = table_for(sides[0], model_type) if views is None else tuple(views)
  wanted = {
    path: pair.shape
    for path, pair in pairs.items()
    if not pair.whole and select(path, sides[0][pair.base.name])
  }
  modules = views_of(wanted, table)
  ranks = ranks_of(rank, modules)
  places = _placed(sides[0], pairs, modules, mesh, rules)
  loras = {}
  for path, wanted in ranks.items():
    pair, view = pairs[path], modules[path]
    leaves = [
      _take(tree, side, pair.shape, places.get(path))
      for tree, side in ((left, pair.base), (right, pair.finetuned))
    ]
    own = sharding_of(leaves[0]) or sharding_of(leaves[1]) or places.get(path)
    loras[path] = extract_parameter(
      *leaves,
      key_for(key, path),
      view=view,
      rank=wanted,
      factor=factor,
      dtype=jnp.dtype(dtype),
      sharding=of_adapter(own, view, pair.shape) if own else None,
    )
  return loras


def _placed(
  spec: Mapping[str, Any],
  pairs: Mapping[str, Pair],
  modules: Mapping[str, MatrixView],
  mesh: Any,
  rules: Rules | None,
) -> dict[str, NamedSharding]:
  """Returns the sharding of each parameter, for those that are to be placed."""
  if mesh is None and rules is not None:
    raise ValueError("rules without a mesh: give the devices they are of.")
  if mesh is None:
    return {}
  if rules is not None:
    shapes = {path: pair.shape for path, pair in pairs.items()}
    return assign({name: spec[name].shape for name in spec} | shapes, mesh,
                  rules)  # fmt: skip
  return {
    path: NamedSharding(mesh, spread(pairs[path].shape, mesh, view.batch))
    for path, view in modules.items()
  }


def _take(
  tree: Mapping[str, Any],
  side: Side,
  shape: tuple[int, ...],
  sharding: NamedSharding | None,
) -> Any:
  """Reads a parameter's values, placed if a sharding is given."""
  if sharding is None:
    return read_side(tree, side)
  if isinstance(side, TensorPart) and not hasattr(tree, "spec"):
    leaf = read_side(tree, side)
    if isinstance(leaf, jax.Array):
      return jax.device_put(leaf, sharding)
  return place_array(
    shape, sharding, functools.partial(read_region_of_side, tree, side)
  )


@functools.partial(
  jax.jit, static_argnames=("view", "rank", "factor", "dtype", "sharding")
)
def extract_parameter(
  base: jax.Array,
  finetuned: jax.Array,
  key: jax.Array,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser = krylov,
  dtype: Any = jnp.float32,
  sharding: Lora | None = None,
) -> Lora:
  """Extracts the Lora of one parameter's change, read as (..., in, out).

  Args:
    base: the parameter, any floating dtype, its own layout.
    finetuned: the same shape.
    key: PRNG key of the module.
    view: how the layout is read as a matrix; static, as all below.
    rank: units to keep.
    factor: the factoriser. Equal shapes share a compilation.
    dtype: storage dtype.
    sharding: of the result's leaves, from `of_adapter`; needed for parameters
      whose type has Explicit axes. None leaves it to the compiler.

  Returns:
    Lora with a (..., r, in), b (..., r, out), scale 1; scale NaN if either
    parameter is not finite.

  Example:
    >>> w = jnp.zeros((3, 5), jnp.bfloat16)
    >>> extract_parameter(w, w + 1, jax.random.key(0), view=MatrixView(),
    ...                   rank=1).a.shape
    (1, 3)
  """

  def step(base, finetuned, key):
    """Factors the change; gives a scale of NaN if it is not finite."""
    delta, is_exchanged = in_stored_order(difference(base, finetuned), view)
    is_finite = jnp.isfinite(delta).all()
    delta = jnp.where(is_finite, delta, 0.0)  # LAPACK may not return from NaN
    lora = from_factors(factor(delta, rank, key), dtype)
    scale = jnp.where(is_finite, lora.scale, jnp.nan)
    lora = Lora(lora.a, lora.b, scale)
    return exchange(lora) if is_exchanged else lora

  if sharding is None:
    return step(base, finetuned, key)
  specs = jax.tree.map(lambda own: own.spec, sharding)
  mesh: Any = jax.tree.leaves(sharding)[0].mesh
  lora = run_automatic(step, (base, finetuned, key), lambda *_: specs, mesh)
  return constrain(lora, sharding)


def _warn_of_missing(pairing: Pairing) -> None:
  """Warns of the tensors that are left out, by name."""
  missing = [f"{name} (only in the base)" for name in pairing.only_base]
  missing += [f"{name} (only finetuned)" for name in pairing.only_finetuned]
  missing += [
    f"{pair.path} ({pair.note})" for pair in pairing.pairs if pair.whole
  ]
  if missing:
    warnings.warn(
      f"{len(missing)} tensors are left out: {name_some(missing)}", stacklevel=3
    )


def _leaves(tree: Any) -> Mapping[str, Any]:
  """Flattens a tree to {path: leaf}; an open checkpoint stays lazy."""
  return tree if hasattr(tree, "spec") else flatten(tree)
