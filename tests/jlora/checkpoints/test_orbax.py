# SPDX-License-Identifier: Apache-2.0
"""Trees written by orbax itself, in the ways that people write them."""

import json
import os
import shutil
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from orbax.checkpoint import v1

from jlora.checkpoints import orbax
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import (
  find_item,
  list_leaves,
  read_leaf,
  save_orbax,
)
from jlora.checkpoints.safetensors import write_safetensors


def tree():
  return {
    "params": {
      "layers": {  # scanned: the layer axis leads
        "q": {"kernel": jnp.arange(24.0).reshape(2, 3, 4).astype(jnp.bfloat16)},
        "norm": np.arange(6, dtype=np.float32).reshape(2, 3),
      },
      "a.b": jnp.ones(2, jnp.int32),
      "list": [jnp.zeros(3), jnp.full((), 2.0)],
    },
    "step": 3,
    "none": None,
    "name": "text",
  }


NAMES = {
  "params/layers/q/kernel",
  "params/layers/norm",
  "params/a.b",
  "params/list/0",
  "params/list/1",
  "step",
}


def save_standard(path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {k: v for k, v in tree().items() if k != "name"})


def save_pytree(path):
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, tree())


def save_zarr3(path):
  handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=True)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, tree())


def save_files(path):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, tree())


def save_v1(path):
  v1.save(path, {k: v for k, v in tree().items() if k != "name"})


def save_steps(path):
  with ocp.CheckpointManager(path) as manager:
    for step in (2, 10):
      manager.save(step, args=ocp.args.PyTreeSave(tree() | {"step": step - 7}))


def save_named(path, item="model_params"):
  with ocp.CheckpointManager(path, item_names=(item, "config")) as manager:
    args = {item: ocp.args.PyTreeSave(tree())}
    config = ocp.args.JsonSave({"a": 1})
    manager.save(0, args=ocp.args.Composite(config=config, **args))


@pytest.mark.parametrize(
  "save",
  [
    save_standard,
    save_pytree,
    save_zarr3,
    save_files,
    save_v1,
    save_steps,
    save_named,
  ],
)
def test_reads_what_orbax_writes(tmp_path, save):
  path = tmp_path / "a folder #1%20"
  save(path)
  checkpoint = open_checkpoint(path)
  assert checkpoint.format == "orbax"
  assert checkpoint.keys() == NAMES
  assert checkpoint.bytes_read == 0
  kernel = checkpoint["params/layers/q/kernel"]
  assert kernel.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
    kernel, tree()["params"]["layers"]["q"]["kernel"]
  )
  assert checkpoint["step"] == 3
  assert checkpoint.spec["params/layers/q/kernel"].shape == (2, 3, 4)
  assert checkpoint.spec["params/layers/q/kernel"].nbytes == 48
  assert checkpoint.spec["params/list/1"].shape == ()
  assert checkpoint.bytes_read == 48 + 8
  np.testing.assert_array_equal(checkpoint["params/a.b"], [1, 1])
  np.testing.assert_array_equal(checkpoint["params/list/0"], [0, 0, 0])


def test_slices_are_numpys(tmp_path):
  array = np.arange(120.0).reshape(5, 4, 6)
  save_orbax(tmp_path / "c", {"w": array})
  checkpoint = open_checkpoint(tmp_path / "c")
  for index in (
    1,
    -1,
    np.s_[1:3],
    np.s_[::2, 1],
    np.s_[..., 2:5:2],
    np.s_[4:9],
  ):
    read = checkpoint.read("w", index)
    np.testing.assert_array_equal(read, array[index])
    assert read.shape == array[index].shape
  assert checkpoint.read("w", np.s_[3:3]).shape == (0, 4, 6)


def test_sharded_array(tmp_path):
  mesh = jax.make_mesh((8,), ("x",))
  sharding = jax.NamedSharding(mesh, jax.P("x"))
  array = np.arange(64.0, dtype=np.float32).reshape(16, 4)
  save_orbax(tmp_path / "c", {"w": jax.device_put(array, sharding)})
  checkpoint = open_checkpoint(tmp_path / "c")
  np.testing.assert_array_equal(checkpoint["w"], array)
  np.testing.assert_array_equal(checkpoint.read("w", np.s_[3:5]), array[3:5])


