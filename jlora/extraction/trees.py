# SPDX-License-Identifier: Apache-2.0
"""Extracts LoRAs from two pytrees of parameters; can be jitted.

The extraction from disk does the same, one parameter at a time.
"""

import functools
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.extraction.parameters import (
  extract_on_host,
  extract_parameter,
  is_on_host,
  put_beside,
)
from jlora.extraction.shifts import (
  change_norm,
  rest_of,
  shift_of,
  warn_of_others,
  warn_of_rest,
)
from jlora.factoring.factorisers import Factoriser, krylov
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.meshes import place_array, sharding_of
from jlora.pairing.match import pair_up
from jlora.pairing.pairs import (
  Pair,
  Pairing,
  Side,
  TensorPart,
  read_region_of_side,
  read_side,
)
from jlora.paths import arrays_of, check_same_paths, flatten, key_for
from jlora.runs.pool import Task, finish_in_order, open_pool
from jlora.selection import Select, is_matrix, ranks_of, warn_of_waste
from jlora.sharding import Rules, assign, of_adapter, spread
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, views_of


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
  shifts: bool = False,
) -> dict[str, Any]:
  """Extracts a finetune's LoRAs: the best low-rank change of every matrix.

      finetuned[path] - base[path]  ≈  scale aᵀ b      read (in, out), scale 1

  Args:
    base: a pytree of arrays of mixed floating dtype (plain dicts, linen
      variables, NNX state), or an open checkpoint. Leaves that are no arrays,
      such as activation functions, and arrays without entries are passed over.
    finetuned: the same structure; names of checkpoints may differ as `pair_up`
      says.
    rank: rank of every module, or {path: rank}, which leaves out the modules
      not named. A rank above min(in, out) is clipped, as `lora.rank` shows.
    factor: a factoriser; set its options by `functools.partial`.
    select: `(path, leaf) -> bool`, which parameters are factored. Of vectors it
      is also asked what it would say if they were matrices.
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
    shifts: return the selected parameters that are no matrices (norms, biases)
      too, as `Shift` programs with a delta of `dtype`. At full rank `apply`
      then gives the finetune again, to rounding.

  Returns:
    {path: Lora}, a (..., r, in), b (..., r, out), scale (...) ones; with
    `shifts` then {path: Shift}. Modules that did not change give zero factors:
    the structure never depends on values, so the call can be jitted. A change
    that is not finite gives a scale of NaN. The change of float64 arrays of
    NumPy is formed in float64 and rounded once, so one below a weight's step in
    float32 is a change; traced, or placed on a mesh, they are what JAX makes of
    them: float32 unless x64 is enabled. Eager arrays on one CPU are
    factored by NumPy and LAPACK, with the bits of `extract_checkpoint`: nothing
    is compiled. Of open checkpoints, a few pairs of tensors are in memory at a
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
    ValueError: structures or shapes that differ, a parameter that can be read
      as different matrices (`jlora.views.views_of`), a rank below 1 or for a
      path that does not exist, a selection that leaves nothing, factors of
      eager arrays that are larger than `dtype` holds (traced ones get a scale
      of NaN), or rules without a mesh or that do not fit it
      (`jlora.sharding.assign`).

  Warns:
    UserWarning: changes left out because they are no matrices, with their share
      of the change (traced ones, whose values nobody knows, if they have two
      axes or more); leaves that differ and are not floating; adapters larger
      than their weights. Names up to three of each.

  Example:
    >>> base = {"mlp": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
    >>> finetuned = jax.tree.map(lambda w: w + 1.0, base)
    >>> programs = extract(base, finetuned, rank=1, shifts=True)
    >>> programs["mlp/kernel"].a.shape, programs["mlp/kernel"].b.shape
    ((1, 3), (1, 5))
    >>> programs["mlp/bias"].delta
    Array([1., 1., 1., 1., 1.], dtype=float32)

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
  if isinstance(left, dict) and isinstance(right, dict):
    warn_of_others(left, right)
  left, right = (
    arrays_of(side) if isinstance(side, dict) else side
    for side in (left, right)
  )
  sides = getattr(left, "spec", left), getattr(right, "spec", right)
  pairing = pair_up(*sides)
  _warn_of_missing(pairing)
  pairs = {pair.path: pair for pair in pairing.pairs}
  model_type = getattr(left, "model_type", None)
  table = table_for(sides[0], model_type, tree=base)
  table = table if views is None else tuple(views)
  # Of a parameter without entries nothing can have changed.
  spec = {
    path: sides[0][pair.base.name]
    for path, pair in pairs.items()
    if not pair.whole and 0 not in pair.shape
  }
  wanted = {p: pairs[p].shape for p, leaf in spec.items() if select(p, leaf)}
  modules = views_of(wanted, table)
  ranks = _clipped(ranks_of(rank, modules), modules, wanted)
  warn_of_waste(ranks, {p: modules[p].shape(wanted[p]) for p in ranks})
  rest = rest_of(spec, modules, select)
  places = _placed(sides[0], pairs, modules, rest, mesh, rules)
  take = functools.partial(_both, left, right, pairs)

  norms = {} if shifts else {path: change_norm(*take(path)) for path in rest}
  programs, changed = _factor_all(
    lambda path: take(path, places.get(path)), ranks, modules, places, key,
    factor, jnp.dtype(dtype), is_weighed=any(norms.values()),
  )  # fmt: skip
  if shifts:
    for path in rest:
      programs[path] = shift_of(*take(path, places.get(path)), dtype)
  whole = math.hypot(changed, *(norm or 0.0 for norm in norms.values()))
  warn_of_rest(norms, whole, {path: pairs[path].shape for path in rest})
  return programs


def _clipped(
  ranks: Mapping[str, int],
  views: Mapping[str, MatrixView],
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
  """Returns ranks that are no higher than a matrix's short side."""
  return {
    path: min(rank, *views[path].shape(shapes[path])[-2:])
    for path, rank in ranks.items()
  }


