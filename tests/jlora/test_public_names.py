# SPDX-License-Identifier: Apache-2.0
"""The names that users learn: sorted, documented, and quick to import."""

import inspect
import re
import subprocess
import sys

import pytest

import jlora

HEAVY = (
  "chex",
  "flax",
  "optax",
  "orbax",
  "safetensors",
  "scipy",
  "tensorstore",
)


def test_names_are_sorted_and_are_all_there_is():
  classes = {name for name in jlora.__all__ if name[0].isupper()}
  assert jlora.__all__ == [
    *sorted(classes), *sorted(set(jlora.__all__) - classes)
  ]  # fmt: skip
  public = {
    name
    for name, value in vars(jlora).items()
    if not name.startswith("_") and not inspect.ismodule(value)
  }
  assert public == set(jlora.__all__)


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


@pytest.mark.parametrize(
  "name",
  [
    *("extract", "extract_checkpoint", "open_checkpoint", "apply"),
    *("compare", "mean_kl", "score", "recovered", "advise", "refine"),
    *("pack", "unpack", "save_packed", "load_packed"),
    *("save_peft", "load_peft", "save_merged", "save_orbax"),
    *("merge", "concat", "truncate", "linear", "slerp", "ties", "dare"),
    *("flatten", "unflatten", "from_in_rank", "to_in_rank"),
  ],
)
def test_what_users_look_for_is_there(name):
  assert callable(getattr(jlora, name))


def test_importing_loads_nothing_that_is_not_needed_yet():
  """Each of these takes as long as all of jlora, or longer."""
  code = f"import sys, jlora; print(*({set(HEAVY)} & sys.modules.keys()))"
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert not found.stdout.strip()
