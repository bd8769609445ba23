# SPDX-License-Identifier: Apache-2.0
"""Placing arrays on meshes of devices, and running functions of such arrays.

On a mesh with Explicit axes the type of an array says how it is cut. There
every product has to say where its result lies, and small decompositions refuse
cut sides. `run_automatic` runs a function with Auto axes, as on other meshes,
and says only of the results where they lie.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

#: The mesh axes that each axis of an array is cut over.
Entries = tuple[Any, ...]


def entries_of(spec: PartitionSpec, axes: int) -> Entries:
  """Returns for each array axis the mesh axes that cut it, or None.

  Args:
    spec: of the array; may name fewer axes than the array has.
    axes: how many axes the array has.

  Returns:
    A name, a tuple of names or None for each axis.

  Example:
    >>> entries_of(PartitionSpec("x"), 2)
    ('x', None)
  """
  return (*spec, *(None,) * (axes - len(spec)))


def automatic(mesh: Mesh) -> Mesh:
  """Returns a mesh of the same devices whose axes are all Auto.

  For functions that do not say where each of their products lies.
  """
  kinds = (AxisType.Auto,) * mesh.devices.ndim
  return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def sharding_of(x: Any) -> NamedSharding | None:
  """Returns the NamedSharding of an array, or None if it is not known.

  Args:
    x: an array or a tracer of JAX, a ShapeDtypeStruct, or anything else.

  Returns:
    Its NamedSharding. None for arrays that lie elsewhere, and for tracers whose
    mesh has no Explicit axes: only the compiler knows of those.

  Example:
    >>> sharding_of(np.ones(2)) is None
    True
  """
  if isinstance(x, Tracer):
    own = jax.typeof(x).sharding
    return own if _is_explicit(own.mesh) else None
  own = getattr(x, "sharding", None)
  return own if isinstance(own, NamedSharding) else None


def place_array(
  shape: Sequence[int],
  sharding: jax.sharding.Sharding,
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Builds an array on its devices, reading each shard by itself.

  Args:
    shape: of the whole array.
    sharding: where it goes; may span several processes.
    read: a slice for every axis -> that region.

  Returns:
    The array. Each region is read once, however many devices hold it. Neither
    a device nor the host ever has more of the array than the shards of this
    process.

  Example:
    >>> mesh = jax.make_mesh((1,), ("x",))
    >>> whole = np.arange(6).reshape(2, 3)
    >>> everywhere = NamedSharding(mesh, PartitionSpec())
    >>> place_array((2, 3), everywhere, whole.__getitem__)
    Array([[0, 1, 2],
           [3, 4, 5]], dtype=int32)
  """
  seen: dict[str, np.ndarray] = {}

  def shard(index: Any) -> np.ndarray:
    """Returns one region, read only once."""
    if str(index) not in seen:
      seen[str(index)] = read(index)
    return seen[str(index)]

  return jax.make_array_from_callback(tuple(shape), sharding, shard)


def constrain(tree: Any, shardings: Any) -> Any:
  """Tells the compiler where the arrays of a pytree are to lie.

  Args:
    tree: a pytree of arrays, traced or not.
    shardings: the NamedSharding of each.

  Returns:
    The tree. Arrays with Explicit axes stay where their types say.

  Example:
    >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    >>> own = NamedSharding(mesh, PartitionSpec("x"))
    >>> constrain(jax.numpy.ones(2), own).sharding.spec
    P('x',)
  """
  return jax.tree.map(
    lambda x, own: (
      x
      if _is_explicit(jax.typeof(x).sharding.mesh)
      else jax.lax.with_sharding_constraint(x, own)
    ),
    tree,
    shardings,
  )


def run_automatic(
  function: Callable[..., Any],
  arrays: tuple[Any, ...],
  places: Callable[..., Any],
  mesh: Mesh | AbstractMesh | None = None,
) -> Any:
  """Runs `function(*arrays)` with Auto axes, also on a mesh with Explicit ones.

  Args:
    function: of arrays.
    arrays: of JAX.
    places: takes each array's `entries_of`, in order, and returns the
      PartitionSpec of each result, or a prefix of that tree.
    mesh: that of the arrays, if it is known and their types do not tell it;
      the function then sees it as under `jax.set_mesh`.

  Returns:
    The result. Where no axis is Explicit it is `function(*arrays)` as it is,
    and lies where the compiler puts it.

  Example:
    >>> mesh = jax.make_mesh((1,), ("x",))     # Explicit, by default
    >>> x = jax.device_put(np.eye(2), NamedSharding(mesh, PartitionSpec("x")))
    >>> gram = run_automatic(lambda x: x.T @ x, (x,),
    ...                      lambda x: PartitionSpec(x[1]))
    >>> jax.typeof(gram).sharding.spec
    P(None, None)
  """
  types = [jax.typeof(x) for x in arrays]
  meshes = [t.sharding.mesh for t in types if _is_explicit(t.sharding.mesh)]
  if not meshes:
    if mesh is None or _is_explicit(mesh):
      return function(*arrays)
    abstract: Any = getattr(mesh, "abstract_mesh", mesh)
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*arrays)
  own = meshes[0]
  names = zip(own.axis_names, own.axis_types, strict=True)
  axes = tuple(name for name, kind in names if kind == AxisType.Explicit)
  shardings = jax.tree.map(
    lambda spec: NamedSharding(own, spec),
    places(*(entries_of(t.sharding.spec, t.ndim) for t in types)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  run = jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)
  return run(*arrays)


def _is_explicit(mesh: Any) -> bool:
  """Returns whether a mesh has Explicit axes."""
  return AxisType.Explicit in mesh.axis_types
