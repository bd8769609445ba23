# SPDX-License-Identifier: Apache-2.0
"""The product on a mesh: each device runs it on its own part of w.

w stays where it is, unless the rows of x lie along the same mesh axes; then it
is gathered along those. With w sharded on K the partial sums of u = x aᵀ, only
r numbers a row, are added up before the expansion, and each of the s devices
adds 1/s of that to its partial y:

    y = Σ_s (x_s w_s + (u g / s) b),    u = Σ_s x_s a_sᵀ.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora_dot.weights import Scaled, Weight, codes_of

Entry = None | str | tuple[str, ...]


class Place(NamedTuple):
  """Where the operands of a product lie, said by the caller.

  mesh: the devices.
  x: the PartitionSpec of x (..., K); its last entry is taken from w.
  w: the PartitionSpec of w as it is stored, (K, N) or (N, K).
  """

  mesh: Mesh
  x: P
  w: P


def is_local() -> bool:
  """Returns whether the shapes seen here are those of one device.

  Example:
    >>> isinstance(is_local(), bool)
    True
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  manual = all(kind == AxisType.Manual for kind in mesh.axis_types)
  return manual or mesh.size == 1


def axes_of(entry: Entry) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec.

  Example:
    >>> axes_of(None), axes_of("data"), axes_of(("a", "b"))
    ((), ('data',), ('a', 'b'))
  """
  return () if entry is None else (entry,) if isinstance(entry, str) else entry


def vary_alike(operands: Any) -> Any:
  """Marks all operands to differ along every axis where one of them does.

  Inside shard_map with check_vma that is what a gradient rule is held to; the
  transpose of the mark adds the gradient of what was alike up over the devices.
  """

  def axes(leaf):
    kind: Any = jax.typeof(leaf)
    # jax has renamed it.
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying

  leaves, tree = jax.tree.flatten(operands)
  every = frozenset().union(*map(axes, leaves))
  missing = [tuple(every - axes(leaf)) for leaf in leaves]
  return tree.unflatten(
    jax.lax.pcast(leaf, names, to="varying") if names else leaf
    for leaf, names in zip(leaves, missing, strict=True)
  )


def plan(
  mesh: Mesh | AbstractMesh, x: Any, w: Any, transpose_w: bool
) -> tuple[tuple, tuple[str, ...], tuple[str, ...]]:
  """Says where the product's axes lie: (lead, axes of K, axes of N).

  Args:
    mesh: the devices.
    x: its type, with a NamedSharding.
    w: the same; of its codes if it has scales.
    transpose_w: w is stored (N, K).
  """
  taken = set()

  def keep(entry, size):
    """Returns the entry's axes that are still free and divide the size."""
    kept = []
    for axis in axes_of(entry):
      part = math.prod(mesh.shape[a] for a in kept) * mesh.shape[axis]
      if axis not in taken and size % part == 0:
        kept.append(axis)
    taken.update(kept)
    return tuple(kept)

  def entries(t):
    spec = tuple(t.sharding.spec)
    return spec + (None,) * (len(t.shape) - len(spec))

  lead = [
    keep(*pair) for pair in zip(entries(x)[:-1], x.shape[:-1], strict=True)
  ]
  sides = list(zip(entries(w), w.shape, strict=True))
  k, n = (keep(*side) for side in (sides[::-1] if transpose_w else sides))
  return tuple(lead), k, n


def _filled(spec: P, ndim: int) -> tuple[Entry, ...]:
  """Fills a PartitionSpec with None up to so many axes."""
  return (*spec, *((None,) * (ndim - len(spec))))


def specs_of(operands, lead, k, n, transpose_w):
  """Returns the PartitionSpecs of x, w, a, b, gate; the rank is not cut."""
  x, w, a, b, gate = operands
  matrix: Any = P(n, k) if transpose_w else P(k, n)
  if isinstance(w, Scaled):
    sides = (
      None if s == 1 else e for s, e in zip(w.scale.shape, matrix, strict=True)
    )
    matrix = Scaled(matrix, cast(Any, P(*sides)))
  rows = None if gate is None else P(*lead, None) if gate.ndim > 1 else P(None)
  return P(*lead, k), matrix, P(None, k), P(None, n), rows


