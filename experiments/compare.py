# SPDX-License-Identifier: Apache-2.0
"""What does a LoRA extracted from a finetune lose, and which rank does it need?

  python -m experiments.compare --base=DIR --finetuned=DIR --out=DIR
  python -m experiments.compare --redraw=DIR [--chosen=16]
  python -m experiments.compare --redraw=DIR --study_json=FILE

Extracts once at --rank, of which all lower ranks are cuts; measures the KL
divergence of the logits at --ranks on held-out texts and, with --generate=N,
how alike generated texts are. Writes the adapter, `report.json`,
`results.json`, PNG figures and one self-contained `report.html`; the figures
and the page are redrawn from the two JSON files alone with --redraw.

Rank 512 of SmolLM2-135M takes 6 minutes of processor time with --generate=16,
one of them for the extraction, which is resumed if it was interrupted; the
adapter in the folder has the highest rank and is not needed to redraw. Expect a
relative error that falls slowly with rank, and a divergence that falls fast.
"""

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import jlora
from experiments.lib.data import texts
from experiments.lib.figures import pages, study, summaries, tables
from experiments.lib.measures import logit_curves, samples
from jlora import extraction, models
from jlora.commands import keep_compilations

_BASE = flags.DEFINE_string("base", None, "The base model's folder.")
_FINETUNED = flags.DEFINE_string("finetuned", None, "The finetune's folder.")
_OUT = flags.DEFINE_string("out", None, "The output folder, new or empty.")
_REDRAW = flags.DEFINE_string(
  "redraw", None, "Only draw again: a folder with report.json."
)
_RANK = flags.DEFINE_integer(
  "rank", 512, "The highest rank, at which all is factored.", lower_bound=1
)
_CHOSEN = flags.DEFINE_integer(
  "chosen", None, "The rank that is shown; 64, or --rank if that is less.",
  lower_bound=1,
)  # fmt: skip
_RANKS = flags.DEFINE_list(
  "ranks",
  None,
  "Ranks at which logits are compared; 8, 16, 32, ... up to --rank, and "
  "--chosen.",
)
_TEXTS = flags.DEFINE_list(
  "texts",
  ["kjv", "pydoc"],
  "Texts for the logits: kjv (the King James Bible), pydoc (Python's help), of "
  "both the last tenth, or UTF-8 files, whole. Empty: weights alone.",
)
_SEQUENCES = flags.DEFINE_integer(
  "sequences", 8, "Stretches of each text.", lower_bound=2
)
_LENGTH = flags.DEFINE_integer(
  "length", 128, "Tokens of a stretch.", lower_bound=2
)
_GENERATE = flags.DEFINE_integer(
  "generate", 0, "Prompts, from the first text, that are continued.", 0
)
_STEPS = flags.DEFINE_integer(
  "steps", 64, "Tokens generated after each prompt.", lower_bound=1
)
_TEMPERATURES = flags.DEFINE_list(
  "temperatures", ["0", "1"], "Of the generated texts; 0 is greedy."
)
_CACHE = flags.DEFINE_string(
  "cache", None, "Folder of texts and compiled programs; ~/.cache/jlora."
)

_STUDY_JSON = flags.DEFINE_string(
  "study_json",
  None,
  "A file to write too: {matrix: {loss: {mse, cosine_distance}, "
  "mean_diff_value, diff_rank}}, as the study's own script has it.",
)

_STANDARD = (8, 16, 32, 64, 128, 256, 512, 1024)
_SHOWN = 64
_PROMPT = 32  # tokens


