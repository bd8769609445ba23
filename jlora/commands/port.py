# SPDX-License-Identifier: Apache-2.0
"""An adapter carried from the base it was made on to an updated one.

  jlora port ADAPTER --from=OLD --to=NEW --out=DIR

Weights alone are read: what the figures say is how far the bases are apart and
what a method kept, not how the model behaves: measure that before use.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jlora.checkpoints.documents import (
  NULL,
  TEXT,
  check_fields,
  either,
  read_object,
)
from jlora.commands import entry
from jlora.commands.caches import keep_compilations
from jlora.commands.help import COMMANDS, Command
from jlora.extraction.port_run import port_checkpoint
from jlora.extraction.porting import add, both_parts, project, rotate
from jlora.messages import name_some

_METHODS = {one.__name__: one for one in (add, project, both_parts, rotate)}

_FLAGS = flags.FlagValues()  # apart from those of other commands

_FROM = flags.DEFINE_string(
  "from",
  None,
  "The base that the adapter was made on.",
  required=True,
  flag_values=_FLAGS,
)
_TO = flags.DEFINE_string(
  "to", None, "The base that it is for.", required=True, flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder of the new adapter, new or empty.",
  required=True,
  flag_values=_FLAGS,
)
_METHOD = flags.DEFINE_enum(
  "method",
  "add",
  list(_METHODS),
  "add takes the change as it is; the others move or cut it by the leading "
  "singular spaces of both bases.",
  flag_values=_FLAGS,
)
_K = flags.DEFINE_integer(
  "k",
  None,
  "Leading singular vectors of a space; all by default, which makes project "
  "nearly what add is.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_KEEP = flags.DEFINE_float(
  "keep",
  0.0,
  "Leave out modules of whose change less than this share is kept.",
  lower_bound=0.0,
  upper_bound=1.0,
  flag_values=_FLAGS,
)
_MAP = flags.DEFINE_string(
  "map",
  None,
  "JSON file {name in the old base: name in the new one, or null}; a name that "
  'ends in "." stands for all in it, as "model.layers.5.": "model.layers.6.".',
  flag_values=_FLAGS,
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Go on with an unfinished run in --out.", flag_values=_FLAGS
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace what is in --out.", flag_values=_FLAGS
)
_BASE_MODEL = flags.DEFINE_string(
  "base_model",
  None,
  "Name of the new base for adapter_config.json; its path by default.",
  flag_values=_FLAGS,
)
_JSON = flags.DEFINE_bool("json", False, "Print port.json.", flag_values=_FLAGS)
_CACHE = flags.DEFINE_string(
  "cache",
  None,
  "Folder of compiled programs; ~/.cache/jlora by default.",
  flag_values=_FLAGS,
)


def main(words: Sequence[str]) -> None:
  """Carries an adapter over, writes it and prints what the weights say.

  Args:
    words: the adapter's folder.

  Raises:
    ValueError: not one folder, one that cannot be read, that stores whole
      tensors, or that does not fit one of the bases, or a folder to write to
      that is not empty.
  """
  if len(words) != 1:
    raise ValueError(f"one adapter must be given: {COMMANDS['port'].example}")
  keep_compilations(_CACHE.value)
  report = port_checkpoint(
    words[0],
    _FROM.value,
    _TO.value,
    _OUT.value,
    method=_METHODS[_METHOD.value],
    k=_K.value,
    keep=_KEEP.value,
    paths=None if _MAP.value is None else _read_map(_MAP.value),
    base_model=_BASE_MODEL.value,
    resume=_RESUME.value,
    overwrite=_OVERWRITE.value,
  )
  if _JSON.value:
    print(json.dumps(report))
    return
  for line in _lines(report):
    print(line)
  print(f"written: {_OUT.value}")


def _read_map(file: str) -> dict[str, str | None]:
  """Reads a map of paths."""
  found = read_object(file)
  kinds = dict.fromkeys(found, either(TEXT, NULL))
  return check_fields(found, kinds, file)


def _lines(report: Mapping[str, Any]) -> list[str]:
  """Formats the figures of all modules together, and what is left out."""
  rows = report["modules"]
  carried = sum(row["is_kept"] for row in rows.values())
  found = [f"{carried} of {len(rows)} modules carried by {report['method']}"]
  for name in ("kept", "drift", "read_alike", "write_alike"):
    values = [row[name] for row in rows.values() if row[name] == row[name]]
    if values:
      lowest, highest = min(values), max(values)
      found.append(
        f"{name}: median {statistics.median(values):.3f}, "
        f"{lowest:.3f} to {highest:.3f}"
      )
  for to, row in rows.items():
    if "carried_rows" in row:
      found.append(
        f"{to}: rows matched, {row['carried_rows']} carried, "
        f"{row['new_rows']} new, {row['lost_rows']} changed ones lost"
      )
  for name, paths in (
    ("left out, too little is kept", report["left_out"]),
    ("left out by the map", report["unmapped"]),
    ("not representable", report["not_representable"]),
  ):
    if paths:
      found.append(f"{name}: {len(paths)}, {name_some(paths)}")
  return found


COMMAND = Command(
  "port",
  main,
  _FLAGS,
  required=("from", "to", "out"),
  groups={
    "Input": {"from": "DIR", "to": "DIR", "map": "FILE"},
    "Method": {"method": "", "k": "N", "keep": "X"},
    "Output": {"out": "DIR", "base_model": "NAME", "json": ""},
    "Run": {"resume": "", "overwrite": "", "cache": "DIR"},
  },
  more="The adapter is a PEFT folder; both bases have the same shapes, but for "
  "vocabularies: rows are matched by tokens of both tokenizers. `add` costs "
  "nothing and is the baseline. Weights do not tell how a model behaves: "
  "measure the result. port.json has the figures of each module.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
