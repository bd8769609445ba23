# SPDX-License-Identifier: Apache-2.0
"""Writes a comparison's files: results.json, figures, and one HTML page.

The page needs no script, link or font from elsewhere, and its figures are
inlined: the file can be mailed.
"""

import base64
import html
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.lib.figures import (
  grids,
  plots,
  summaries,
  tables,
)
from jlora.checkpoints import replace_text
from jlora.extraction import REPORT, Report, read_report

RESULTS = "results.json"
PAGE = "report.html"
SCHEMA_VERSION = 1
_CHOSEN = 64
Figures = dict[str, tuple[Callable[[], Figure], str]]


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


def write_results(
  folder: str | os.PathLike[str], results: Mapping[str, Any]
) -> None:
  """Writes results.json, atomically.

  Args:
    folder: an existing folder.
    results: `settings`, `kl`, `generation`.
  """
  data = {"schema_version": SCHEMA_VERSION} | dict(results)
  replace_text(Path(folder) / RESULTS, json.dumps(data, indent=1) + "\n")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads results.json; gives an empty dict if only an extraction ran.

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


def size_at(report: Report, rank: int) -> int:
  """Counts an adapter's bytes at a rank, clipped to what modules have.

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


def _figures(report: Report, shown: Report, results) -> Figures:
  """Lists the figures: file name -> (function that draws it, caption)."""
  rank = shown.settings["rank"]
  kinds = tables.by_kind(report.modules)
  figures: Figures = {
    f"{name}.png": (
      lambda name=name, title=title, label=label: grids.draw_grid(
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


_SIMILARITY = (
  "The adapter is as good as the finetune where its cosine reaches that of "
  "two samples of the finetune; the cosine with the base says how much there "
  "was to recover, and that with texts on other prompts how alike any two "
  "texts are. Cosines alone mean little. Greedy, two samples are one text: 1."
)


def _page(folder: Path, report, shown, results, figures: Figures) -> str:
  """Puts the page together from figures and tables."""

  def figure(name: str) -> str:
    """Embeds a figure by its file name."""
    return make_figure(folder / name, figures[name][1])

  rank = shown.settings["rank"]
  parts = [
    ("", _introduction(report, shown, results)),
    (f"By kind of module, rank {rank}",
     make_table(*summaries.type_rows(shown))),
    ("By layer", figure("relative_error.png") + figure("cosine_distance.png")),
    (f"The worst modules, rank {rank}",
     make_table(*summaries.module_rows(shown, 10))
     + fold("All modules",
                  make_table(*summaries.module_rows(shown)))),
    ("Spectra", figure("spectra.png")),
    ("Which rank? Weights", figure("error_by_rank.png")),
  ]  # fmt: skip
  if results.get("kl"):
    content = figure("kl_by_rank.png")
    for name, found in results["kl"].items():
      sizes = {r["rank"]: size_at(report, r["rank"]) for r in found["ranks"]}
      count = found["ranks"][0]["tokens"]
      content += make_paragraph(
        f"{name}: {count} tokens; KL and loss in nats per token, "
        "± one standard error over stretches of text. Losses are of the same "
        "stretches: their differences are surer than each of them."
      ) + make_table(*summaries.kl_rows(found, sizes))
    parts.append(("Which rank? Predictions", content))
  for each in _generated(results):
    name = f"tfidf_{each['temperature']:g}.png"
    parts.append(
      (f"Generated texts, {_sampling(each)}",
       figure(name) + _generation(results["generation"], each))
    )  # fmt: skip
  parts.append(("What is not in the adapter as a LoRA", _ledger(report)))
  return make_page("Finetune and extracted LoRA compared", parts)


def _introduction(report: Report, shown: Report, results) -> str:
  """Makes the section that says what was compared."""
  settings = report.settings
  rows = [
    ("base", str(settings["base"])),
    ("finetuned", str(settings["finetuned"])),
    ("factored up to rank", str(tables.top_rank(report))),
    ("shown at rank", str(shown.settings["rank"])),
    ("factors stored in", settings["dtype"]),
  ]
  return (
    "".join(map(make_paragraph, summaries.headline(shown, results)))
    + make_table(("setting", "value"), rows, is_text=True)
    + make_code(results.get("settings", {}).get("command", ""))
  )


def _generated(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the results of generated texts, by temperature."""
  return (results.get("generation") or {}).get("temperatures", [])