def main(argv: list[str]) -> None:
  """Compares or redraws; bad input gives one message and exit code 1."""
  try:
    if len(argv) > 1:
      raise ValueError(f"only flags are taken, got {' '.join(argv[1:])}")
    _check_study_json()
    keep_compilations(_CACHE.value)
    shown, results, files = pages.draw_all(_run(), _CHOSEN.value)
    if _STUDY_JSON.value:
      study.write_study(_STUDY_JSON.value, shown)
      files = [*files, Path(_STUDY_JSON.value)]
    _say(shown, results, files)
  except (ValueError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


def _check_study_json() -> None:
  """Raises, before anything is computed, if the study's file has no place."""
  if not _STUDY_JSON.value:
    return
  file = Path(_STUDY_JSON.value)
  own = Path(_OUT.value or _REDRAW.value or "") / pages.RESULTS
  if file.absolute() == own.absolute():
    raise ValueError(
      f"--study_json={file} is this comparison's own file; name another."
    )
  if not file.absolute().parent.is_dir():
    raise ValueError(f"--study_json={file}: make its folder first.")


def _run() -> str:
  """Compares, unless it only redraws; returns the folder to draw in."""
  folders = [flag.value or "" for flag in (_BASE, _FINETUNED, _OUT)]
  if _REDRAW.value:
    if any(folders):
      raise ValueError("--redraw takes no --base, --finetuned or --out.")
    return _REDRAW.value
  if not all(folders):
    raise ValueError(
      "--base, --finetuned and --out are needed, or --redraw of a finished run."
    )
  _compare(*folders)
  return folders[-1]


def _ranks() -> tuple[int, list[int]]:
  """Returns the chosen rank and those of the curves, none above --rank."""
  top = _RANK.value
  chosen = _CHOSEN.value or min(_SHOWN, top)
  usual = [rank for rank in _STANDARD if rank <= top]
  wanted = list(map(int, _RANKS.value)) if _RANKS.value else usual
  ranks = sorted({*wanted, chosen})
  if ranks[-1] > top or ranks[0] < 1:
    wrong = ranks[-1] if ranks[-1] > top else ranks[0]
    raise ValueError(
      f"rank {wrong} was asked for, ranks are 1 to --rank={top}; raise --rank "
      "or ask for less."
    )
  return chosen, ranks


def _compare(base: str, finetuned: str, out: str) -> None:
  """Extracts, measures, and writes report.json and results.json."""
  chosen, ranks = _ranks()
  tokens, prompts = _read_texts(base)
  pair = None
  if tokens:  # fails before the extraction, which takes longest
    pair = logit_curves.load_pair(base, finetuned)
  report = jlora.extract_checkpoint(
    base, finetuned, out, rank=_RANK.value, resume=True
  )
  command = f"python -m experiments.compare {shlex.join(sys.argv[1:])}"
  words = [f"--base={base}", f"--finetuned={finetuned}", f"--out={out}"]
  words.append(f"--rank={_RANK.value}")
  tables.check_ranks(report, ranks)
  results: dict[str, Any] = {
    "settings": {
      "command": command,
      "chosen": chosen,
      "texts": _TEXTS.value,
      "sequences": _SEQUENCES.value,
      "length": _LENGTH.value,
    },
    "kl": {},
    "generation": None,
  }
  if pair:
    adapter = logit_curves.load_adapter(out, base)
    results["kl"] = logit_curves.sweep_ranks(*pair, adapter, tokens, ranks)
    if prompts is not None:
      results["generation"] = _generate(base, pair, adapter, chosen, prompts)
  pages.write_results(out, results)
  extraction.write_card(
    out,
    report,
    f"jlora extract {shlex.join(words)}",
    divergences=_divergences(results),
  )


def _divergences(results: dict[str, Any]) -> dict[str, float]:
  """Returns the KL of each text at the adapter's own rank, if measured."""
  return {
    name: row["kl"]
    for name, found in results["kl"].items()
    for row in found["ranks"]
    if row["rank"] == _RANK.value
  }


def _read_texts(base: str) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
  """Reads the tokens of every text, and the prompts to continue."""
  if not _TEXTS.value:
    if _GENERATE.value:
      raise ValueError("--generate needs a text for its prompts: --texts.")
    return {}, None
  encode, _ = samples.open_tokens(base)
  read = {name: samples.read_text(name, _CACHE.value) for name in _TEXTS.value}
  tokens = {
    texts.label(Path(name).name): texts.excerpts(
      text, encode, rows=_SEQUENCES.value, length=_LENGTH.value - 1
    )
    for name, text in read.items()
  }
  if not _GENERATE.value:
    return tokens, None
  first = read[_TEXTS.value[0]]
  return tokens, texts.excerpts(
    first, encode, rows=_GENERATE.value, length=_PROMPT - 1
  )


def _generate(base: str, pair, adapter, chosen: int, prompts) -> dict[str, Any]:
  """Compares generated texts of base, finetune and adapter."""
  apply, params, target = pair
  _, decode = samples.open_tokens(base)
  return samples.compare_samples(
    functools.partial(_continue, apply),
    {
      "base": params,
      "finetuned": target,
      "extracted": logit_curves.adapt_params(params, adapter, chosen),
    },
    prompts,
    decode,
    [float(temperature) for temperature in _TEMPERATURES.value],
  ) | {"text": Path(_TEXTS.value[0]).name, "steps": _STEPS.value}


def _continue(apply, params, prompts, **options) -> Any:
  """Generates the continuations of prompts."""
  return models.generate(apply, params, prompts, _STEPS.value, **options)


def _say(report: jlora.Report, results: dict[str, Any], files) -> None:
  """Prints the summary: worst modules, kinds, totals, what is lost."""
  print("\n".join(summaries.headline(report, results)), end="\n\n")
  print(extraction.type_table(report), end="\n\n")
  print(extraction.worst_table(report), end="\n\n")
  for name, found in results.get("kl", {}).items():
    print(f"{name}, nats per token")
    sizes = {
      row["rank"]: pages.size_at(report, row["rank"]) for row in found["ranks"]
    }
    print(summaries.align_table(summaries.kl_rows(found, sizes)), end="\n\n")
  for each in (results.get("generation") or {}).get("temperatures", []):
    print(f"generated texts, temperature {each['temperature']:g}")
    header, rows = summaries.similarity_rows(each["rows"])
    print(summaries.align_table((header, rows)), end="\n\n")
  print(extraction.rounding_line(report))
  print(extraction.ledger_lines(report), end="\n\n")
  folder = files[0].parent
  named = [x.name if x.parent == folder else str(x) for x in files]
  print(f"written to {folder}: {', '.join(named)}")


if __name__ == "__main__":
  app.run(main)