def _rule(operands, transpose_w, return_u):
  """Writes the product in Shardy's notation, and names factors left whole."""
  x, w, a, b, gate = operands
  lead = " ".join(f"b{axis}" for axis in range(x.ndim - 1))
  sides = ("n", "k") if transpose_w else ("k", "n")
  terms = [f"{lead} k", " ".join(sides)]
  if isinstance(w, Scaled):
    one = w.scale.shape.index(1) if 1 in w.scale.shape else 0
    terms.append(" ".join("s" if i == one else f for i, f in enumerate(sides)))
  terms += ["r k", "r n"]
  if gate is not None:
    terms.append(f"{lead} r" if gate.ndim > 1 else "r")
  results = [f"{lead} n"] + [f"{lead} r"] * return_u
  # In the order in which they appear: the compiler checks.
  fixed = ("s", "r") if isinstance(w, Scaled) else ("r",)
  return f"{', '.join(terms)} -> {', '.join(results)}", fixed


def partitioned(
  local: Callable,
  operands: tuple[jax.Array, Weight, jax.Array, jax.Array, jax.Array | None],
  transpose_w: bool,
  return_u: bool,
):
  """Runs `local` on every device's part, wherever jit put the operands.

  Args:
    local: (operands, k_axes) -> y or (y, u): the product of one device, with
      what lies along `k_axes` added up.
    operands: x (..., K), w, a, b, gate None, (r,) or (..., r).
    transpose_w: w is stored (N, K).
    return_u: local returns (y, u).

  Returns:
    What local returns. On one device, and inside shard_map, just that.
  """

  def on_device(mesh, operands, k):
    # What is computed here is one device's, whatever mesh is set outside.
    manual = dict.fromkeys(mesh.axis_names, AxisType.Manual)
    here = mesh.abstract_mesh.update(axis_types=tuple(manual.values()))
    with jax.sharding.use_abstract_mesh(here):
      return local(operands, k)

  def partition(mesh, shapes, results):
    operands = jax.tree.unflatten(tree, shapes)
    lead, k, n = plan(mesh, operands[0], codes_of(operands[1]), transpose_w)
    on_mesh = functools.partial(NamedSharding, mesh)
    specs = specs_of(operands, lead, k, n, transpose_w)
    y = on_mesh(P(*lead, n))
    return (
      mesh,
      lambda *leaves: on_device(mesh, jax.tree.unflatten(tree, leaves), k),
      (y, on_mesh(P(*lead, None))) if return_u else y,
      tuple(map(on_mesh, jax.tree.leaves(specs))),
    )

  leaves, tree = jax.tree.flatten(operands)
  call = custom_partitioning(
    lambda *leaves: local(jax.tree.unflatten(tree, leaves), ())
  )
  rule, fixed = _rule(operands, transpose_w, return_u)
  call.def_partition(
    partition,
    sharding_rule=rule,
    reduction_factors=("k",),
    need_replication_factors=fixed,
  )
  return call(*leaves)


def placed(
  local: Callable,
  operands: tuple[jax.Array, Weight, jax.Array, jax.Array, jax.Array | None],
  transpose_w: bool,
  return_u: bool,
  place: Place,
):
  """Runs `local` on every device's part, by shard_map, as `place` says.

  Args:
    local: as `partitioned` takes it.
    operands: as `partitioned` takes them.
    transpose_w: w is stored (N, K).
    return_u: local returns (y, u).
    place: the mesh and where x and w lie on it. The axes of x's rows and of w
      differ, and divide the sizes.

  Returns:
    What local returns, of the whole.
  """
  lead = _filled(place.x, operands[0].ndim)[:-1]
  sides = [axes_of(entry) for entry in _filled(place.w, 2)]
  k, n = sides[::-1] if transpose_w else sides
  y = P(*lead, n)
  return jax.shard_map(
    lambda *operands: local(operands, k),
    mesh=place.mesh,
    in_specs=specs_of(operands, lead, k, n, transpose_w),
    out_specs=(y, P(*lead, None)) if return_u else y,
    check_vma=False,
  )(*operands)
