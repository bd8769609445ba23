# SPDX-License-Identifier: Apache-2.0
"""Every block of the guides runs, in order, and prints what the page says.

Blocks of `python` and the lines of `sh` that start with `jlora` are carried out
in an empty folder, one page after the other. A block of `text` is what the
block before it prints, with any numbers; `...` stands for lines left out. Not
run are a block after `<!-- not run: REASON -->` and a command of `ELSEWHERE`.
"""

import importlib
import json
import re
import shlex
import warnings
from typing import NamedTuple

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

from jlora.commands import entry
from tests.helpers import single_files
from tests.test_imports import ROOT, name_of

FENCED = re.compile(
  r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?"
  r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
  re.M | re.S,
)
# What a page shows and other tests carry out, or nothing here can.
ELSEWHERE = {
  "pip": "asks a registry; tried by hand from the built wheel",
  "make": "gates of their own",
  "python3": "makes an environment",
  "python": "tests/experiments, with flags read by tests/test_pages.py",
}
LANGUAGES = {"python", "sh", "text"}


class Block(NamedTuple):
  """A block of a page."""

  language: str
  code: str
  line: int
  why: str | None


def blocks(text):
  """Blocks of a page in order, with the line where each begins."""
  for found in FENCED.finditer(text):
    line = text.count("\n", 0, found.start("code"))
    yield Block(found["language"], found["code"], line, found["why"])


def cells(file):
  """The cells of code of a notebook."""
  found = json.loads(file.read_text(encoding="utf-8"))["cells"]
  return [cell for cell in found if cell["cell_type"] == "code"]


def write_images(folder):
  """A tiny Flux and its finetune, as single files of the authors' names."""
  from jlora.checkpoints import write_safetensors

  base = single_files.tensors_of("flux")
  change = single_files.tensors_of("flux", seed=1, size=0.1)
  both = {
    name: base[name] + change[name] if name.endswith("weight") else base[name]
    for name in base
  }
  for name, tensors in (("a", base), ("b", both)):
    write_safetensors(
      folder / f"{name}.safetensors", single_files.as_original(tensors, "flux")
    )


def write_pair(folder):
  """The two tiny models of the first page, by the page's own lines."""
  page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
  lines = next(b.code for b in blocks(page) if b.language == "python")
  exec(lines, {})


