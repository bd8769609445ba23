# SPDX-License-Identifier: Apache-2.0
"""All figures and the page of a comparison, from its two JSON files alone."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import grids, heat_maps, pages, plots, summaries, tables
from jlora.extraction import REPORT, Report, read_report
from jlora.runs import replace_text

RESULTS = "results.json"
PAGE = "report.html"
SCHEMA_VERSION = 1
_CHOSEN = 64


def write_results(
  folder: str | os.PathLike[str], results: Mapping[str, Any]
) -> None:
  """Writes results.json, whole or not at all.

  Args:
    folder: an existing folder.
    results: `settings`, `kl`, `generation`.
  """
  data = {"schema_version": SCHEMA_VERSION} | dict(results)
  replace_text(Path(folder) / RESULTS, json.dumps(data, indent=1) + "\n")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """What `write_results` wrote; nothing, where only an extraction ran.

  Args:
    folder: of a comparison, or of an adapter.

  Returns:
    A dict, empty without the file.

  Raises:
    ValueError: the file is damaged or of another schema version.
  """
  path = Path(folder) / RESULTS
  if not path.exists():
    return {}
  try:
    data = dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} is damaged: {error}. Run again.") from error
  version = data.pop("schema_version", None)
  if version != SCHEMA_VERSION:
    raise ValueError(
      f"{path} has schema version {version}, this reads {SCHEMA_VERSION}."
    )
  return data


def draw_all(
  folder: str | os.PathLike[str], chosen: int | None = None
) -> tuple[Report, dict[str, Any], list[Path]]:
  """Draws every figure and the page of a folder from its JSON files.

  Args:
    folder: holds report.json, and results.json if logits were compared.
    chosen: the rank to show; None for the one of results.json, or else 64 or
      the largest there is.

  Returns:
    The report at the chosen rank, the results, and the files written.

  Raises:
    ValueError: files that are missing or damaged, a rank above what was
      extracted.
  """
  folder = Path(folder)
  report, results = read_report(folder), read_results(folder)
  chosen = chosen or results.get("settings", {}).get("chosen")
  chosen = chosen or min(_CHOSEN, tables.top_rank(report))
  shown = tables.cut(report, chosen)
  figures = _figures(report, shown, results)
  for name, (draw, _) in figures.items():
    plots.save_figure(folder / name, draw)
  replace_text(folder / PAGE, _page(folder, report, shown, results, figures))
  return shown, results, [*(folder / name for name in figures), folder / PAGE]


Figures = dict[str, tuple[Callable[[], Figure], str]]


def _figures(report: Report, shown: Report, results) -> Figures:
  """File name -> what draws it, and its caption."""
  rank = shown.settings["rank"]
  kinds = tables.by_kind(report.modules)
  figures: Figures = {
    f"{name}.png": (
      lambda name=name, title=title, label=label: heat_maps.draw_grid(
        grids.fill_grid(shown, name), f"{title} at rank {rank}", label
      ),
      caption,
    )
    for name, title, label, caption in _MAPS
  }
  figures["spectra.png"] = (
    lambda: plots.draw_spectra(kinds, rank),
    "Where a curve falls steeply before the dotted line, the rank is enough; "
    "a slow fall beyond it is what the adapter loses. Below the dashed line "
    "the change cannot be told from the rounding of the stored checkpoint. "
    "Three layers of each kind: the first, the middle, the last.",
  )
  figures["error_by_rank.png"] = (
    lambda: plots.draw_errors(kinds, rank, lambda k: size_at(report, k)),
    "All matrices of a kind as one vector. A matrix whose shorter side is at "
    "most the rank is kept exactly. The upper axis is the size of the whole "
    "adapter if every module has that rank.",
  )
  if results.get("kl"):
    figures["kl_by_rank.png"] = (
      lambda: plots.draw_divergences(
        results["kl"], rank, lambda k: size_at(report, k)
      ),
      "How far the next-token predictions are from the finetune's; bars are "
      "one standard error. Both axes are logarithmic; dashed lines are the "
      "base without adapter. Of kjv and pydoc the last tenth is read. One "
      "position is right to about 1e-6 nats.",
    )
  for each in _generated(results):
    figures[f"tfidf_{each['temperature']:g}.png"] = (
      lambda each=each: plots.draw_similarities(
        each["rows"], f"Likeness of generated texts, {_sampling(each)}"
      ),
      _SIMILARITY,
    )
  return figures


_MAPS = (
  (
    "relative_error",
    "Relative error of the change",
    "|Δ − Δᵣ| / |Δ|, no unit",
    "Each cell is one matrix: the share of the norm of its change that the "
    "adapter misses. 0 is exact, 1 is nothing kept.",
  ),
  (
    "cosine_distance",
    "Cosine distance of the change",
    "1 − cos(Δ, Δᵣ), no unit",
    "Each cell is one matrix: how far the adapter's change points away from "
    "the finetune's. 0 is the same direction, 1 is orthogonal.",
  ),
)
_SIMILARITY = (
  "The adapter is as good as the finetune where its cosine reaches that of "
  "two samples of the finetune; the cosine with the base says how much there "
  "was to recover, and that with texts on other prompts how alike any two "
  "texts are. Cosines alone mean little. Greedy, two samples are one text: 1."
)


def size_at(report: Report, rank: int) -> int:
  """Bytes of the adapter if every module had a rank, or all it can have.

  Args:
    report: from an extraction.
    rank: any.

  Returns:
    Bytes.
  """
  size = tables.itemsize(report)
  return sum(
    min(rank, len(row["singular_values"])) * tables.unit_bytes(row, size)
    for row in report.modules
  )


def _generated(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  return (results.get("generation") or {}).get("temperatures", [])


def _sampling(each: Mapping[str, Any]) -> str:
  temperature = each["temperature"]
  return f"temperature {temperature:g}" if temperature else "greedy"


def _page(folder: Path, report, shown, results, figures: Figures) -> str:
  """The HTML of everything."""

  def figure(name: str) -> str:
    return pages.make_figure(folder / name, figures[name][1])

  rank = shown.settings["rank"]
  parts = [
    ("", _introduction(report, shown, results)),
    (f"By kind of module, rank {rank}",
     pages.make_table(*summaries.type_rows(shown))),
    ("By layer", figure("relative_error.png") + figure("cosine_distance.png")),
    (f"The worst modules, rank {rank}",
     pages.make_table(*summaries.module_rows(shown, 10))
     + pages.fold("All modules",
                  pages.make_table(*summaries.module_rows(shown)))),
    ("Spectra", figure("spectra.png")),
    ("Which rank? Weights", figure("error_by_rank.png")),
  ]  # fmt: skip
  if results.get("kl"):
    content = figure("kl_by_rank.png")
    for name, found in results["kl"].items():
      sizes = {r["rank"]: size_at(report, r["rank"]) for r in found["ranks"]}
      count = found["ranks"][0]["tokens"]
      content += pages.make_paragraph(
        f"{name}: {count} tokens; KL and loss in nats per token, "
        "± one standard error over stretches of text. Losses are of the same "
        "stretches: their differences are surer than each of them."
      ) + pages.make_table(*summaries.kl_rows(found, sizes))
    parts.append(("Which rank? Predictions", content))
  for each in _generated(results):
    name = f"tfidf_{each['temperature']:g}.png"
    parts.append(
      (f"Generated texts, {_sampling(each)}",
       figure(name) + _generation(results["generation"], each))
    )  # fmt: skip
  parts.append(("What is not in the adapter as a LoRA", _ledger(report)))
  return pages.make_page("Finetune and extracted LoRA compared", parts)


def _introduction(report: Report, shown: Report, results) -> str:
  settings = report.settings
  rows = [
    ("base", str(settings["base"])),
    ("finetuned", str(settings["finetuned"])),
    ("factored up to rank", str(tables.top_rank(report))),
    ("shown at rank", str(shown.settings["rank"])),
    ("factors stored in", settings["dtype"]),
  ]
  return (
    "".join(map(pages.make_paragraph, summaries.headline(shown, results)))
    + pages.make_table(("setting", "value"), rows, is_text=True)
    + pages.make_code(results.get("settings", {}).get("command", ""))
  )


def _generation(generation: Mapping[str, Any], each) -> str:
  examples = each["examples"]
  names = list(examples[0]) if examples else []
  return (
    pages.make_paragraph(
      f"{generation['prompts']} prompts of {generation['prompt_tokens']} "
      f"tokens of {generation['text']}, {generation['steps']} tokens each."
    )
    + pages.make_table(*summaries.similarity_rows(each["rows"]), is_text=True)
    + pages.fold(
      f"The first {len(examples)}",
      pages.make_table(
        names,
        [[example[name] for name in names] for example in examples],
        is_text=True,
      ),
    )
  )


def _ledger(report: Report) -> str:
  counts = report.totals["ledger"]
  said = ", ".join(f"{count} {status}" for status, count in counts.items())
  header, rows = summaries.ledger_rows(report)
  table = pages.make_table(header, rows, is_text=True) if rows else ""
  return (
    pages.make_paragraph(f"Tensors of both checkpoints: {said}.")
    + table
    + pages.make_paragraph(f"{REPORT} has every tensor.")
  )
