# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's model card: what was lost, and how to load it."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from jlora.checkpoints.hub import model_name, name_apart
from jlora.checkpoints.new_files import replace_text
from jlora.extraction.coverage import unmatched_line
from jlora.extraction.report import (
  REPORT,
  Report,
  ledger_lines,
  rounding_line,
  type_table,
  verified_line,
  worst_table,
)
from jlora.formats.peft.config import read_adapter_config
from jlora.formats.peft.layouts import CONFIG, VLLM

CARD = "README.md"


def write_card(
  folder: str | os.PathLike,
  report: Report,
  command: str,
  loading: str | None = None,
) -> None:
  """Writes the adapter's model card, `README.md`.

  The card is for other people: it names checkpoints by Hub id or folder name,
  and holds no path of this machine.

  Args:
    folder: an existing folder; if it holds an adapter, the card names the base
      as the adapter's configuration does.
    report: the report.
    command: the command line that made the adapter; paths in it are replaced
      by names.
    loading: the code that loads the adapter; None: in PEFT or vLLM.

  Example:
    >>> import tempfile
    >>> from jlora.extraction import total_up
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_card(folder, Report({"base": "b", "finetuned": "f"}, [],
    ...                             total_up([], []), []), "jlora ...")
    ...   (Path(folder) / CARD).read_text().splitlines()[0]
    '---'
  """
  paths = {role: report.settings[role] for role in ("base", "finetuned")}
  paths["out"] = os.fspath(folder)
  file = Path(folder) / CONFIG
  config = read_adapter_config(file) if file.exists() else {}
  base = config.get("base_model_name_or_path") or model_name(paths["base"])
  names = name_apart(paths)
  profile, rank = report.settings.get("profile"), config.get("r", 1)
  made = _rename(command, paths, names)
  library = "peft" if loading is None else "jax"
  loading = loading or _loading(profile, base, names["out"], rank)
  text = _card(report, base, names, (library, loading), made)
  replace_text(Path(folder) / CARD, text)


def _card(
  report: Report,
  base: str,
  names: Mapping[str, str],
  loading: tuple[str, str],
  made: str,
) -> str:
  """Returns the text of the model card; `loading` is (library, code)."""
  return f"""---
library_name: {loading[0]}
base_model: {json.dumps(base)}
tags: [lora, jlora]
---

# LoRA extracted from `{names["finetuned"]}`

{_lead(report)}\
The low-rank part of what a finetune changed in `{base}`. All deltas
together, it misses {report.totals["relative_error"]:.2%} of their norm
({report.totals["energy"]:.2%} of the energy is kept).

Load it with

```
{loading[1]}
```

It was made, where `{names["base"]}` and `{names["finetuned"]}` are, by

```
{made}
```

```
{type_table(report)}

{worst_table(report)}

{rounding_line(report)}
{ledger_lines(report)}
{verified_line(report)}
```

`{REPORT}` has every module and every tensor.
"""


# The values that `vllm serve` accepts for --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _loading(profile: str | None, base: str, folder: str, rank: int) -> str:
  """Returns the code that loads an adapter in its consumer."""
  if profile == VLLM.name:
    room = next((r for r in _VLLM_RANKS if r >= rank), rank)
    name = folder.rpartition("/")[2]
    return (
      f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} "
      f"--lora-modules {shlex.quote(f'{name}={folder}')}"
    )
  return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(base, {json.dumps(folder)})"""


def _rename(
  command: str, paths: Mapping[str, str], names: Mapping[str, str]
) -> str:
  """Replaces the paths in a command line by names."""
  known = {str(path): names[role] for role, path in paths.items()}
  words = []
  for word in shlex.split(command):
    flag, equals, value = word.partition("=")
    if equals and value in known:
      word = f"{flag}={known[value]}"
    words.append(known.get(word, word))
  return shlex.join(words)


def _lead(report: Report) -> str:
  """Returns the paragraph before all figures: what they leave out."""
  line = unmatched_line(report.totals)
  return f"**{line[0].upper()}{line[1:]}.**\n\n" if line else ""
