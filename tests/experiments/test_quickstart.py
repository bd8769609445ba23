# SPDX-License-Identifier: Apache-2.0
"""The demo's links, and the README's lines that go on from them."""

import ast
import pathlib
import re
import subprocess
import sys

import jax

from experiments.lib.models import finetunes
from jlora import models

ROOT = pathlib.Path(__file__).parents[2]
# Wider than the lines' rank.
CONFIG = finetunes.TINY | {"num_hidden_layers": 1, "hidden_size": 128}

LINK = """
import pathlib, sys
from experiments import quickstart
here = pathlib.Path(sys.argv[1])
for target in ("one", "two"):
  (here / target).mkdir()
  quickstart.link(here / "links", {"name": here / target})
  assert (here / "links" / "name").resolve() == (here / target).resolve()
quickstart.link(here, {"one": here / "two"})
"""


def names():
  """The demo's own: it is not imported, its flags would stay."""
  source = (ROOT / "experiments" / "quickstart.py").read_text()
  (found,) = re.findall(r"^LINKS = (.*)$", source, re.M)
  return ast.literal_eval(found)


def test_the_readmes_six_lines_run_where_the_demo_ran(
  tmp_path, monkeypatch, capsys
):
  page = (ROOT / "README.md").read_text(encoding="utf-8")
  section = page.partition("## Six lines")[2]
  lines = re.search(r"```python\n(.*?)```", section, re.S)[1]
  printed = re.search(r"prints\n\n```\n(.*?)```", section, re.S)[1]
  monkeypatch.chdir(tmp_path)
  for number, name in enumerate(names()):
    _, params = models.init(CONFIG, jax.random.key(number))
    models.save(tmp_path / name, params, CONFIG)
  assert len([line for line in lines.splitlines() if line]) == 6
  exec(lines, {})
  number = re.compile(r"[\d.]+")
  said = capsys.readouterr().out
  one, _, three = number.sub("N", said).splitlines()
  wanted = number.sub("N", printed).splitlines()
  assert (one, three) == (wanted[0], wanted[2])
  assert (tmp_path / "adapter" / "adapter_config.json").exists()
  assert set(names()) <= set(re.findall(r"`([\w-]+)`", section))


def test_links_are_made_anew_and_nothing_else_is_replaced(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", LINK, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.stderr.endswith(f"{tmp_path}/one is no link; --links names "
                              "another folder\n")  # fmt: skip
