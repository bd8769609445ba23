# SPDX-License-Identifier: Apache-2.0
"""Places the leaves of a checkpoint on devices, shard by shard."""

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

#: (regex of a whole path, spec): each pair of products is sharded along the
#: width between them, embeddings and heads along the vocabulary.
RULES = (
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/kernel", PartitionSpec(None, "model")),
  (r".*/(q|k|v|gate|up|c_attn|c_fc)/bias", PartitionSpec("model")),
  (r".*/(o|down|c_proj)/kernel", PartitionSpec("model", None)),
  (r"(embed|wte)/embedding", PartitionSpec("model", None)),
  (r"head/kernel", PartitionSpec(None, "model")),
)


def rules_for(shapes: Mapping[str, Sequence[int]]) -> Rules:
  """Returns the rules of `RULES` that match any leaf of a model.

  No family of models has leaves for all of them.

  Args:
    shapes: path -> shape, all leaves of the model.

  Returns:
    Rules, a list of (regex, PartitionSpec).

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
  """Reads a leaf of a checkpoint onto its devices, shard by shard.

  Args:
    checkpoint: an open one.
    source: which tensor, or part of one, holds the leaf.
    dtype: of the result, rounded once.
    sharding: None puts it on the default device.

  Raises:
    ValueError: as `Checkpoint.read`.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", {"w": np.eye(2, 3)})
    ...   checkpoint = open_checkpoint(folder)
    ...   source = LeafSource("w", (3, 2), transposed=True)
    ...   place_leaf(checkpoint, source, jnp.float32).shape
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
  """Reads a region of a leaf from the tensor that holds it."""
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
