# SPDX-License-Identifier: Apache-2.0
"""The names that users learn: sorted, documented, and quick to import."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import jlora

HEAVY = (
  "jlora.extraction",
  "chex",
  "flax",
  "optax",
  "orbax",
  "safetensors",
  "scipy",
  "tensorstore",
)


ROOT = pathlib.Path(jlora.__file__).parent


def test_names_are_sorted_and_few():
  classes = {name for name in jlora.__all__ if name[0].isupper()}
  assert jlora.__all__ == [
    *sorted(classes), *sorted(set(jlora.__all__) - classes)
  ]  # fmt: skip
  assert len(jlora.__all__) == 25


def test_the_lazy_names_are_those_that_type_checkers_see():
  """Each is imported twice in the source: for checkers, and when asked for."""
  tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
  (checked,) = (node for node in tree.body if isinstance(node, ast.If))
  seen = {
    alias.name: node.module
    for node in checked.body
    for alias in node.names
  }  # fmt: skip
  lazy = {name: f"jlora.{home}" for name, home in jlora._HOMES.items()}
  assert seen == lazy
  assert list(lazy) == jlora.__all__


def test_every_package_is_there_without_a_further_import():
  rooms = {file.parent.name for file in ROOT.glob("*/__init__.py")}
  files = {file.stem for file in ROOT.glob("[a-z]*.py")}
  assert set(jlora._PACKAGES) == (rooms | files) - {"messages"}
  code = "import jlora; print(jlora.merging.ties.__name__, jlora.models.load)"
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert found.stdout.startswith("ties <function load")


def test_names_that_are_not_there_are_errors():
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = jlora.nothing
  assert {"extract", "merging"} <= set(dir(jlora))


def test_the_version_is_the_installed_one():
  assert jlora.__version__ == metadata.version("jlora")


def test_no_name_hides_a_module():
  """`import jlora.x` must not give a function."""
  modules = {name.split(".")[1] for name in sys.modules if "jlora." in name}
  assert not modules & set(jlora.__all__)


@pytest.mark.parametrize("name", jlora.__all__)
def test_every_name_says_what_it_is(name):
  value = getattr(jlora, name)
  if inspect.isfunction(value) or inspect.isclass(value):
    assert inspect.getdoc(value)
  if inspect.isfunction(value):
    assert re.search(r">>> ", value.__doc__)


def test_importing_loads_nothing_that_is_not_needed_yet():
  """Each of these takes as long as all of jlora, or longer."""
  code = f"import sys, jlora; print(*({set(HEAVY)} & sys.modules.keys()))"
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert not found.stdout.strip()
