# SPDX-License-Identifier: Apache-2.0
"""Leaves of a checkpoint placed on devices, shard by shard."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.models.names import LeafSource
from jlora.numerics import meshes
from jlora.sharding import Rules, matches

#: (regex of a whole path, spec): each pair of products is cut along the width
#: between them, embeddings and heads along the vocabulary.
RULES = (
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/kernel", PartitionSpec(None, "model")),
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/bias", PartitionSpec("model")),
  (r".*/(o|down|c_proj)/kernel", PartitionSpec("model", None)),
  (r"(embed|wte)/embedding", PartitionSpec("model", None)),
  (r"head/kernel", PartitionSpec(None, "model")),
)


def rules_for(shapes: Mapping[str, Sequence[int]]) -> Rules:
  """Those of `RULES` that match a leaf of a model: no family has all names.

  Args:
    shapes: path -> shape.

  Returns:
    Rules.

  Example:
    >>> rules_for({"embed/embedding": (9, 4)})
    [('(embed|wte)/embedding', P('model', None))]
  """
  return [(rule, spec) for rule, spec in RULES if matches(rule, shapes)]


def place_leaf(
  checkpoint: Checkpoint,
  source: LeafSource,
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
    The array, read shard by shard (`jlora.numerics.meshes.place_array`).

  Raises:
    ValueError: as `Checkpoint.read`.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", {"w": np.eye(2, 3)})
    ...   checkpoint = open_checkpoint(folder)
    ...   place_leaf(checkpoint, Source("w", (3, 2), True), jnp.float32).shape
    (3, 2)
  """
  whole = (slice(None),) * len(source.shape)
  if sharding is None:
    return jnp.asarray(_read(checkpoint, source, whole, dtype))
  read = lambda index: _read(checkpoint, source, index, dtype)  # noqa: E731
  return meshes.place_array(source.shape, sharding, read)


def _read(
  checkpoint: Checkpoint, source: LeafSource, index: Sequence[slice], dtype: Any
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
