# SPDX-License-Identifier: Apache-2.0
"""One of several processes that save what lies on all of their devices.

python orbax_writer.py PORT COUNT INDEX FOLDER
"""

import os
import pathlib
import sys

import jax
import numpy as np

from jlora.checkpoints import orbax
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.restoring import restore, restore_loras
from jlora.loras import Lora

PARAMS = {
  "layer/kernel": np.arange(128, dtype=np.float32).reshape(16, 8),
  "layer/bias": np.arange(8, dtype=np.float32),
}
LORAS = {
  "layer/kernel": Lora(
    np.arange(32, dtype=np.float32).reshape(2, 16),
    np.arange(16, dtype=np.float32).reshape(2, 8),
    np.float32(0.5),
  )
}


def places(mesh):
  """Shardings of `PARAMS` and `LORAS`, cut over both axes of a mesh."""
  own = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
  params = {"layer/kernel": own("x", "y"), "layer/bias": own("y")}
  lora = Lora(own(None, "x"), own(None, "y"), own())
  return params, {"layer/kernel": lora}


def put(tree, shardings):
  """A tree of NumPy arrays on the devices of all processes."""
  return jax.tree.map(
    lambda x, own: jax.make_array_from_callback(
      np.shape(x), own, lambda index: np.asarray(x)[index]
    ),
    tree,
    shardings,
  )


def sync_before_naming(folder):
  """Makes `save_orbax` fail if a folder has its name before it is synced."""
  real, names = orbax._sync, ("params", "loras")

  def checked(place):
    assert place.name.startswith(".")
    assert any((place / name).exists() for name in ("d", "manifest.ocdbt"))
    assert not any(pathlib.Path(folder, n).exists() for n in names[len(seen) :])
    seen.append(place)
    real(place)

  seen = []
  orbax._sync = checked
  return seen


def main(port, count, index, folder):
  jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
  mesh = jax.make_mesh((4, 2), ("x", "y"))
  params, loras = places(mesh)
  seen = sync_before_naming(folder)
  save_orbax(f"{folder}/params", put(PARAMS, params))
  save_orbax(f"{folder}/loras", put(LORAS, loras))
  assert len(seen) == 2
  assert sorted(os.listdir(folder)) == ["loras", "params"], os.listdir(folder)
  other = jax.make_mesh((2, 4), ("x", "y"))
  params, loras = places(other)
  found = (
    restore(open_checkpoint(f"{folder}/params"), params),
    restore_loras(open_checkpoint(f"{folder}/loras"), loras),
  )
  for array, whole in zip(
    jax.tree.leaves(found), jax.tree.leaves((PARAMS, LORAS)), strict=True
  ):
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])


if __name__ == "__main__":
  main(*sys.argv[1:])
