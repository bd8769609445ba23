# SPDX-License-Identifier: Apache-2.0
"""The journal: what was put is there again, whole, for the same run only."""

import os
import zlib

import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.safetensors import write_safetensors
from jlora.runs.journal import (
  FOLDER,
  Journal,
  begin_journal,
  check_folder,
  open_journal,
  remove_leftovers,
)
from jlora.runs.lock import LOCK
from tests.helpers.small_pairs import draw

RUN = {"rank": 64, "dtype": "float32"}
PATHS = ("model.layers.0.q.weight", "layers/0/../q", "ключ " * 60)
RECORD = {"status": "extracted", "figures": {"errors": [1.0, 1e-30]}}


def arrays(path):
  return {
    "a": draw(2, 3, seed=len(path)),
    "b": draw(2, 5, seed=len(path)).astype(ml_dtypes.bfloat16),
  }


@pytest.fixture
def filled(tmp_path):
  journal = open_journal(tmp_path, RUN)
  for path in PATHS:
    journal.put(path, arrays(path), RECORD | {"why": path})
  return journal


def resume(tmp_path, run=RUN):
  return open_journal(tmp_path, run, resume=True)


def only_entry(journal):
  (file,) = journal.folder.glob("*.safetensors")
  return file


def test_what_was_put_is_there_again(filled, tmp_path):
  again = resume(tmp_path)
  assert sorted(again) == sorted(PATHS)
  assert dict(again) == dict(filled)
  for path in PATHS:
    assert again[path] == RECORD | {"why": path}
    stored = again.arrays(path)
    assert stored.keys() == {"a", "b"}
    for name, array in arrays(path).items():
      assert stored[name].dtype == array.dtype
      np.testing.assert_array_equal(stored[name], array)


def test_a_module_without_arrays_is_an_entry(tmp_path):
  open_journal(tmp_path, RUN).put("norm", {}, {"status": "unchanged"})
  again = resume(tmp_path)
  assert again["norm"] == {"status": "unchanged"}
  assert not again.arrays("norm")


def test_the_later_of_two_entries_stays(filled, tmp_path):
  filled.put(PATHS[0], {"a": np.zeros(1)}, {"status": "later"})
  again = resume(tmp_path)
  assert len(again) == len(PATHS)
  assert again[PATHS[0]] == filled[PATHS[0]] == {"status": "later"}
  assert again.arrays(PATHS[0])["a"].shape == (1,)


def test_a_journal_is_not_taken_up_unasked(filled, tmp_path):
  with pytest.raises(ValueError, match="unfinished run. Use resume=True"):
    open_journal(tmp_path, RUN)
  assert len(resume(tmp_path)) == len(PATHS)


def test_nothing_to_resume_is_an_empty_journal(tmp_path):
  assert not resume(tmp_path / "new")
  assert (tmp_path / "new" / FOLDER).is_dir()