# What has to be there before a page begins.
SETUPS = {
  "docs/guides/hosts.md": write_pair,
  "docs/guides/images.md": write_images,
  "docs/guides/peft.md": write_pair,
}
GUIDES = [
  *(ROOT / "docs" / f"{name}.md" for name in ("start", "concepts")),
  *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Pages that other files check: an HTTP server, tables that commands write.
OTHERS = {"families", "foreign", "formats", "porting", "serving", "speed"}


def commands(code):
  """The words of each command of a block of `sh`."""
  lines = re.sub(r"\\\n\s*", " ", code).splitlines()
  return [shlex.split(line, comments=True) for line in lines if line.strip()]


def start(words):
  """Runs a command of jlora in this process; it has to end well."""
  module = importlib.import_module(f"jlora.commands.{words[0]}")
  assert entry.run(module.COMMAND, words[1:]) == 0, shlex.join(words)


def run(block, names, where):
  """Carries out one block."""
  if block.language == "python":
    # The blank lines give errors the page's own line numbers.
    exec(compile("\n" * block.line + block.code, where, "exec"), names)
  for words in commands(block.code) if block.language == "sh" else ():
    if words[0] == "jlora":
      start(words[1:])
    else:
      assert words[0] in ELSEWHERE, f"{where}: {shlex.join(words)}"


def lines_of(text):
  """Lines with blanks and numbers made alike."""
  number = re.compile(r"-?\d[\d.,]*(e[+-]\d+)?")
  return [" ".join(number.sub("N", line).split()) for line in text.splitlines()]


def check_printed(wanted, said, where):
  """Each line is among those printed, in this order."""
  printed = iter(lines_of(said))
  missing = [
    line
    for line in lines_of(wanted)
    if line and line != "..." and line not in printed
  ]
  assert not missing, f"{where} does not print {missing[0]!r} but\n{said}"


def carry_out(page, capsys):
  """Runs the blocks of a page; what is shown as printed was printed."""
  names, said = {}, ""
  for block in blocks(page.read_text(encoding="utf-8")):
    where = f"{name_of(page)}:{block.line}"
    assert block.language in LANGUAGES, f"{where} is {block.language!r}"
    if block.why:
      continue
    if block.language == "text":
      check_printed(block.code, said, where)
      continue
    capsys.readouterr()
    run(block, names, str(page))
    said = capsys.readouterr().out


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_guides_run_as_they_stand(page, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  # Pages are for users, who have JAX's own defaults.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("ignore")  # of torch and transformers
    SETUPS.get(name_of(page), lambda folder: None)(tmp_path)
    carry_out(page, capsys)


def test_every_page_is_run_or_checked_elsewhere():
  pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
  assert pages == OTHERS | {"index", "start", "concepts"}
  for name in OTHERS:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    python = [b for b in blocks(text) if b.language == "python"]
    assert all(b.why for b in python), name


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_notebooks_run_and_print_what_is_in_them(
  file, tmp_path, monkeypatch, capsys
):
  """Cells in order; printed lines are those committed, with any numbers."""
  monkeypatch.chdir(tmp_path)
  matplotlib.use("agg")
  names = {}
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    for number, cell in enumerate(cells(file)):
      capsys.readouterr()
      code = "".join(cell["source"])
      exec(compile(code, f"{file} cell {number}", "exec"), names)
      plt.close("all")
      said = [o["text"] for o in cell["outputs"] if o.get("name") == "stdout"]
      wanted = "".join(line for text in said for line in text)
      check_printed(wanted, capsys.readouterr().out, f"{file.name} {number}")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_notebooks_are_committed_with_what_they_print(file):
  counts = [cell["execution_count"] for cell in cells(file)]
  assert counts == list(range(1, len(counts) + 1))
  outputs = [o for cell in cells(file) for o in cell["outputs"]]
  assert any(o["output_type"] == "display_data" for o in outputs)
  assert not [o for o in outputs if o["output_type"] == "error"]
  assert not [o for o in outputs if o.get("name") == "stderr"]


@pytest.mark.long
def test_a_cards_blocks_run_as_they_stand(tmp_path, monkeypatch, capsys):
  """In the folder where base, finetune and adapter are."""
  monkeypatch.chdir(tmp_path)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    write_pair(tmp_path)
    start(
      ["extract", "--base=base", "--finetuned=finetuned", "--out=x", "--rank=2"]
    )
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    names = {}
    for block in blocks(card.replace("--out=x", "--out=y")):
      if block.language != "text":
        run(block, names, "card")
  assert names["model"].peft_config["default"].r == 2
  assert (tmp_path / "y" / "adapter_config.json").exists()


def test_the_readme_is_short_and_what_it_does_not_run_has_a_reason():
  """Its six lines run in tests/experiments/test_quickstart.py."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  assert text.count("\n") < 150
  run = [b for b in blocks(text) if b.language == "python" and not b.why]
  assert [b.code.splitlines()[0] for b in run] == ["import jlora"]
  section = text.partition("## Six lines")[2]
  assert run[0].code in section


def test_a_page_that_is_wrong_fails(tmp_path, capsys):
  page = ROOT / "docs" / "start.md"
  assert list(blocks(page.read_text(encoding="utf-8")))
  check_printed("a 1.5\n...\nc 2", "a 3\nb\nc 44\n", "x")
  with pytest.raises(AssertionError, match="does not print 'b'"):
    check_printed("b", "a", "x")
  with pytest.raises(AssertionError, match="x:.*curl"):
    run(Block("sh", "curl x\n", 1, None), {}, "x:1")
