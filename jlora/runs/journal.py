# SPDX-License-Identifier: Apache-2.0
"""Keeps a long run's finished modules on disk, so that it can be resumed.

There is one file a module, put in place whole, with the module's arrays and, in
its header, its record as JSON and checksums of both. A fingerprint of inputs
and options makes sure that a resumed run is the same run.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints.byte_ranges import place_arrays
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.checksums import as_text
from jlora.checkpoints.documents import read_object
from jlora.checkpoints.new_files import move, remove_temporaries, replace_text
from jlora.checkpoints.safetensors import lay_out_file
from jlora.messages import name_some
from jlora.runs.lock import LOCK

FOLDER = ".journal"
_DONE = ".journal-done"
_HEADER = "run.json"
_MOST = 2**26  # bytes of a header that is read


class Journal(Mapping[str, dict[str, Any]]):
  """The finished modules of a run, path -> record; arrays are read on demand.

  An entry that was there before is read once, whole: what it says must fit its
  checksums.

  Args:
    folder: where the entries lie.
    is_new: whether to ignore existing entries, as one of several processes that
      only adds its own.

  Attributes:
    folder: where the entries lie.

  Raises:
    ValueError: a damaged entry.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as out:
    ...   journal = open_journal(out, {"rank": 64})
    ...   journal.put("q", {"a": np.ones(2)}, {"rank": 1})
    ...   again = open_journal(out, {"rank": 64}, resume=True)
    ...   again["q"], again.arrays("q")["a"].tolist()
    ({'rank': 1}, [1.0, 1.0])
  """

  def __init__(self, folder: Path, *, is_new: bool = False):
    self.folder = folder
    self._records: dict[str, dict[str, Any]] = {}
    for file in [] if is_new else _entries(folder):
      self._take(file)

  def _take(self, file: Path) -> None:
    """Reads an entry and keeps its record, if all of it is as it was put."""
    try:
      stored = open_checkpoint(file)
      text, said = stored.metadata["entry"], stored.metadata["checksum"]
      if said != _checksum(text, stored):
        raise ValueError("it was changed since it was written")
      entry = json.loads(text)
      path, record = entry["path"], entry["record"]
      if not (isinstance(path, str) and isinstance(record, dict)):
        raise ValueError("it holds no path and record")
      if self._file(path) != file:
        raise ValueError("it is another module's")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(
        f"{file} is no entry of a journal ({error}). Remove it to do its "
        "module again."
      ) from error
    self._records[path] = record

  def __getitem__(self, path: str) -> dict[str, Any]:
    return self._records[path]

  def __iter__(self) -> Iterator[str]:
    return iter(self._records)

  def __len__(self) -> int:
    return len(self._records)

  def put(
    self, path: str, arrays: Mapping[str, np.ndarray], record: dict[str, Any]
  ) -> None:
    """Adds a finished module, atomically.

    Args:
      path: the module.
      arrays: what it produced.
      record: anything that JSON can hold.
    """
    entry = json.dumps({"path": path, "record": record}, sort_keys=True)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    metadata = {"entry": entry, "checksum": _checksum(entry, arrays)}
    spec = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    file = self._file(path)
    # The folder is not synced each time: a name that is lost in a power failure
    # is a module that is done again.
    place_arrays({file: lay_out_file(file, spec, metadata)}, arrays.items())
    self._records[path] = record

  def find(self, path: str) -> bool:
    """Returns whether a module is finished, here or by another process.

    Args:
      path: the module.

    Returns:
      bool. If True, its record is in this journal from now on.
    """
    if path not in self._records and self._file(path).exists():
      self._take(self._file(path))
    return path in self._records

  def arrays(self, path: str) -> Mapping[str, np.ndarray]:
    """Opens the arrays of a finished module; they are read on demand.

    Args:
      path: the module.

    Returns:
      A lazy mapping from name to array.
    """
    return open_checkpoint(self._file(path))

  def close(self) -> None:
    """Removes the journal once the run's results are in place."""
    done = self.folder.with_name(_DONE)
    move(self.folder, done)
    shutil.rmtree(done)

  def _file(self, path: str) -> Path:
    """Returns the file of a module."""
    return (
      self.folder / f"{hashlib.sha256(path.encode()).hexdigest()}.safetensors"
    )


def open_journal(
  out: str | os.PathLike,
  fingerprint: Mapping[str, Any],
  *,
  resume: bool = False,
) -> Journal:
  """Opens the journal of a run in its output folder, or begins one.

  Args:
    out: the run's output folder; the journal lies inside.
    fingerprint: inputs and options of the run, as JSON values; runs with the
      same fingerprint give the same bytes.
    resume: whether to go on with a journal that is there.

  Returns:
    Journal.

  Raises:
    ValueError: a journal is there and `resume` is False, it is damaged, or it
      belongs to another run; up to three differing options are named with both
      values.
  """
  return Journal(begin_journal(out, fingerprint, resume=resume))