def test_linen_variables(tmp_path):
  variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
  save_orbax(tmp_path / "c", variables)
  checkpoint = open_checkpoint(tmp_path / "c")
  kernel = variables["params"]["kernel"]
  np.testing.assert_array_equal(checkpoint["params/kernel"], kernel)


def test_flat_mapping_is_nested_and_read_back(tmp_path):
  flat = {"a/b/c": np.ones(2), "a/b/d": np.zeros(3, np.int8), "e": np.ones(())}
  save_orbax(tmp_path / "c", flat)
  with ocp.StandardCheckpointer() as checkpointer:
    nested = checkpointer.restore(tmp_path / "c")
  assert jax.tree.structure(nested) == jax.tree.structure(
    {"a": {"b": {"c": 0, "d": 0}}, "e": 0}
  )
  checkpoint = open_checkpoint(tmp_path / "c")
  assert checkpoint.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint[name], array)


def test_safetensors_to_orbax(tmp_path):
  write_safetensors(tmp_path / "x.safetensors", {"l/w": np.eye(2, dtype="f4")})
  save_orbax(tmp_path / "c", open_checkpoint(tmp_path / "x.safetensors"))
  np.testing.assert_array_equal(
    open_checkpoint(tmp_path / "c")["l/w"], np.eye(2)
  )


def test_save_leaves_no_thread_and_overwrites_nothing(tmp_path):
  before = set(threading.enumerate())
  save_orbax(tmp_path / "c", {"w": np.ones(2)})
  for thread in set(threading.enumerate()) - before:
    thread.join(timeout=5)  # asyncio's workers may still be winding down
    assert not thread.is_alive()
  with pytest.raises(ValueError, match="exists"):
    save_orbax(tmp_path / "c", {"w": np.zeros(2)})
  assert open_checkpoint(tmp_path / "c")["w"][0] == 1


def test_path_within_a_path_is_refused(tmp_path):
  flat = {"a": np.ones(2), "a/b": np.ones(2)}
  with pytest.raises(ValueError, match="a/b"):
    save_orbax(tmp_path / "c", flat)
  assert not (tmp_path / "c").exists()


def test_several_items_are_named(tmp_path):
  names = ("params", "ema")
  with ocp.CheckpointManager(tmp_path, item_names=names) as manager:
    items = {name: ocp.args.StandardSave({"w": np.ones(2)}) for name in names}
    manager.save(1, args=ocp.args.Composite(**items))
  with pytest.raises(ValueError, match="ema, params"):
    open_checkpoint(tmp_path)
  assert list(open_checkpoint(tmp_path / "1" / "ema")) == ["w"]


def test_unfinished_steps_are_passed_over(tmp_path):
  for step in (1, 2):
    save_orbax(tmp_path / "run" / str(step), {"w": np.full(2, step * 1.0)})
  run = tmp_path / "run"
  (run / "2").rename(run / "2.orbax-checkpoint-tmp-9")
  assert open_checkpoint(run)["w"][0] == 1
  with pytest.raises(ValueError, match="never finished"):
    open_checkpoint(run / "2.orbax-checkpoint-tmp-9")
  shutil.rmtree(run / "1")
  with pytest.raises(ValueError, match="neither"):
    open_checkpoint(run)


def test_two_series_of_steps_are_named(tmp_path):
  for name in ("eval_1", "train_2"):
    save_orbax(tmp_path / name, {"w": np.ones(2)})
  with pytest.raises(ValueError, match="eval_, train_"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["metadata", "manifest", "data"])
def test_damage_is_a_value_error(tmp_path, damage):
  path = tmp_path / "c"
  save_orbax(path, {"w": np.random.default_rng(0).standard_normal((64, 64))})
  if damage == "metadata":
    (path / "_METADATA").write_text("{")
  elif damage == "manifest":
    (path / "manifest.ocdbt").write_bytes(b"x")
  else:
    for file in (*path.glob("d/*"), *path.glob("ocdbt.process_0/d/*")):
      file.write_bytes(file.read_bytes()[:-40])
  with pytest.raises(ValueError, match="c"):
    dict(open_checkpoint(path))


