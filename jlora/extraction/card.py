# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's model card: what was lost, and how to load it."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from jlora.checkpoints.documents import read_text
from jlora.checkpoints.hub import locate, model_name, name_apart
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


# PEFT's task -> the class of transformers that loads it, and the Hub's task.
_TASKS = {
  "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
  "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
  "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
  "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
  "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
  "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_PLAIN = ("AutoModel", None)
# Names of models, and of licences, as the Hub takes them.
_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_LICENCE = re.compile(r"^license: *[\"']?([a-z0-9.-]+)[\"']? *$", re.M)


def write_card(
  folder: str | os.PathLike,
  report: Report,
  command: str,
  *,
  loading: str | None = None,
  divergences: Mapping[str, float] | None = None,
) -> None:
  """Writes the adapter's model card, `README.md`, as the Hub takes it.

  The card is for other people: it names checkpoints by Hub id or folder name,
  and holds no path of this machine. The base's licence is in it where the
  base's own card says one.

  Args:
    folder: an existing folder; if it holds an adapter, the card names the base
      as the adapter's configuration does.
    report: the report.
    command: the command line that made the adapter; paths in it are replaced
      by names.
    loading: the code that loads the adapter; None: in PEFT or vLLM.
    divergences: text's name -> KL(finetuned | base + adapter), nats per token,
      where it was measured.

  Example:
    >>> import tempfile
    >>> from jlora.extraction import total_up
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_card(folder, Report({"base": "b", "finetuned": "f"}, [],
    ...                             total_up([], []), []), "jlora ...")
    ...   (Path(folder) / CARD).read_text().splitlines()[:3]
    ['---', 'library_name: peft', 'base_model: "b"']
  """
  paths = {role: report.settings[role] for role in ("base", "finetuned")}
  paths["out"] = os.fspath(folder)
  file = Path(folder) / CONFIG
  config = read_adapter_config(file) if file.exists() else {}
  base = config.get("base_model_name_or_path") or model_name(paths["base"])
  names = name_apart(paths)
  profile, rank = report.settings.get("profile"), config.get("r", 1)
  task = config.get("task_type")
  library = "peft" if loading is None else "jax"
  loading = loading or _loading(profile, base, names["out"], rank, task)
  front = _front(library, base, licence_of(paths["base"]), task)
  made = _rename(command, paths, names)
  measured = _measured(divergences or {})
  text = _card(report, front, base, names, loading, made, measured)
  replace_text(Path(folder) / CARD, text)


def licence_of(base: str | os.PathLike) -> str | None:
  r"""Returns the licence that a checkpoint's own card says, or None.

  Args:
    base: the checkpoint; its card is `README.md` beside its files.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   _ = Path(folder, CARD).write_text("---\nlicense: mit\n---\n# A")
    ...   licence_of(folder)
    'mit'
  """
  try:
    place = locate(base)
    text = read_text((place if place.is_dir() else place.parent) / CARD)
  except ValueError:  # no card, or none that can be read
    return None
  if not text.startswith("---\n"):
    return None
  found = _LICENCE.search(text.split("\n---", 1)[0])
  return found and found[1]


def _front(
  library: str, base: str, licence: str | None, task: str | None
) -> str:
  """Returns the card's front matter, of what is known and valid alone."""
  entries = {
    "library_name": library,
    "base_model": json.dumps(base) if _ID.fullmatch(base) else None,
    "base_model_relation": "adapter" if _ID.fullmatch(base) else None,
    "license": licence,
    "pipeline_tag": _TASKS.get(task or "", _PLAIN)[1],
    "tags": "[lora, jlora]",
  }
  lines = [f"{key}: {value}" for key, value in entries.items() if value]
  return "\n".join(lines)


def _measured(divergences: Mapping[str, float]) -> str:
  """Returns what was measured of the outputs, or that nothing was."""
  if not divergences:
    return (
      "Not measured. The figures above are of the weights: they do not say how"
      " the model behaves."
    )
  rows = [f"| {name} | {kl:.2g} |" for name, kl in divergences.items()]
  return "\n".join(
    [
      "| text | KL(finetuned, base + adapter), nats per token |",
      "| --- | --- |",
      *rows,
    ]
  )


def _card(
  report: Report,
  front: str,
  base: str,
  names: Mapping[str, str],
  loading: str,
  made: str,
  measured: str,
) -> str:
  """Returns the text of the model card."""
  words = [names["out"], *(f"--{x}={names[x]}" for x in ("base", "finetuned"))]
  return f"""---
{front}
---

# LoRA extracted from `{names["finetuned"]}`

{_lead(report)}\
The low-rank part of what a finetune changed in `{base}`. All deltas
together, it misses {report.totals["relative_error"]:.2%} of their norm
({report.totals["energy"]:.2%} of the energy is kept).

## Load it

```{"sh" if loading.startswith("vllm") else "python"}
{loading}
```

## What it loses

```text
{type_table(report)}

{worst_table(report)}

{rounding_line(report)}
{ledger_lines(report)}
```

*rel. error* is the norm of what is missing over that of the change; *energy* is
one minus its square. `{REPORT}` has every module and every tensor.

## Outputs

{measured}

## Verified

{verified_line(report)}

```sh
jlora verify {shlex.join(words)}
```

lets PEFT load it and compares every module with the finetune.

## Made by

```sh
{made}
```

where `{names["base"]}` and `{names["finetuned"]}` are.
"""


# The values that `vllm serve` accepts for --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _loading(
  profile: str | None, base: str, folder: str, rank: int, task: str | None
) -> str:
  """Returns the code that loads an adapter in its consumer."""
  if profile == VLLM.name:
    room = next((r for r in _VLLM_RANKS if r >= rank), rank)
    name = folder.rpartition("/")[2]
    return (
      f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} "
      f"--lora-modules {shlex.quote(f'{name}={folder}')}"
    )
  name, _ = _TASKS.get(task or "", _PLAIN)
  return f"""from peft import PeftModel
from transformers import {name}

base = {name}.from_pretrained({json.dumps(base)})
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
