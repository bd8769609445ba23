# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, adapter or report at a glance.

  jlora show DIR

Headers and small files are read, tensors are not: a model of any size is shown
at once.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jlora.commands import entry
from jlora.commands.contents import contents_of
from jlora.commands.help import COMMANDS, Command
from jlora.commands.openings import OPENING, define_opening, read_opening
from jlora.extraction.coverage import unmatched_line
from jlora.extraction.report import (
  ledger_lines,
  read_report,
  rounding_line,
  type_table,
  verified_line,
)

_FLAGS = flags.FlagValues()  # apart from those of other commands

_JSON = flags.DEFINE_bool("json", False, "Print JSON.", flag_values=_FLAGS)

_OPENING = define_opening(_FLAGS)

_SHOWN = 8  # modules and notes that are listed


def main(words: Sequence[str]) -> None:
  """Prints what each path holds.

  Args:
    words: paths.

  Raises:
    ValueError: no path, or one that holds nothing that is known.
  """
  if not words:
    raise ValueError(f"a path must be given: {COMMANDS['show'].example}")
  found = [contents_of(word, read_opening(_OPENING)) for word in words]
  if _JSON.value:
    print(json.dumps(found[0] if len(found) == 1 else found))
    return
  print("\n\n".join("\n".join(lines_of(one)) for one in found))


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
  """Formats what was found, for a reader.

  Args:
    found: from `contents_of`.

  Yields:
    Lines.
  """
  yield from _LINES[found["kind"]](found)
  if "merge" in found:
    yield from _merge_lines(found["merge"])
  if "report" in found:
    yield from _report_lines(found)


def _checkpoint_lines(found: Mapping[str, Any]) -> Iterator[str]:
  kind = found["model_type"] or "model type unknown"
  yield f"{found['path']}: {found['format']} checkpoint, {kind}"
  yield _counted(found)
  if len(found["dtypes"]) > 1:
    for name, sums in found["dtypes"].items():
      yield f"  {name}: {_counted(sums)}"
  else:
    yield f"dtype: {', '.join(found['dtypes']) or 'none'}"
  if len(found["components"]) > 1:
    for name, sums in found["components"].items():
      yield f"  {name}: {_counted(sums)}"
  yield "largest:"
  for one in found["largest"]:
    shape = "x".join(map(str, one["shape"])) or "scalar"
    yield f"  {one['name']}  {shape}  {one['dtype']}  {_size(one['bytes'])}"


def _packed_lines(found: Mapping[str, Any]) -> Iterator[str]:
  modules = found["modules"]
  yield (
    f"{found['path']}: packed Loras, {len(modules)} modules, "
    f"{_size(found['bytes'])}"
  )
  for one in modules[:_SHOWN]:
    shape = "x".join(map(str, one["shape"]))
    yield (
      f"  {one['name']}  {shape}  rank {one['rank']}  "
      f"{one['bits']:.1f} bits an entry"
    )
  if len(modules) > _SHOWN:
    yield f"  and {len(modules) - _SHOWN} more; --json has all"


def _adapter_lines(found: Mapping[str, Any]) -> Iterator[str]:
  ranks = found["ranks"]
  span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
  yield f"{found['path']}: {found['peft_type']} adapter, PEFT folder"
  yield f"base: {found['base'] or 'not said'}"
  yield f"rank: {span}"
  targets = found["targets"] or []
  yield (
    "targets: "
    + (targets if isinstance(targets, str) else ", ".join(sorted(targets)))
  )
  if found["whole"]:
    yield f"kept whole: {', '.join(found['whole'])}"
  yield f"{_counted(found)}, {', '.join(found['dtypes'])}"
  made = f"; written for {found['profile']}" if found.get("profile") else ""
  if found["not_for_vllm"]:
    yield f"loads in PEFT, not in vLLM ({found['not_for_vllm'][0]}){made}"
  else:
    yield f"loads in PEFT and in vLLM{made}"


def _report_head(found: Mapping[str, Any]) -> Iterator[str]:
  yield f"{found['path']}: report of an extraction"


def _report_lines(found: Mapping[str, Any]) -> Iterator[str]:
  path = Path(found["path"])
  report = read_report(path if path.is_dir() else path.parent)
  yield ""
  settings = report.settings
  yield f"extracted: {settings.get('finetuned')} minus {settings.get('base')}"
  yield ""
  if line := unmatched_line(report.totals):
    yield line
    yield ""
  yield type_table(report)
  yield ""
  yield rounding_line(report)
  yield ledger_lines(report)
  yield verified_line(report)


def _merge_head(found: Mapping[str, Any]) -> Iterator[str]:
  yield f"{found['path']}: report of a merge"


def _merge_lines(merge: Mapping[str, Any]) -> Iterator[str]:
  settings = merge.get("settings", {})
  inputs = [
    one["model"]
    for part in settings.get("slices", [])
    for one in part.get("inputs", [])
  ]
  base = settings.get("base")
  on = f" on {base}" if base else ""
  models = ", ".join(dict.fromkeys(inputs))
  yield f"merged by {settings.get('method')} from {models}{on}"
  notes = merge.get("notes", [])
  yield from (f"  {note}" for note in notes[:_SHOWN])
  if len(notes) > _SHOWN:
    yield f"  and {len(notes) - _SHOWN} more notes; --json has all"


_LINES = {
  "checkpoint": _checkpoint_lines,
  "packed": _packed_lines,
  "adapter": _adapter_lines,
  "report": _report_head,
  "merge": _merge_head,
}


def _counted(sums: Mapping[str, int]) -> str:
  return (
    f"{sums['tensors']} tensors, {sums['parameters']:,} parameters, "
    f"{_size(sums['bytes'])}"
  )


def _size(count: int) -> str:
  if count < 2**20:
    return f"{count / 2**10:.1f} KiB"
  return f"{count / 2**20:,.1f} MiB"


COMMAND = Command(
  "show",
  main,
  _FLAGS,
  required=(),
  groups={"Input": OPENING, "Output": {"json": ""}},
  more="The path is a safetensors or GGUF file, a Hugging Face folder, a "
  "pipeline's folder, a Hub id that was downloaded, an orbax directory, a PEFT "
  "adapter, a file of packed Loras, or a report.json; other adapters are for "
  "`jlora adapter show`. Tensors are not read.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