@pytest.mark.parametrize(
  ("other", "message"),
  [
    ({"rank": 8}, "rank was 64, is 8"),
    ({"key": [0, 1]}, r"key was None, is \[0, 1\]"),
    (
      {"rank": 8, "dtype": "bfloat16"},
      "dtype was float32, is bfloat16, rank was 64, is 8",
    ),
    (
      {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
      "a was None, is 1, b was None, is 2, c was None, is 3 and 2 more",
    ),
  ],
)
def test_options_of_another_run_are_named(filled, tmp_path, other, message):
  del filled
  with pytest.raises(ValueError, match=f"another run: {message}. Use the same"):
    resume(tmp_path, RUN | other)
  assert len(resume(tmp_path)) == len(PATHS)


def test_tuples_of_a_fingerprint_are_lists_on_disk(tmp_path):
  open_journal(tmp_path, {"shape": (1, 2)})
  assert not resume(tmp_path, {"shape": (1, 2)})


def test_a_file_being_written_is_no_entry(filled, tmp_path):
  """The writer's own temporary names, as SIGKILL leaves them."""
  whole = next(filled.folder.glob("*.safetensors"))
  left = whole.with_name(f".{whole.name}.0123456789ab.tmp")
  left.write_bytes(whole.read_bytes()[:20])
  assert len(resume(tmp_path)) == len(PATHS)
  resume(tmp_path).close()
  assert not list(tmp_path.iterdir())


def test_a_header_being_written_is_no_journal(tmp_path):
  (tmp_path / FOLDER).mkdir()
  (tmp_path / FOLDER / ".run.json.0123456789ab.tmp").write_text('{"rank"')
  assert not open_journal(tmp_path, RUN)
  with pytest.raises(ValueError, match="rank was 64, is 8"):
    resume(tmp_path, {**RUN, "rank": 8})


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_truncated_entry_is_named_with_the_way_out(tmp_path, left):
  journal = open_journal(tmp_path, RUN)
  journal.put("q", arrays("q"), RECORD)
  file = only_entry(journal)
  file.write_bytes(file.read_bytes()[:left])
  with pytest.raises(ValueError, match="Remove it to do its module") as error:
    resume(tmp_path)
  assert str(file) in str(error.value)
  file.unlink()
  assert not resume(tmp_path)


# What the header of an entry may say instead; its checksum fits all but two.
STRANGERS = {
  "nothing": None,
  "no JSON": "no JSON",
  "null": "null",
  "a list": "[]",
  "no path": "{}",
  "no record": '{"path": "q", "record": null}',
  "a number as the path": '{"path": 3, "record": {}}',
  "another path": '{"path": "k", "record": {}}',
  "deep": "[" * 100000,
}


@pytest.mark.parametrize("entry", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_among_the_entries_is_named(tmp_path, entry):
  journal = open_journal(tmp_path, RUN)
  journal.put("q", {}, RECORD)
  file = only_entry(journal)
  header = {} if entry is None else {"entry": entry}
  if entry is not None:
    header["checksum"] = f"{zlib.crc32(entry.encode()):08x}"
  write_safetensors(file, {}, header)
  with pytest.raises(ValueError, match=f"{file.name} is no entry"):
    resume(tmp_path)


def test_any_flipped_bit_of_an_entry_is_noticed(tmp_path):
  """In its header, in its record, in its arrays."""
  journal = open_journal(tmp_path, RUN)
  journal.put("q", {"a": draw(2, 3)}, RECORD)
  file = only_entry(journal)
  whole = file.read_bytes()
  for at in range(len(whole)):
    changed = bytearray(whole)
    changed[at] ^= 1
    file.write_bytes(changed)
    with pytest.raises(ValueError, match="Remove it to do its module again"):
      resume(tmp_path)
  file.write_bytes(whole)
  assert len(resume(tmp_path)) == 1


def test_arrays_of_two_entries_are_not_exchanged(tmp_path):
  journal = open_journal(tmp_path, RUN)
  files = {}
  for path in "qk":
    journal.put(path, {"a": draw(2, 3, seed=ord(path))}, RECORD)
    files[path] = {*journal.folder.glob("*.safetensors")} - {*files.values()}
    (files[path],) = files[path]
  files["q"].write_bytes(files["k"].read_bytes())
  with pytest.raises(ValueError, match="it is another module's"):
    resume(tmp_path)


@pytest.mark.parametrize(
  "text", ['{"rank": ', "[]", "null", "[" * 100000, "\ud800"]
)
def test_a_broken_header_is_named(filled, tmp_path, text):
  file = filled.folder / "run.json"
  file.write_bytes(text.encode(errors="surrogatepass"))
  with pytest.raises(ValueError, match=r"run.json is no JSON.*[Rr]emove"):
    resume(tmp_path)


def test_a_pipe_is_no_header(filled, tmp_path):
  (filled.folder / "run.json").unlink()
  os.mkfifo(filled.folder / "run.json")
  with pytest.raises(ValueError, match=r"run.json is no JSON.*regular file"):
    resume(tmp_path)


@pytest.mark.parametrize("name", [FOLDER, ".journal-done"])
def test_a_journal_that_is_a_link_is_refused(tmp_path, name):
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "x").touch()
  out = tmp_path / "out"
  out.mkdir()
  (out / name).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(ValueError, match=f"{name} is a link to .*remove it"):
    remove_leftovers(out)
  if name == FOLDER:
    with pytest.raises(ValueError, match="is a link"):
      open_journal(out, RUN, resume=True)
  assert (tmp_path / "elsewhere" / "x").exists()


def test_a_lock_alone_is_an_empty_folder(tmp_path):
  (tmp_path / LOCK).touch()
  check_folder(tmp_path, "x", resume=False, overwrite=False)
  (tmp_path / "x").touch()
  with pytest.raises(ValueError, match=r"is not empty \(x\)"):
    check_folder(tmp_path, "x", resume=False, overwrite=False)


def test_entries_without_a_header_belong_to_no_run(filled, tmp_path):
  (filled.folder / "run.json").unlink()
  with pytest.raises(ValueError, match=r"3 entries but no run.json"):
    resume(tmp_path)


def test_close_leaves_nothing(filled, tmp_path):
  filled.close()
  assert not list(tmp_path.iterdir())
  assert not open_journal(tmp_path, {"rank": 1})


def test_a_killed_close_is_finished(filled, tmp_path, monkeypatch):
  monkeypatch.setattr("jlora.runs.journal.shutil.rmtree", lambda *_, **__: None)
  filled.close()
  monkeypatch.undo()
  assert not (tmp_path / FOLDER).exists()
  assert list(tmp_path.iterdir())
  remove_leftovers(tmp_path)
  assert not list(tmp_path.iterdir())


def test_entries_of_another_process_are_found(filled, tmp_path):
  others = Journal(begin_journal(tmp_path, RUN, resume=True), is_new=True)
  assert not others
  assert others.find(PATHS[1])
  assert dict(others) == {PATHS[1]: filled[PATHS[1]]}
  assert not others.find("not there")
  others.put("mine", {}, {})
  assert not len(filled) > len(PATHS)
  assert filled.find("mine")