def begin_journal(
  out: str | os.PathLike,
  fingerprint: Mapping[str, Any],
  *,
  resume: bool = False,
) -> Path:
  """Creates or checks the folder of a run's journal, without reading entries.

  Args:
    out: as for `open_journal`.
    fingerprint: as for `open_journal`.
    resume: as for `open_journal`.

  Returns:
    The folder.

  Raises:
    ValueError: as `open_journal`, except for damaged entries.
  """
  folder = Path(out) / FOLDER
  wanted = json.loads(json.dumps(fingerprint))
  header = folder / _HEADER
  check_no_link(folder)
  if header.exists():
    if not resume:
      raise ValueError(
        f"{out} holds the journal of an unfinished run. Use resume=True to "
        "continue, overwrite=True to replace, or another out."
      )
    check_settings(folder, _read_header(header), wanted)
  elif entries := _entries(folder):
    raise ValueError(
      f"{folder} has {len(entries)} entries but no {_HEADER}: nothing tells "
      "which run they are of. Remove it."
    )
  else:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(header, json.dumps(wanted, sort_keys=True, indent=2))
  return folder


def remove_leftovers(out: Path) -> None:
  """Removes what killed runs have left half written or half removed.

  Args:
    out: the run's output folder, which is held by this run.

  Raises:
    ValueError: the journal is a link.
  """
  for name in (FOLDER, _DONE):
    check_no_link(out / name)
  shutil.rmtree(out / _DONE, ignore_errors=True)
  remove_temporaries(out)
  if (out / FOLDER).is_dir():
    remove_temporaries(out / FOLDER)


def check_no_link(folder: Path) -> None:
  """Raises if a folder of a run is a link: nothing is written through one.

  Args:
    folder: inside the run's output folder.

  Raises:
    ValueError: it is a link.

  Example:
    >>> check_no_link(Path("/nowhere"))
  """
  if folder.is_symlink():
    raise ValueError(f"{folder} is a link to {os.readlink(folder)}; remove it.")


def check_folder(
  out: Path, finished: str, *, resume: bool, overwrite: bool
) -> None:
  """Raises unless a run may write into a folder; removes one to overwrite.

  Args:
    out: the folder, held by this run.
    finished: the file that marks a finished run; it and the journal are removed
      to overwrite.
    resume: whether to go on with a run whose journal is there.
    overwrite: whether files may be replaced.

  Raises:
    ValueError: a folder that is not empty.
  """
  if resume and (out / FOLDER).exists():
    return
  if overwrite:
    (out / finished).unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    return
  found = sorted(file.name for file in out.iterdir() if file.name != LOCK)
  if found:
    way = "" if resume else "resume=True to continue, "
    lack = " and has no run to resume" if resume else ""
    raise ValueError(
      f"{out} is not empty ({name_some(found)}){lack}. Use {way}overwrite=True "
      "to replace, or another out."
    )


def check_settings(
  folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises unless a journal belongs to the run that wants it.

  Args:
    folder: the journal, for the error.
    found: the fingerprint it was begun with.
    wanted: the fingerprint of the run.

  Raises:
    ValueError: names up to three options with both values.

  Example:
    >>> check_settings(Path("out"), {"rank": 8}, {"rank": 64})
    Traceback (most recent call last):
    ...
    ValueError: out belongs to another run: rank was 8, is 64. Use the same
    options, or another output folder.
  """
  differing = [
    f"{name} was {found.get(name)}, is {wanted.get(name)}"
    for name in sorted({*found, *wanted})
    if found.get(name) != wanted.get(name)
  ]
  if differing:
    raise ValueError(
      f"{folder} belongs to another run: {name_some(differing)}. "
      "Use the same options, or another output folder."
    )


def _entries(folder: Path) -> list[Path]:
  """Lists the files of a journal's entries."""
  return sorted(folder.glob("*.safetensors"))


def _read_header(header: Path) -> dict[str, Any]:
  """Reads the fingerprint of a journal."""
  try:
    return read_object(header, largest=_MOST)
  except ValueError as error:
    raise ValueError(
      f"{header} is no JSON of a run: {error}. Remove {header.parent} and "
      "begin again."
    ) from error


def _checksum(entry: str, arrays: Mapping[str, np.ndarray]) -> str:
  """Returns a checksum of an entry's record and of all its arrays."""
  whole = zlib.crc32(entry.encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    about = f"{name} {array.dtype} {array.shape}"
    whole = zlib.crc32(about.encode(), whole)
    whole = zlib.crc32(array.reshape(-1).view(np.uint8).data, whole)
  return as_text(whole)