def _sampling(each: Mapping[str, Any]) -> str:
  """Describes a temperature in words."""
  temperature = each["temperature"]
  return f"temperature {temperature:g}" if temperature else "greedy"


def _generation(generation: Mapping[str, Any], each) -> str:
  """Makes the section on generated texts."""
  examples = each["examples"]
  names = list(examples[0]) if examples else []
  return (
    make_paragraph(
      f"{generation['prompts']} prompts of {generation['prompt_tokens']} "
      f"tokens of {generation['text']}, {generation['steps']} tokens each."
    )
    + make_table(*summaries.similarity_rows(each["rows"]), is_text=True)
    + fold(
      f"The first {len(examples)}",
      make_table(
        names,
        [[example[name] for name in names] for example in examples],
        is_text=True,
      ),
    )
  )


def _ledger(report: Report) -> str:
  """Makes the section on tensors that are not in the adapter."""
  counts = report.totals["ledger"]
  said = ", ".join(f"{count} {status}" for status, count in counts.items())
  header, rows = summaries.ledger_rows(report)
  table = make_table(header, rows, is_text=True) if rows else ""
  return (
    make_paragraph(f"Tensors of both checkpoints: {said}.")
    + table
    + make_paragraph(f"{REPORT} has every tensor.")
  )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto;
  max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } figcaption, .note { color: #444; max-width: 75ch; }
img { max-width: 100%; height: auto; border: 1px solid #ddd; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 0.7rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd;
  text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #666; white-space: normal;
  vertical-align: bottom; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; vertical-align: top; }
code { font-size: 13px; overflow-wrap: anywhere; }
"""


def make_page(title: str, parts: Iterable[tuple[str, str]]) -> str:
  """Puts sections together to a whole page.

  Args:
    title: plain text.
    parts: heading (plain text, "" for none) and HTML of each section.

  Returns:
    HTML that refers to nothing outside itself.

  Example:
    >>> "<h2>a</h2>" in make_page("t", [("a", "<p>b</p>")])
    True
  """
  body = "\n".join(
    (f"<h2>{html.escape(heading)}</h2>\n" if heading else "") + content
    for heading, content in parts
  )
  name = html.escape(title)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{name}</title>\n<style>{_STYLE}</style></head>\n"
    f"<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n"
  )


def make_table(
  header: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False
) -> str:
  """Formats a table in HTML; escapes every cell.

  Args:
    header: names of the columns.
    rows: cells, as many as there are columns.
    is_text: cells are prose: to the left, broken into lines.

  Returns:
    HTML.

  Example:
    >>> make_table(["a"], [["<b>"]]).count("&lt;b&gt;")
    1
  """
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
  body = "\n".join(
    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    for row in rows
  )
  kind = ' class="text"' if is_text else ""
  return (
    f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n'
    f"<tbody>{body}</tbody></table></div>"
  )


def make_figure(image: str | os.PathLike[str], caption: str) -> str:
  """Embeds a PNG with its caption into HTML.

  Args:
    image: a PNG file.
    caption: what to see in it; also what a screen reader says.

  Returns:
    HTML.
  """
  data = base64.b64encode(Path(image).read_bytes()).decode("ascii")
  said = html.escape(caption, quote=True)
  return (
    f'<figure><img alt="{said}" src="data:image/png;base64,{data}">'
    f"<figcaption>{said}</figcaption></figure>"
  )


def make_paragraph(text: str) -> str:
  """Formats a paragraph in HTML; escapes the text.

  Args:
    text: plain text.

  Returns:
    HTML.
  """
  return f"<p>{html.escape(text)}</p>"


def make_code(text: str) -> str:
  """Formats a command in HTML; escapes it.

  Args:
    text: a command.

  Returns:
    HTML.
  """
  return f"<p><code>{html.escape(text)}</code></p>"


def fold(title: str, content: str) -> str:
  """Makes a section in HTML that opens when its title is clicked.

  Args:
    title: plain text.
    content: HTML.

  Returns:
    HTML.
  """
  return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
