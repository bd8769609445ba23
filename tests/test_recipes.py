# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING.md, carried out as they are written.

A recipe is a section. Its blocks of Python begin with `# FILE`, a new one, or
`# FILE, after: LINE`, likewise `before` and `instead of`. They are put into a
copy of the tree, which is formatted as by `make format`; the linter and the
recipe's command must then pass.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
COPIED = ("jlora", "pallas_kernels", "tests", "experiments")
FILES = ("pyproject.toml", "README.md", "BUILD.md", "CONTRIBUTING.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
MARK = re.compile(r"# (\S+\.py)(?:, (after|before|instead of): (.+))?")


class Block(NamedTuple):
  """A piece of Python, and where it goes."""

  path: str
  where: str | None
  line: str | None
  text: str


def recipes():
  """{what is added: the section's text}."""
  _, *sections = re.split(
    r"^## (?=Adding )", PAGE.read_text("utf-8"), flags=re.M
  )
  return dict(section.split("\n", 1) for section in sections)


def blocks(text):
  for language, code in FENCED.findall(text):
    if language == "python":
      head, _, rest = code.partition("\n")
      yield Block(*MARK.fullmatch(head).groups(), rest)


def commands(text):
  return [code for language, code in FENCED.findall(text) if not language]


def put(block, root):
  """Puts a block into the tree; the line it refers to must be there once."""
  path = root / block.path
  if block.where is None:
    assert not path.exists(), f"{block.path} is there already"
    path.write_text(block.text, encoding="utf-8")
    return
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  (at,) = (i for i, line in enumerate(lines) if line.strip() == block.line)
  if block.where == "instead of":
    del lines[at]
  lines.insert(at + (block.where == "after"), block.text)
  path.write_text("".join(lines), encoding="utf-8")


def run(words, root):
  """A command of the page in the tree, by this Python."""
  assert words[0].startswith(".venv/bin/python")
  env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
  return subprocess.run(
    [sys.executable, *words[1:]],
    capture_output=True,
    text=True,
    cwd=root,
    env=env | {"PYTHONPATH": str(root)},
  )


@pytest.fixture
def tree(tmp_path):
  """A copy of the sources."""
  for name in COPIED:
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
  for name in FILES:
    shutil.copy(ROOT / name, tmp_path / name)
  return tmp_path


def test_there_are_recipes():
  assert len(recipes()) == 6
  for text in recipes().values():
    assert len(list(blocks(text))) >= 2
    assert len(commands(text)) == 1


def marks_of(text):
  """Long are those that look through the whole tree: half a minute each."""
  is_long = any("test_imports" in command for command in commands(text))
  return [pytest.mark.long] if is_long else []


@pytest.mark.parametrize(
  "name",
  [pytest.param(x, marks=marks_of(text)) for x, text in recipes().items()],
)
def test_a_recipe_works_as_written(name, tree):
  text = recipes()[name]
  for block in blocks(text):
    put(block, tree)
  changed = sorted({block.path for block in blocks(text)})
  lint = [".venv/bin/python", "-m", "ruff"]
  for how in (["format"], ["check"]):
    done = run([*lint, *how, *changed], tree)
    assert done.returncode == 0, done.stdout + done.stderr
  (command,) = commands(text)
  done = run(shlex.split(command), tree)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  assert re.search(r"\d+ passed", done.stdout)
