# SPDX-License-Identifier: Apache-2.0
"""The kernels stand alone, and their files import files.

A package's `__init__` is the door for those outside: a file of the kernels that
went through it would wait for all of the package, and might go in a circle.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "pallas_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


def names_from_packages(source):
  """Names that come out of an `__init__`, each with its line."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      pairs = [(node.module or "", alias.name) for alias in node.names]
    elif isinstance(node, ast.Import):
      pairs = [(alias.name, "") for alias in node.names]
    else:
      continue
    for module, name in pairs:
      folder = ROOT.joinpath(*module.split("."))
      if not module.startswith("pallas_kernels") or not folder.is_dir():
        continue
      if not (folder / f"{name}.py").exists():
        yield f"line {node.lineno}: {module}.{name}"


@pytest.mark.parametrize(
  "file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix()
)
def test_files_import_files(file):
  assert not list(names_from_packages(file.read_text(encoding="utf-8")))


def test_the_rule_itself():
  through = "from pallas_kernels.lora_dot import api, xla_dot"
  assert list(names_from_packages(through)) == [
    "line 1: pallas_kernels.lora_dot.xla_dot"
  ]


def test_the_kernels_need_nothing_of_jlora():
  modules = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in FILES
    if file.stem != "__init__"
  ]
  code = (
    "import importlib, sys\n"
    "import pallas_kernels, pallas_kernels.lora_dot\n"
    f"for name in {modules}: importlib.import_module(name)\n"
    "sys.exit(any(n.split('.')[0] == 'jlora' for n in sys.modules))"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