@pytest.mark.parametrize("what", ["pipe", "device", "loop"])
def test_what_is_no_file_in_a_folder_is_not_waited_for(what, tmp_path):
  save_orbax(tmp_path / "c", {"w": np.ones(3)})
  odd = next(file for file in (tmp_path / "c").rglob("*") if file.is_file())
  odd.unlink()
  {
    "pipe": lambda: os.mkfifo(odd),
    "device": lambda: odd.symlink_to("/dev/zero"),
    "loop": lambda: odd.symlink_to(odd.name),
  }[what]()
  if odd.name == "_METADATA":
    assert find_item(tmp_path / "c") is None
    return
  with pytest.raises(ValueError, match="is no regular file|cannot be read"):
    dict(open_checkpoint(tmp_path / "c"))


def test_a_shape_that_only_the_metadata_has_takes_no_memory(tmp_path):
  save_orbax(tmp_path / "c", {"w": np.ones((3, 2))})
  leaf = list_leaves(tmp_path / "c")["w"]._replace(shape=(2**40, 2))
  with pytest.raises(ValueError, match="is stored, but the metadata says"):
    read_leaf(leaf, (range(2**40), range(2)))


def store_files(path, ocdbt, zarr3):
  """Saves arrays in several chunks, nearly all of them zeros."""
  cut = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
  rows = np.zeros((16, 4), np.float32)
  rows[3] = 1
  tree = {"rows": jax.device_put(rows, cut), "flat": np.zeros(64, np.float32)}
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**6), tree)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, tree, save_args=args)
  return rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_chunk_that_is_gone_is_an_error_and_zeros_are_none(
  tmp_path, ocdbt, zarr3
):
  path = tmp_path / "c"
  rows = store_files(path, ocdbt, zarr3)
  checkpoint = open_checkpoint(path)
  np.testing.assert_array_equal(checkpoint["rows"], rows)
  assert not checkpoint["flat"].any()
  base = {"driver": "file", "path": f"{path}/"}
  spec = {"driver": "ocdbt", "base": base} if ocdbt else base
  store = tensorstore.KvStore.open(spec).result()
  kept = (".zarray", "zarr.json")
  chunks = sorted(
    key
    for key in store.list().result()
    if key.startswith(b"rows/") and not key.decode().endswith(kept)
  )
  assert len(chunks) > 1
  store.write(chunks[-1], None).result()  # without a value it is removed
  whole = open_checkpoint(path)
  with pytest.raises(ValueError, match="tensor 'rows'.* is missing"):
    whole["rows"]
  assert not whole["flat"].any()
  np.testing.assert_array_equal(whole.read("rows", 0), rows[0])


@pytest.mark.parametrize("name", ["/elsewhere", "../elsewhere", "a/../../b"])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_leaf_outside_the_folder_is_refused(tmp_path, name, ocdbt):
  for folder in ("given", "elsewhere"):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(tmp_path / folder, {"w": np.ones((3, 4), np.float32)})
  name = name.replace("/elsewhere", f"{tmp_path}/elsewhere/w", 1)
  if name.startswith(".."):
    name = "../elsewhere/w"
  file = tmp_path / "given" / "_METADATA"
  found = json.loads(file.read_text())
  (entry,) = found["tree_metadata"].values()
  entry = json.loads(json.dumps(entry).replace('"w"', json.dumps(name)))
  found["tree_metadata"] = {f"({name!r},)": entry}
  file.write_text(json.dumps(found))
  with pytest.raises(ValueError, match="given"):
    dict(open_checkpoint(tmp_path / "given"))


def test_a_leaf_that_is_a_link_to_elsewhere_is_refused(tmp_path):
  for folder in ("given", "elsewhere"):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(tmp_path / folder, {"w": np.ones((3, 4), np.float32)})
  shutil.rmtree(tmp_path / "given" / "w")
  (tmp_path / "given" / "w").symlink_to(tmp_path / "elsewhere" / "w")
  with pytest.raises(ValueError, match="w leads to .*elsewhere/w, outside"):
    open_checkpoint(tmp_path / "given")


