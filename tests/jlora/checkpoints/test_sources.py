# SPDX-License-Identifier: Apache-2.0
"""What is read is not written to, by any path; what goes along with it."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.merged import save_merged
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.safetensors import write_safetensors
from jlora.checkpoints.sources import (
  check_apart,
  copy_files,
  list_companions,
)
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from tests.helpers.kills import Killed, count_operations, killed_at
from tests.helpers.small_pairs import files_of

NAME = "h.0.q.weight"
TENSORS = {NAME: np.ones((3, 2), np.float32)}
LORA = Lora(jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.float32(1))


@pytest.fixture
def root(tmp_path):
  """A file, a folder, the Hub's cache, steps of orbax, and links."""
  write_safetensors(tmp_path / "file.safetensors", TENSORS)
  folder = tmp_path / "models" / "folder"
  folder.mkdir(parents=True)
  write_safetensors(folder / "model.safetensors", TENSORS)
  cache = tmp_path / "cache" / "models--org--name"
  snapshot = cache / "snapshots" / "0123"
  for made in (snapshot, cache / "blobs"):
    made.mkdir(parents=True)
  write_safetensors(cache / "blobs" / "ab", TENSORS)
  (snapshot / "model.safetensors").symlink_to("../../blobs/ab")
  save_orbax(tmp_path / "run" / "3", TENSORS)
  for link, target in (
    ("link", folder),
    ("models_too", tmp_path / "models"),
    ("weights", folder / "model.safetensors"),
  ):
    (tmp_path / link).symlink_to(target)
  return tmp_path


SNAPSHOT = "cache/models--org--name/snapshots/0123"
# What is read -> where one must not write.
TAKEN = [
  ("file.safetensors", "file.safetensors"),
  ("file.safetensors", ""),
  ("models/folder", "models/folder"),
  ("models/folder", "models"),
  ("models/folder", "link"),
  ("models/folder", "models_too"),
  ("models/folder", "models_too/folder"),
  ("models/folder", "weights"),
  ("models/folder", "models/folder/other.safetensors"),
  ("models/folder", "link/other.safetensors"),
  ("link", "models/folder"),
  ("link", ""),  # the link itself lies there
  ("weights", "models/folder"),
  (SNAPSHOT, SNAPSHOT),
  (SNAPSHOT, "cache/models--org--name/blobs"),
  (SNAPSHOT, "cache"),
  ("run", "run"),
  ("run", "run/3"),
  ("run", "run/4"),
  ("run", "run/3/more"),
  ("run/3", "run/3/more"),
  ("run/3", "run"),
]
FREE = [
  ("file.safetensors", "out"),
  ("file.safetensors", "other.safetensors"),
  ("models/folder", "models/folder/out"),
  ("models/folder", "models/out"),
  ("models/folder", "out/model.safetensors"),
  (SNAPSHOT, "cache/out"),
  ("run/3", "run/4"),
]


@pytest.mark.parametrize(("read", "out"), TAKEN)
def test_what_is_read_is_not_written_to(root, read, out):
  with pytest.raises(ValueError, match=r"what is read: .*Give another out"):
    check_apart(root / out, [open_checkpoint(root / read)])


@pytest.mark.parametrize(("read", "out"), FREE)
def test_other_places_are_free(root, read, out):
  check_apart(root / out, [open_checkpoint(root / read)])


def test_what_lies_in_memory_is_passed_over(root):
  check_apart(root, [TENSORS, None, 3])


def test_several_are_named(root):
  files = [root / "file.safetensors", str(root / "models" / "folder")]
  with pytest.raises(ValueError, match=r"file.safetensors, .*folder\. Give"):
    check_apart(root, files)


# Each writes the open checkpoint, or what was made of it, to a path.
WRITERS = {
  "write_safetensors": lambda out, base: write_safetensors(out, base),
  "save_orbax": lambda out, base: save_orbax(out, base),
  "save_merged": lambda out, base: save_merged(out, base, {NAME: LORA}),
  "save_peft": lambda out, base: save_peft(out, {NAME: LORA}, like=base.spec),
}


