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
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.new_files import check_new, new_folder, replace_text
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.checkpoints.sources import check_apart
from jlora.commands import entry
from jlora.commands.caches import keep_compilations
from jlora.commands.help import COMMANDS, Command
from jlora.extraction.ported_adapters import Ported, port_adapter
from jlora.extraction.porting import add, both_parts, project, rotate
from jlora.factoring.factorisers import krylov, svd
from jlora.formats.peft.reading import PeftAdapter, load_peft
from jlora.formats.peft.writing import save_peft
from jlora.messages import name_some

_METHODS = {one.__name__: one for one in (add, project, both_parts, rotate)}
_REPORT = "port.json"

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
  "Folder of the new adapter; must not exist.",
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
      tensors, or that does not fit one of the bases. Nothing is then written.
  """
  if len(words) != 1:
    raise ValueError(f"one adapter must be given: {COMMANDS['port'].example}")
  keep_compilations(_CACHE.value)
  source, target = (open_checkpoint(one.value) for one in (_FROM, _TO))
  for checkpoint in (source, target):
    check_dequantised(checkpoint)
  out = Path(_OUT.value)
  check_new(out)
  check_apart(out, [source, target])
  adapter = load_peft(words[0], like=source.spec, config=source.config)
  _check_whole(words[0], adapter, source)
  ported = port_adapter(
    adapter.loras,
    source,
    target,
    method=_METHODS[_METHOD.value],
    k=_K.value,
    keep=_KEEP.value,
    factor=svd if _K.value is None else krylov,
  )
  if not ported.loras:
    raise ValueError(
      f"Of no module a share of {_KEEP.value} is kept, so that nothing is left "
      "to write; lower --keep."
    )
  report = _write(out, words[0], adapter, ported, target)
  if _JSON.value:
    print(json.dumps(report))
    return
  for line in _lines(report):
    print(line)
  print(f"written: {out}")


def _check_whole(folder: str, adapter: PeftAdapter, source: Checkpoint) -> None:
  """Raises if an adapter holds what is no change of its base."""
  own = [  # PEFT stores an embedding's table beside its Lora
    path
    for path, value in adapter.full.items()
    if path not in source or not np.array_equal(source[path], value)
  ]
  if own:
    raise ValueError(
      f"{folder} stores {len(own)} whole tensors (modules_to_save): "
      f"{name_some(own)}; on another base they would undo its update. Extract "
      "the adapter anew, without them."
    )
  if not adapter.loras:
    raise ValueError(f"{folder} holds no Loras.")


def _write(
  out: Path,
  folder: str,
  adapter: PeftAdapter,
  ported: Ported,
  target: Checkpoint,
) -> dict[str, Any]:
  """Writes the adapter and port.json, which it returns; whole or not at all."""
  first = next(iter(adapter.loras.values()))
  with new_folder(out) as partial:
    left = save_peft(
      partial,
      ported.loras,
      like=target.spec,
      biases=adapter.biases or None,
      dtype=first.a.dtype,
      base_model=_BASE_MODEL.value or str(target.path),
      task_type="auto",
      config=target.config,
    )
    report = _report(folder, ported, left)
    replace_text(partial / _REPORT, json.dumps(report, indent=2) + "\n")
  return report


def _report(
  folder: str, ported: Ported, left: Mapping[str, str]
) -> dict[str, Any]:
  """Returns what port.json says."""
  return {
    "adapter": folder,
    "source": _FROM.value,
    "target": _TO.value,
    "method": _METHOD.value,
    "keep": _KEEP.value,
    "modules": ported.rows,
    "left_out": ported.left_out,
    "not_representable": dict(left),
  }


def _lines(report: Mapping[str, Any]) -> list[str]:
  """Formats the figures of all modules together, and what is left out."""
  rows = report["modules"]
  found = [f"{len(rows)} modules by {report['method']}"]
  for name in ("kept", "drift", "read_alike", "write_alike"):
    values = [row[name] for row in rows.values() if row[name] == row[name]]
    if values:
      lowest, highest = min(values), max(values)
      found.append(
        f"{name}: median {statistics.median(values):.3f}, "
        f"{lowest:.3f} to {highest:.3f}"
      )
  for name, paths in (
    ("left out, too little is kept", report["left_out"]),
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
    "Input": {"from": "DIR", "to": "DIR"},
    "Method": {"method": "", "k": "N", "keep": "X"},
    "Output": {"out": "DIR", "base_model": "NAME", "json": ""},
    "Run": {"cache": "DIR"},
  },
  more="The adapter is a PEFT folder; both bases have the same shapes. `add` "
  "costs nothing and is the baseline. Weights do not tell how a model behaves: "
  "measure the result. port.json has the figures of each module.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
