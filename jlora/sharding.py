# SPDX-License-Identifier: Apache-2.0
"""Where parameters and their adapters lie on a mesh of devices.

A rule says how parameters of some paths are cut; an adapter is cut as its
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
from jlora.views import MatrixView, ViewRule, table_for, view_of

Rules = Iterable[tuple[str, PartitionSpec]]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def assign(
  shapes: Mapping[str, Sequence[int]], mesh: AnyMesh, rules: Rules
) -> dict[str, NamedSharding]:
  """The sharding of every parameter, by the first rule that matches its path.

  Args:
    shapes: path -> shape.
    mesh: the devices; its axes may be Auto or Explicit and stay so.
    rules: (regex for the whole path, spec); where none matches, a parameter is
      whole on every device.

  Returns:
    {path: sharding}, in the order of shapes. Nothing is computed or moved.

  Raises:
    ValueError: a rule that matches no path, an axis that the mesh lacks, more
      axes than the parameter has, or a side that its devices do not divide;
      three named.

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
  """The paths that a rule's regex matches, whole.

  Args:
    rule: a regex.
    paths: any.

  Returns:
    Those that match, in their order.

  Example:
    >>> matches(".*/q", ["0/q", "0/k"])
    ['0/q']
  """
  return [path for path in paths if first_match([(rule, True)], path)]


def spread(
  shape: Sequence[int], mesh: AnyMesh, first: Sequence[int] = ()
) -> PartitionSpec:
  """A spec that cuts a parameter over all of a mesh, as far as that divides.

  Args:
    shape: of the parameter.
    mesh: the devices.
    first: axes that are cut before all others: those of layers or experts,
      whose parts need nothing of each other.

  Returns:
    PartitionSpec. One after the other each mesh axis cuts the longest side
    that it still divides: what all devices then do alike is thin and short. For
    4096 x 14336 and rank 64 that is 5% of the operations, where cutting the
    short side leaves half.

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
  """Where the factors of a parameter's adapter lie, from where it lies itself.

      a (..., r, in)  as in,    b (..., r, out)  as out,    scale (...)

  Layers, experts and other leading axes stay where they are, and every device
  has all of the rank. Of several input or output axes (the heads of an
  attention, the taps of a convolution) the factor has one, their product: it
  keeps the mesh axes of the first that is cut, where that leaves each device
  one run of it, and those of the next only where a device has a single item of
  all before it. Other cuts are not kept: the factor is whole along them.

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
    kept: list[str] = []
    for axis in axes:
      names = _names(entries[axis])
      kept.extend(names)
      # What follows lies in pieces, unless one item is left of what precedes.
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
  """Where adapters lie, from where the parameters they belong to lie.

      jax.device_put(loras, adapter_shardings(params, loras))

  Args:
    params: a pytree of arrays or ShapeDtypeStructs with NamedShardings.
    loras: path -> Lora, paths as `flatten` gives them; arrays or
      ShapeDtypeStructs.
    views: rules that say how a parameter is read as a matrix; by default those
      for the names found.

  Returns:
    {path: Lora of NamedShardings}, as `of_adapter` says, for `device_put`,
    `out_shardings` of jit, or a checkpoint's restoration.

  Raises:
    ValueError: paths that are no parameters on a mesh, or Loras that do not
      fit theirs; three named.

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
  table = tuple(table_for(flat) if views is None else views)
  found, wrong = {}, []
  for path, lora in loras.items():
    own = sharding_of(flat.get(path))
    shape = flat[path].shape if own else ()
    view = view_of(path, shape, table)
    given = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    if not own or view is None or view.shape(shape) != given:
      wrong.append(f"{path} {given} for {shape or 'no sharded parameter'}")
    else:
      found[path] = of_adapter(own, view, shape)
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras (..., in, out) have no parameter on a mesh that they"
      f" fit: {name_some(wrong)}; place the parameters first (`assign`)."
    )
  return found


def _names(entry: Any) -> tuple[str, ...]:
  """The mesh axes of one entry of a spec."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _fits(shape: Sequence[int], spec: PartitionSpec, mesh: AnyMesh) -> bool:
  """Whether a spec's axes exist and divide the sides they cut."""
  if len(spec) > len(shape):
    return False
  for side, entry in zip(shape, spec, strict=False):
    names = _names(entry)
    if not set(names) <= set(mesh.axis_names):
      return False
    if side % math.prod(mesh.shape[name] for name in names):
      return False
  return True