def test_a_checkpoint_gets_its_name_when_it_is_complete(tmp_path, monkeypatch):
  """What failed leaves nothing; a link to nowhere is a name that is taken."""
  real = ocp.StandardCheckpointer.save

  def failing(*args, **kwargs):
    real(*args, **kwargs)
    assert not (tmp_path / "c").exists()
    raise KeyboardInterrupt

  monkeypatch.setattr(ocp.StandardCheckpointer, "save", failing)
  with pytest.raises(KeyboardInterrupt):
    save_orbax(tmp_path / "c", {"w": np.ones(2)})
  monkeypatch.undo()
  assert not list(tmp_path.iterdir())
  save_orbax(tmp_path / "run" / "1", {"w": np.ones(2)})
  left = tmp_path / "run" / ".2.0123456789ab.tmp"  # as SIGKILL leaves it
  save_orbax(left, {"w": np.zeros(2)})
  assert open_checkpoint(tmp_path / "run")["w"][0] == 1
  shutil.rmtree(tmp_path / "run" / "1")
  for path in (tmp_path / "run", left):
    with pytest.raises(ValueError, match="neither|was never finished"):
      open_checkpoint(path)
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="link exists"):
    save_orbax(tmp_path / "link", {"w": np.ones(2)})


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_was_saved_is_kept_if_its_name_is_taken_meanwhile(
  tmp_path, there, monkeypatch
):
  path, real = tmp_path / "c", orbax._sync

  def taken(place):
    real(place)
    if there == "file":
      path.write_text("another's")
    else:
      (path / "x").mkdir(parents=True)

  monkeypatch.setattr(orbax, "_sync", taken)
  with pytest.raises(ValueError, match="is complete and lies in .*: move it"):
    save_orbax(path, {"w": np.ones(2)})
  (kept,) = tmp_path.glob(".c.*")
  kept.rename(tmp_path / "kept")
  assert open_checkpoint(tmp_path / "kept")["w"][0] == 1
  assert path.exists()


def test_data_of_ocdbt_that_is_a_link_to_elsewhere_is_refused(tmp_path):
  """Within the checkpoint it is none, and files may be links, as the Hub's."""
  for name, value in (("given", 1.0), ("elsewhere", 2.0)):
    save_orbax(tmp_path / name, {"w": np.full(3, value)})
  data = tmp_path / "given" / "d"
  data.rename(tmp_path / "given" / "data")
  data.symlink_to("data")
  for file in (tmp_path / "given" / "data").iterdir():
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
  assert open_checkpoint(tmp_path / "given")["w"][0] == 1
  data.unlink()
  data.symlink_to(tmp_path / "elsewhere" / "d")
  with pytest.raises(ValueError, match=r"d leads to .*elsewhere/d, .*cp -rL"):
    open_checkpoint(tmp_path / "given")


def crc32c(data):
  """The checksum at the end of a manifest."""
  found = 2**32 - 1
  for byte in data:
    found ^= byte
    for _ in range(8):
      found = found >> 1 ^ (0x82F63B78 if found & 1 else 0)
  return found ^ 2**32 - 1


@pytest.mark.parametrize("place", ["../data", "/data"])
def test_a_manifest_that_leads_outside_of_the_folder_is_an_error(
  tmp_path, place
):
  """tensorstore takes no such path, though what it leads to is there."""
  path = tmp_path / "c"
  save_orbax(path, {"w": np.arange(6.0)})
  base = {"driver": "file", "path": f"{path}/"}
  old = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
  stored = {key: old.read(key).result().value for key in old.list().result()}
  for file in [path / "manifest.ocdbt", *(path / "d").iterdir()]:
    file.unlink()
  spec = {"driver": "ocdbt", "base": base, "config": {"compression": None}}
  with tensorstore.Transaction() as whole:  # one version, so one file of data
    new = tensorstore.KvStore.open(spec).result().with_transaction(whole)
    for key, value in stored.items():
      new[key] = value
  (file,) = (path / "d").iterdir()
  assert open_checkpoint(path)["w"][5] == 5
  own = f"d/{file.name}"
  other = place.ljust(len(own), "x")
  shutil.move(file, tmp_path / other.rpartition("/")[2])
  manifest = (path / "manifest.ocdbt").read_bytes()
  assert manifest.count(own.encode()) == 1
  changed = manifest[:-4].replace(own.encode(), other.encode())
  checksum = crc32c(changed).to_bytes(4, "little")
  (path / "manifest.ocdbt").write_bytes(changed + checksum)
  with pytest.raises(ValueError, match=f"c: .*{other}.*Invalid key"):
    dict(open_checkpoint(path))
