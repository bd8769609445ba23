# SPDX-License-Identifier: Apache-2.0
"""Files put in place: whole, by names nobody can foresee, through no link."""

import os
import zlib

import numpy as np
import pytest

from jlora.checkpoints import checksums, new_files
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.new_files import (
  new_folder,
  noted,
  remove_temporaries,
  replace_text,
)
from jlora.checkpoints.safetensors import stream_safetensors, write_safetensors
from tests.helpers.small_pairs import draw

TENSORS = {"a": draw(3, 4), "b": draw(5).astype("f2"), "empty": draw(0, 2)}

# Each writes a file of a name into a folder.
WRITERS = {
  "text": lambda path: replace_text(path, "new"),
  "tensors": lambda path: write_safetensors(path, TENSORS),
}


@pytest.mark.parametrize("cuts", [(), (0,), (3,), (0, 3, 3, 9, 12)])
def test_checksums_of_parts_give_that_of_the_whole(cuts):
  data = bytes(range(12))
  ends = [0, *cuts, len(data)]
  parts = [data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
  found = checksums.join_checksums((zlib.crc32(x), len(x)) for x in parts)
  assert found == zlib.crc32(data)


@pytest.mark.parametrize("order", [list(TENSORS), list(TENSORS)[::-1]])
def test_what_is_noted_is_what_lies_on_the_disk(tmp_path, order):
  """Of arrays that come in any order, whole or in parts."""
  spec = {name: (x.shape, x.dtype) for name, x in TENSORS.items()}
  parts = {"a": iter(np.split(TENSORS["a"], 3))}
  arrays = [(name, parts.get(name, TENSORS[name])) for name in order]
  with noted() as files:
    stream_safetensors(tmp_path / "x.safetensors", spec, arrays)
    stream_checkpoint(
      tmp_path / "folder", spec, TENSORS.items(), max_shard_bytes=48
    )
    replace_text(tmp_path / "text", "some")
  written = [file for file in tmp_path.rglob("*") if file.is_file()]
  assert len(written) == 1 + 3 + 1
  assert files == {f: f"{zlib.crc32(f.read_bytes()):08x}" for f in written}
  replace_text(tmp_path / "later", "some")
  assert tmp_path / "later" not in files


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_is_replaced_and_not_followed(tmp_path, write):
  (tmp_path / "mine").write_text("precious")
  (tmp_path / "out").symlink_to(tmp_path / "mine")
  write(tmp_path / "out")
  assert (tmp_path / "mine").read_text() == "precious"
  assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_has_a_temporarys_name_is_not_opened(
  tmp_path, write, kind, monkeypatch
):
  """Even where a name could be foreseen."""
  monkeypatch.setattr(new_files.secrets, "token_hex", lambda n: "0" * 2 * n)
  (tmp_path / "mine").write_text("precious")
  left = tmp_path / f".out.{'0' * 12}.tmp"
  if kind == "link":
    left.symlink_to(tmp_path / "mine")
  else:
    os.link(tmp_path / "mine", left)
  with pytest.raises(FileExistsError):
    write(tmp_path / "out")
  assert (tmp_path / "mine").read_text() == "precious"
  assert os.path.lexists(left)
  assert not (tmp_path / "out").exists()


def test_names_of_temporaries_differ_and_stay_short(tmp_path):
  path = tmp_path / ("ключ" * 60)
  names = {new_files.name_temporary(path).name for _ in range(9)}
  assert len(names) == 9
  assert max(len(name.encode()) for name in names) < 255


@pytest.mark.parametrize("there", ["folder", "file", "link to nowhere"])
def test_a_new_folder_takes_no_name_that_is_taken(tmp_path, there):
  path = tmp_path / "new"
  {
    "folder": path.mkdir,
    "file": path.touch,
    "link to nowhere": lambda: path.symlink_to(tmp_path / "nowhere"),
  }[there]()
  with pytest.raises(ValueError, match="exists; remove it"), new_folder(path):
    pass
  assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
  path = tmp_path / "new"
  with pytest.raises(KeyError), new_folder(path) as folder:  # noqa: PT012
    replace_text(folder / "x", "y")
    assert not path.exists()
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_all_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
  """The file before its rename, the folder after it, and then the next name."""
  done = []
  for name in ("fsync", "replace"):
    real = getattr(os, name)
    monkeypatch.setattr(
      os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))
    )
  spec = {name: (x.shape, x.dtype) for name, x in TENSORS.items()}
  stream_checkpoint(tmp_path / "c", spec, TENSORS.items(), max_shard_bytes=48)
  shards = ["fsync"] * 2 + ["replace"] * 2 + ["fsync"]
  assert done == shards + ["fsync", "replace", "fsync"]


def test_only_temporaries_are_removed(tmp_path):
  mine = [".x.tmp", "x.0123456789ab.tmp", ".x.0123456789aB.tmp", ".lock"]
  for name in mine:
    (tmp_path / name).touch()
  new_files.name_temporary(tmp_path / "x").touch()
  folder = new_files.name_temporary(tmp_path / "y")
  folder.mkdir()
  (folder / "z").touch()
  new_files.name_temporary(tmp_path / "z").symlink_to(tmp_path / ".lock")
  remove_temporaries(tmp_path)
  assert sorted(file.name for file in tmp_path.iterdir()) == sorted(mine)


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_folder_whose_name_is_taken_meanwhile_is_kept(tmp_path, there):
  """It may have taken hours."""
  path = tmp_path / "new"
  said = pytest.raises(ValueError, match="lies in .*: move it")
  with said as told, new_folder(path) as folder:
    replace_text(folder / "x", "mine")
    if there == "file":
      path.write_text("another's")
    else:
      path.mkdir()
      (path / "x").write_text("another's")
  (kept,) = tmp_path.glob(".new.*")
  assert str(kept) in str(told.value)
  assert (kept / "x").read_text() == "mine"
  other = path if there == "file" else path / "x"
  assert other.read_text() == "another's"
