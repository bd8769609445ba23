# SPDX-License-Identifier: Apache-2.0
"""The site's reference has every name that users can ask for."""

import importlib.util
import pkgutil

import pytest

import jlora
from tests.test_imports import ROOT


def load():
  """The file beside the pages, which is in no package."""
  path = ROOT / "docs" / "reference_pages.py"
  spec = importlib.util.spec_from_file_location("reference_pages", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


PAGES = load()


def test_every_door_has_a_page():
  files = {f.name for f in pkgutil.iter_modules(jlora.__path__, "jlora.")}
  written = set(PAGES.TASKS.values())
  assert files - {"jlora.messages"} <= written
  assert len(written) == len(PAGES.TASKS)


@pytest.mark.parametrize("module", PAGES.TASKS.values())
def test_every_name_is_found_and_described(module):
  bare = [
    name
    for name in PAGES.names_of(module)
    if PAGES.definition(module, name) is None
  ]
  assert not bare
  text = PAGES.page(module)
  assert text.count("\n## ") == len(PAGES.names_of(module))


def test_sections_of_docstrings_become_markdown():
  doc = (
    "Adds.\n\n    x + y\n\nArgs:\n  x: one\n    side.\n\nExample:\n  >>> 1\n  1"
  )
  assert PAGES.body_of(doc) == (
    "Adds.\n\n    x + y\n\n**Args**\n\n- `x`: one\n  side.\n\n"
    "**Example**\n\n```pycon\n>>> 1\n1\n```"
  )
