# SPDX-License-Identifier: Apache-2.0
"""Shardings of parameters and of their adapters on a mesh of devices.

A rule says how the parameters of some paths are cut. An adapter is cut as its
parameter is: a along what the layer reads, b along what it writes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.meshes import entries_of, sharding_of
from jlora.paths import first_match, flatten
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, views_of

Rules = Iterable[tuple[str, PartitionSpec]]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def assign(
  shapes: Mapping[str, Sequence[int]], mesh: AnyMesh, rules: Rules
) -> dict[str, NamedSharding]:
  """Gives every parameter the sharding of the first rule that matches its path.

  Args:
    shapes: path -> shape.
    mesh: the devices; its axes may be Auto or Explicit and stay so.
    rules: (regex for the whole path, spec). A parameter that no rule matches
      is whole on every device.

  Returns:
    {path: sharding}, in the order of shapes. Nothing is computed or moved.

  Raises:
    ValueError: a rule that matches no path, an axis that the mesh lacks, more
      axes than the parameter has, or a side that its devices do not divide;
      names up to three.

  Example:
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> rules = [(".*/kernel", PartitionSpec(None, "model"))]
    >>> assign({"q/kernel": (9, 4), "q/bias": (4,)}, mesh, rules)[
    ...   "q/kernel"].spec
    P(None, 'model')
  """
  rules = tuple(rules)
  unused = [rule for rule, _ in rules if not any(matches(rule, shapes))]
  if unused:
    raise ValueError(
      f"{len(unused)} rules match no path: {name_some(unused)}; there are "
      f"{name_some(shapes)}. A rule's regex must match a whole path."
    )
  specs = {path: first_match(rules, path) or PartitionSpec() for path in shapes}
  wrong = [
    f"{path} {tuple(shapes[path])} as {spec}"
    for path, spec in specs.items()
    if not _fits(shapes[path], spec, mesh)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} leaves cannot be cut over a mesh of {dict(mesh.shape)}: "
      f"{name_some(wrong)}; give other rules"
    )
  return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def matches(rule: str, paths: Iterable[str]) -> list[str]:
  """Returns the paths that a regex matches as a whole.

  Args:
    rule: a regex.
    paths: any.

  Returns:
    The matching paths, in the given order.

  Example:
    >>> matches(".*/q", ["0/q", "0/k"])
    ['0/q']
  """
  return [path for path in paths if first_match([(rule, True)], path)]


def spread(
  shape: Sequence[int], mesh: AnyMesh, first: Sequence[int] = ()
) -> PartitionSpec:
  """Returns a spec that cuts a parameter over as much of a mesh as divides it.

  Args:
    shape: of the parameter.
    mesh: the devices.
    first: axes to cut before all others: those of layers or experts, whose
      parts need nothing of each other.

  Returns:
    PartitionSpec. Each mesh axis in turn cuts the longest side that it still
    divides, which leaves the least work for every device to repeat: at
    4096 x 14336 and rank 64 it is 5% of the operations; cutting the short side
    would leave half.

  Example:
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"))
    >>> spread((64, 48), mesh), spread((4, 64, 48), mesh, first=(0,))
    (P(('x', 'y'), None), P('x', 'y', None))
  """
  sides = list(shape)
  cut: list[tuple[str, ...]] = [()] * len(shape)
  for name, size in mesh.shape.items():
    free = [axis for axis, side in enumerate(sides) if side % size == 0]
    if free and size > 1:
      axis = max(free, key=lambda axis: (axis in first, shape[axis], -axis))
      sides[axis] //= size
      cut[axis] = (*cut[axis], name)
  return PartitionSpec(
    *(names[0] if len(names) == 1 else names or None for names in cut)
  )


def of_adapter(
  sharding: NamedSharding, view: MatrixView, shape: Sequence[int]
) -> Lora:
  """Derives the shardings of an adapter's factors from its parameter's.

      a (..., r, in)  as in,    b (..., r, out)  as out,    scale (...)

  Layers, experts and other leading axes keep their cuts, and every device has
  the whole rank axis. Several input or output axes (an attention's heads, a
  convolution's taps) become one axis of the factor, their product. A device
  must hold one run of that axis, so it takes the cut of the first of them, and
  the cut of a later one only where a device has a single item of all those
  before. Along all other cuts the factor is whole.

  Args:
    sharding: of the parameter.
    view: how the parameter is read as a matrix.
    shape: of the parameter.

  Returns:
    A Lora whose leaves are NamedShardings of the same mesh.

  Raises:
    ValueError: a spec that does not fit the shape.

  Example:
    >>> from jlora.views import LINEAR
    >>> mesh = jax.sharding.AbstractMesh((2, 2), ("x", "y"))
    >>> own = NamedSharding(mesh, PartitionSpec("x", "y"))   # (out, in)
    >>> lora = of_adapter(own, LINEAR, (8, 6))
    >>> lora.a.spec, lora.b.spec
    (P(None, 'y'), P(None, 'x'))
  """
  mesh, spec = sharding.mesh, sharding.spec
  if not _fits(shape, spec, mesh):
    raise ValueError(
      f"{tuple(shape)} cannot be cut as {spec} over {dict(mesh.shape)}; give "
      "the sharding of this parameter."
    )
  entries = entries_of(spec, len(shape))

  def merged(axes):
    """Returns the mesh axes that cut the product of some axes."""
    kept: list[str] = []
    for axis in axes:
      names = _names(entries[axis])
      kept.extend(names)
      # A further cut keeps one run only if a device has one item of this axis.
      if shape[axis] != math.prod(mesh.shape[name] for name in names):
        break
    return kept[0] if len(kept) == 1 else tuple(kept) or None

  lead = [entries[axis] for axis in view.batch]
  own = lambda *rest: NamedSharding(mesh, PartitionSpec(*lead, *rest))  # noqa: E731
  leaves: Any = (
    own(None, merged(view.inputs)),
    own(None, merged(view.outputs)),
    own(),
  )
  return Lora(*leaves)


def adapter_shardings(
  params: Any,
  loras: Mapping[str, Lora],
  *,
  views: Iterable[ViewRule] | None = None,
) -> dict[str, Lora]:
  """Derives the shardings of adapters from those of their parameters.

      jax.device_put(loras, adapter_shardings(params, loras))

  Args:
    params: a pytree of arrays or ShapeDtypeStructs with NamedShardings.
    loras: path -> Lora, paths as `flatten` gives them; arrays or
      ShapeDtypeStructs.
    views: rules that say how a parameter is read as a matrix; by default those
      for the names found.

  Returns:
    {path: Lora of NamedShardings}, each from `of_adapter`: for `device_put`,
    for `out_shardings` of jit, or for `restore_loras`.

  Raises:
    ValueError: a path without a parameter on a mesh, or a Lora that does not
      fit its parameter; names up to three.

  Example:
    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("x",))
    >>> own = NamedSharding(mesh, PartitionSpec("x"))
    >>> params = {"w": jax.device_put(jnp.ones((3, 2)), own)}
    >>> loras = {"w": Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.ones(()))}
    >>> adapter_shardings(params, loras)["w"].a.spec
    P(None, 'x')
  """
  flat = flatten(params)
  table = table_for(flat, tree=params) if views is None else tuple(views)
  own = {path: sharding_of(flat.get(path)) for path in loras}
  shapes = {path: flat[path].shape for path in loras if own[path]}
  given = {
    path: (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    for path, lora in loras.items()
  }
  read = views_of(shapes, table, given)
  found, wrong = {}, []
  for path in loras:
    view, shape, placed = read.get(path), shapes.get(path), own[path]
    if not (placed and shape and view) or view.shape(shape) != given[path]:
      wrong.append(
        f"{path} {given[path]} for {shape or 'no sharded parameter'}"
      )
    else:
      found[path] = of_adapter(placed, view, shape)
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras (..., in, out) have no parameter on a mesh that they"
      f" fit: {name_some(wrong)}; place the parameters first (`assign`)."
    )
  return found


def _names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a spec as a tuple."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _fits(shape: Sequence[int], spec: PartitionSpec, mesh: AnyMesh) -> bool:
  """Returns whether a spec's axes exist and divide the sides they cut."""
  if len(spec) > len(shape):
    return False
  for side, entry in zip(shape, spec, strict=False):
    names = _names(entry)
    if not set(names) <= set(mesh.axis_names):
      return False
    if side % math.prod(mesh.shape[name] for name in names):
      return False
  return True