@pytest.mark.parametrize(
  ("write", "read", "out"),
  [
    ("write_safetensors", "file.safetensors", "file.safetensors"),
    ("write_safetensors", "models/folder", "weights"),
    ("write_safetensors", "run", "run/x.safetensors"),
    ("save_orbax", "run", "run/4"),
    ("save_orbax", "run/3", "run/3/more"),
    ("save_merged", "run", "run/4"),
    ("save_peft", "models/folder", "models/folder"),
    ("save_peft", "models/folder", "link"),
    ("save_peft", "file.safetensors", ""),
  ],
)
def test_every_writer_asks(root, write, read, out):
  base = open_checkpoint(root / read)
  before = {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}
  with pytest.raises(ValueError, match="what is read"):
    WRITERS[write](root / out, base)
  assert before == {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_a_merged_folder_is_whole_or_not_there_wherever_it_was_killed(root):
  (root / "models/folder/config.json").write_text('{"vocab_size": 3}')
  base = open_checkpoint(root / "models/folder")
  count = count_operations(
    lambda: save_merged(root / "whole", base, {NAME: LORA})
  )
  expected = files_of(root / "whole")
  assert expected.keys() == {"config.json", "model.safetensors"}
  for at in range(count):
    for after in (False, True):
      out = root / f"out{at}{after}"
      with pytest.raises(Killed), killed_at(at, after=after):
        save_merged(out, base, {NAME: LORA})
      assert not out.exists() or files_of(out) == expected
      if not out.exists():
        save_merged(out, base, {NAME: LORA})
      assert files_of(out) == expected


def give(folder, name, target):
  """A companion of a folder that is a link."""
  (folder / name).symlink_to(target)
  return open_checkpoint(folder)


def test_companions_of_the_cache_are_copied(root):
  snapshot = root / SNAPSHOT
  (root / "cache/models--org--name/blobs/cd").write_text("{}")
  source = give(snapshot, "config.json", "../../blobs/cd")
  (root / "new").mkdir()
  copy_files(list_companions(source), root / "new")
  assert not (root / "new" / "config.json").is_symlink()
  assert (root / "new" / "config.json").read_text() == "{}"


def test_companions_beside_the_weights_are_copied(root):
  """A folder of links to all files of another folder."""
  (root / "models/folder/config.json").write_text("{}")
  own = root / "own"
  own.mkdir()
  (own / "model.safetensors").symlink_to(root / "weights")
  source = give(own, "config.json", root / "models/folder/config.json")
  assert [file.name for file in list_companions(source)] == ["config.json"]
  assert list_companions(open_checkpoint(root / "link"))


@pytest.mark.parametrize(
  "target", ["/etc/hostname", "secret", "nowhere", "/dev"]
)
@pytest.mark.parametrize("read", ["models/folder", SNAPSHOT, "run/3"])
def test_companions_that_lead_elsewhere_are_refused(root, read, target):
  (root / "secret").write_text("mine")
  if read == "run/3" and target in ("nowhere", "/dev"):  # all is looked at
    with pytest.raises(ValueError, match="notes.txt (is no regular|leads to)"):
      give(root / read, "notes.txt", root / target)
    return
  source = give(root / read, "notes.txt", root / target)
  before = sorted(root.rglob("*"))
  with pytest.raises(ValueError, match=r"notes.txt leads to .*cp -L"):
    save_merged(root / "new", source, {NAME: LORA})
  assert sorted(root.rglob("*")) == before


def test_a_link_of_the_result_is_replaced(root):
  (root / "mine").write_text("precious")
  (root / "out").mkdir()
  (root / "out" / "config.json").symlink_to(root / "mine")
  (root / "config.json").write_text("{}")
  copy_files([root / "config.json"], root / "out")
  assert (root / "mine").read_text() == "precious"
  assert not os.path.islink(root / "out" / "config.json")
