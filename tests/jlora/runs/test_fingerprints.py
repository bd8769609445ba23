# SPDX-License-Identifier: Apache-2.0
"""What is the same is told so in every process; what differs is not."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.safetensors import write_safetensors
from jlora.runs.fingerprints import (
  check_unchanged,
  describe_input,
  describe_versions,
  identify,
  stamp_inputs,
)


def add(x, y=1):
  return x + y


def closing_over(value):
  return lambda x: x + value


def power_of(exponent):
  """A function that calls itself, so that its closure holds it."""

  def power(x, left=exponent):
    return x * power(x, left - 1) if left else 1

  return power


class Plain:
  def __init__(self, value):
    self.value = value

  def __call__(self, x):
    return x + self.value

  def method(self, x):
    return x - self.value


class Called:
  def __call__(self, x):
    return x


@dataclasses.dataclass
class Fields:
  value: object


# Each differs from all others.
VALUES = {
  "function": add,
  "other default": lambda x, y=2: x + y,
  "body": lambda x, y=1: x - y,
  "constant": lambda x, y=1: x + y + 1,
  "name": lambda x, y=1: abs(x + y),
  "closure": closing_over(1),
  "other closure": closing_over(2),
  "inner": lambda x: (lambda y: y + x)(1),
  "other inner": lambda x: (lambda y: y + x)(2),
  "partial": functools.partial(add, y=1),
  "other partial": functools.partial(add, y=2),
  "array": functools.partial(add, y=np.arange(3)),
  "other array": functools.partial(add, y=np.arange(1, 4)),
  "dtype": functools.partial(add, y=np.arange(3, dtype=np.float32)),
  "table": functools.partial(add, y={"a": np.ones(2)}),
  "other table": functools.partial(add, y={"a": np.zeros(2)}),
  "jitted": jax.jit(lambda x: x * 3),
  "builtin": sorted,
  "array of jax": functools.partial(add, y=jnp.ones(3)),
  "set": lambda x: x in {"a", "b", "c"},
  "other set": lambda x: x in {"a", "b", "d"},
  "calls itself": power_of(2),
  "calls itself otherwise": power_of(3),
  "object": Plain(1),
  "other object": Plain(np.arange(3)),
  "object of its own": Plain(Plain(1)),
  "another class": Called(),
  "method": Plain(1).method,
  "other method": Plain(2).method,
  "fields": Fields(np.zeros(10**4)),
  "other fields": Fields(np.arange(10**4) == 5000),
}


def test_functions_are_told_apart():
  found = {name: identify(value) for name, value in VALUES.items()}
  assert len({*found.values()}) == len(VALUES)
  assert found == {name: identify(value) for name, value in VALUES.items()}


def test_the_same_in_every_process():
  root = pathlib.Path(__file__).parents[3]
  code = (
    "import importlib.util as u, sys; from jlora.runs.fingerprints import "
    "identify; s = u.spec_from_file_location('m', sys.argv[1]); "
    "m = u.module_from_spec(s); s.loader.exec_module(m); "
    "print([identify(m.VALUES[n]) for n in m.VALUES])"
  )
  said = {
    subprocess.run(
      [sys.executable, "-c", code, __file__],
      cwd=root,
      env=os.environ | {"PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in "12"
  }
  assert len(said) == 1


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "one" / "model"
  path.mkdir(parents=True)
  write_safetensors(path / "model.safetensors", {"w": np.ones((2, 3), "f4")})
  (path / "config.json").write_text("{}")
  (path / "README.md").write_text("some")
  return path


def of(path):
  return describe_input("base", open_checkpoint(path))


# What happens to a folder -> what of its description is another then.
HAPPENS = {
  "nothing": (lambda f: None, set()),
  "README": (lambda f: (f / "README.md").write_text("other"), set()),
  "config": (lambda f: (f / "config.json").write_text("[]"), {"base"}),
  "tokenizer": (lambda f: (f / "tokenizer.json").write_text("[]"), {"base"}),
  "config touched": (lambda f: os.utime(f / "config.json", (0, 9)), set()),
  "weights touched": (
    lambda f: os.utime(f / "model.safetensors", (0, 9)), {"base times"},
  ),
  "names": (
    lambda f: write_safetensors(f / "model.safetensors", {"v": np.ones(3)}),
    {"base", "base times"},
  ),
  "folder inside": (lambda f: (f / "adapter").mkdir(), set()),
}  # fmt: skip


@pytest.mark.parametrize(("happen", "differs"), HAPPENS.values(), ids=HAPPENS)
def test_what_of_an_input_counts(folder, happen, differs):
  before = of(folder)
  happen(folder)
  after = of(folder)
  assert {name for name in before if before[name] != after[name]} == differs


def test_the_path_counts_apart(folder):
  before = of(folder)
  folder.parent.rename(folder.parents[1] / "two")
  after = of(folder.parents[1] / "two" / "model")
  assert {n for n in before if before[n] != after[n]} == {"base paths"}
  folder.parent.symlink_to(folder.parents[1] / "two")
  assert of(folder) != before  # the path is that of the files themselves


def test_of_orbax_the_step_that_was_opened_counts(tmp_path):
  save_orbax(tmp_path / "run" / "1", {"w": np.ones(3)})
  checkpoint = open_checkpoint(tmp_path / "run")
  stamps = stamp_inputs({"base": checkpoint})
  before = describe_input("base", checkpoint)
  save_orbax(tmp_path / "run" / "2", {"w": np.ones(3)})
  check_unchanged({"base": checkpoint}, stamps)
  assert describe_input("base", checkpoint) == before
  assert of(tmp_path / "run") != before
  (file, *_) = (tmp_path / "run" / "1").rglob("d/*")
  os.utime(file, (0, 9))
  with pytest.raises(ValueError, match="run changed while it was read"):
    check_unchanged({"base": checkpoint}, stamps)


def test_a_file_that_is_gone_is_named(folder):
  checkpoint = open_checkpoint(folder)
  stamps = stamp_inputs({"base": checkpoint})
  (folder / "config.json").unlink()
  with pytest.raises(ValueError, match="model changed while it was read"):
    check_unchanged({"base": checkpoint}, stamps)


def test_versions_are_of_what_computes():
  assert describe_versions()["jax"] == jax.__version__
