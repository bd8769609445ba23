# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints onto devices, on any mesh.

`save_orbax` writes what lies on devices, every process its own shards. Here
every process reads the regions of its own devices, however the file is cut, so
the mesh may differ from the one that was saved.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some
from jlora.numerics.meshes import place_array
from jlora.paths import check_same_paths

_LEAVES = ("a", "b", "scale")


def restore(
  checkpoint: Checkpoint, shardings: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
  """Loads the arrays of a checkpoint onto devices, each shard read by itself.

  Args:
    checkpoint: an open one, of safetensors or orbax.
    shardings: name -> sharding, for the arrays that are wanted, from
      `jlora.sharding.assign` for example; None takes all, on the default
      device.

  Returns:
    {name: array}, in the stored dtype. Neither a device nor a process ever has
    more of an array than its own shards. From an orbax checkpoint all stored
    chunks that a region touches are read; usually a chunk is a shard of the
    process that wrote it.

  Raises:
    ValueError: a name that the checkpoint lacks, or a damaged file.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint, save_orbax
    >>> mesh = jax.make_mesh((1,), ("x",))
    >>> own = jax.NamedSharding(mesh, jax.P("x"))
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   save_orbax(f"{tmp}/c", {"w": jnp.arange(4.0)})
    ...   restore(open_checkpoint(f"{tmp}/c"), {"w": own})["w"].sharding.spec
    P('x',)
  """
  if shardings is None:
    return {name: jnp.asarray(checkpoint[name]) for name in checkpoint}
  if missing := [name for name in shardings if name not in checkpoint]:
    raise ValueError(
      f"{checkpoint.path} lacks {name_some(missing)}; it has "
      f"{name_some(checkpoint)}."
    )
  return {
    name: place_array(
      checkpoint.spec[name].shape,
      sharding,
      functools.partial(checkpoint.read, name),
    )
    for name, sharding in shardings.items()
  }


def restore_loras(
  checkpoint: Checkpoint, shardings: Mapping[str, Lora] | None = None
) -> Loras:
  """Loads onto devices the Loras that `save_orbax` wrote.

  Args:
    checkpoint: an open one that holds `a`, `b` and `scale` of every path.
    shardings: {path: Lora of NamedShardings}, from
      `jlora.sharding.adapter_shardings`; None means the default device.

  Returns:
    {path: Lora}, a (..., r, in), b (..., r, out), scale (...), as stored.

  Raises:
    ValueError: arrays that are no Loras, paths that differ from those of the
      shardings, or a damaged file.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint, save_orbax
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.float32(1))
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   save_orbax(f"{tmp}/c", {"mlp/kernel": lora})
    ...   found = restore_loras(open_checkpoint(f"{tmp}/c"))
    >>> found["mlp/kernel"].b.shape
    (1, 3)
  """
  paths = dict.fromkeys(name.rpartition("/")[0] for name in checkpoint)
  names = [f"{path}/{leaf}" for path in paths for leaf in _LEAVES]
  check_same_paths(
    names, checkpoint, "Loras of these paths", str(checkpoint.path)
  )
  places = None
  if shardings is not None:
    check_same_paths(paths, shardings, str(checkpoint.path), "the shardings")
    places = {
      f"{path}/{leaf}": getattr(own, leaf)
      for path, own in shardings.items()
      for leaf in _LEAVES
    }
  arrays = restore(checkpoint, places)
  loras = {
    path: Lora(*(arrays[f"{path}/{leaf}"] for leaf in _LEAVES))
    for path in paths
  }
  check_loras(loras)
  return loras
