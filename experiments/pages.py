# SPDX-License-Identifier: Apache-2.0
"""One HTML file that holds a whole comparison: figures inlined, tables real.

No script, no link, no font from elsewhere: the file can be mailed.
"""

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

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


def make_table(
  header: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False
) -> str:
  """A table in HTML; every cell is escaped.

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
  """A PNG with its caption, the image's bytes in the HTML itself.

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
  """A paragraph; the text is escaped.

  Args:
    text: plain text.

  Returns:
    HTML.
  """
  return f"<p>{html.escape(text)}</p>"


def make_code(text: str) -> str:
  """Text as it is typed; escaped.

  Args:
    text: a command.

  Returns:
    HTML.
  """
  return f"<p><code>{html.escape(text)}</code></p>"


def fold(title: str, content: str) -> str:
  """A part that opens when its title is clicked.

  Args:
    title: plain text.
    content: HTML.

  Returns:
    HTML.
  """
  return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def make_page(title: str, parts: Iterable[tuple[str, str]]) -> str:
  """A whole page.

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
