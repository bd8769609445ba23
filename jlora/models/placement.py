# SPDX-License-Identifier: Apache-2.0
"""Leaves of a checkpoint placed on devices, shard by shard."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.checkpoints import Checkpoint
from jlora.loras import name_some
from jlora.models.names import Source
from jlora.paths import first_match

Rules = Iterable[tuple[str, PartitionSpec]]

#: (regex of a whole path, spec): each pair of products is cut along the width
#: between them, embeddings and heads along the vocabulary.
RULES = (
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/kernel", PartitionSpec(None, "model")),
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/bias", PartitionSpec("model")),
  (r".*/(o|down|c_proj)/kernel", PartitionSpec("model", None)),
  (r"(embed|wte)/embedding", PartitionSpec("model", None)),
  (r"head/kernel", PartitionSpec(None, "model")),
)


def assign(
  shapes: Mapping[str, Sequence[int]], mesh: Mesh, rules: Rules = RULES
) -> dict[str, NamedSharding]:
  """The sharding of every leaf, by the first rule that matches its path.

  Args:
    shapes: path -> shape.
    mesh: its axes become automatic: the compiler places what is in between.
    rules: (regex for the whole path, spec); where none matches, a leaf is
      whole on every device.

  Returns:
    Path -> sharding.

  Raises:
    ValueError: for an axis that the mesh lacks, more axes than the leaf has,
      or a side that its devices do not divide; three leaves named.

  Example:
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> tuple(assign({"embed/embedding": (9, 4)}, mesh)["embed/embedding"].spec)
    ('model', None)
  """
  rules = tuple(rules)
  mesh = Mesh(
    mesh.devices,
    mesh.axis_names,
    axis_types=(AxisType.Auto,) * mesh.devices.ndim,
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
      f"{name_some(wrong)}; give load other rules"
    )
  return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def _fits(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> bool:
  """Whether a spec's axes exist and divide the sides they cut."""
  if len(spec) > len(shape):
    return False
  for side, axes in zip(shape, spec, strict=False):
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    if not set(axes) <= set(mesh.axis_names):
      return False
    if side % math.prod(mesh.shape[axis] for axis in axes):
      return False
  return True


def place(
  checkpoint: Checkpoint,
  source: Source,
  dtype: Any,
  sharding: NamedSharding | None = None,
) -> jax.Array:
  """A leaf of a checkpoint on its devices.

  Args:
    checkpoint: an open one.
    source: where the leaf lies in it.
    dtype: of the result, rounded to once.
    sharding: None puts it on the default device.

  Returns:
    The array. Each shard is read by itself, and once however many devices
    hold it: neither a device nor the host ever has more of the leaf than the
    shards of this process.

  Raises:
    ValueError: as `Checkpoint.read`.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", {"w": np.eye(2, 3)})
    ...   checkpoint = open_checkpoint(folder)
    ...   place(checkpoint, Source("w", (3, 2), True), jnp.float32).shape
    (3, 2)
  """
  whole = (slice(None),) * len(source.shape)
  if sharding is None:
    return jnp.asarray(_read(checkpoint, source, whole, dtype))
  seen: dict[str, np.ndarray] = {}

  def shard(index: Any) -> np.ndarray:
    if str(index) not in seen:
      seen[str(index)] = _read(checkpoint, source, index, dtype)
    return seen[str(index)]

  return jax.make_array_from_callback(source.shape, sharding, shard)


def _read(
  checkpoint: Checkpoint, source: Source, index: Sequence[slice], dtype: Any
) -> np.ndarray:
  """A region of a leaf, read where the tensor keeps it."""
  ends = [
    cut.indices(side)[:2] for cut, side in zip(index, source.shape, strict=True)
  ]
  if source.transposed:
    ends.reverse()
  if source.expert is not None:
    ends[0] = (ends[0][0] + source.row, ends[0][1] + source.row)
  region: list[Any] = [slice(start, stop) for start, stop in ends]
  if source.expert is not None:
    region.insert(0, source.expert)
  array = checkpoint.read(source.name, tuple(region))
  return (array.T if source.transposed else array).astype(dtype)