def _both(
  left: Mapping[str, Any],
  right: Mapping[str, Any],
  pairs: Mapping[str, Pair],
  path: str,
  sharding: NamedSharding | None = None,
) -> tuple[Any, Any]:
  """Reads a parameter's values on both sides, placed if a sharding is given."""
  pair = pairs[path]
  return (
    _take(left, pair.base, pair.shape, sharding),
    _take(right, pair.finetuned, pair.shape, sharding),
  )


def _factor_all(
  take, ranks, views, places, key, factor, dtype, *, is_weighed
) -> tuple[dict[str, Any], float]:
  """Extracts all Loras; also returns the norm of the changes, if asked for.

  Those on the host are shared out among threads, each with one for BLAS, as in
  a run from disk to disk.
  """
  loras, norms = dict.fromkeys(ranks), []

  def tasks(pool):
    """Begins what is on the host; extracts the rest at once."""
    for path, rank in ranks.items():
      leaves = take(path)
      norms.append((change_norm(*leaves) or 0.0) if is_weighed else 0.0)
      own = {
        "view": views[path],
        "rank": rank,
        "factor": factor,
        "dtype": dtype,
      }
      if is_on_host(*leaves, key):
        begin = functools.partial(
          pool.submit, _on_host, *leaves, key, path, **own
        )
        read = [x.nbytes for x in leaves if isinstance(x, np.ndarray)]
        yield Task(path, 4 * leaves[0].size + sum(read), begin)
      else:
        loras[path] = _compiled(path, leaves, places.get(path), key, own)

  threads = min(len(ranks), os.cpu_count() or 1)
  with open_pool(threads) as pool:
    for task, (lora, leaves) in finish_in_order(tasks(pool), ahead=threads):
      loras[task.name] = put_beside(lora, *leaves)
  return loras, math.hypot(*norms)


def _on_host(base, finetuned, *args, **own) -> tuple[Lora, tuple[Any, Any]]:
  """Extracts one parameter's Lora; also returns the parameters."""
  return extract_on_host(base, finetuned, *args, **own), (base, finetuned)


def _compiled(path, leaves, place, key, own) -> Lora:
  """Extracts one parameter's Lora by a compiled program."""
  placed = sharding_of(leaves[0]) or sharding_of(leaves[1]) or place
  shape = leaves[0].shape
  sharding = of_adapter(placed, own["view"], shape) if placed else None
  return extract_parameter(
    *leaves, key_for(key, path), **own, sharding=sharding
  )


def _placed(
  spec: Mapping[str, Any],
  pairs: Mapping[str, Pair],
  modules: Mapping[str, MatrixView],
  rest: Iterable[str],
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
  whole = NamedSharding(mesh, PartitionSpec())
  return dict.fromkeys(rest, whole) | {
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
