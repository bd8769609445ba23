# SPDX-License-Identifier: Apache-2.0
"""Small models are merged by NumPy: nothing is compiled, all else is equal."""

import functools
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.arrays.averages import linear
from jlora.merging.arrays.singular_vectors import iso_c, tsv
from jlora.merging.arrays.task_vectors import ties
from jlora.merging.checkpoints import merger as mergers
from jlora.merging.checkpoints import on_host
from jlora.merging.checkpoints.mergekit_forms import FORMS
from jlora.merging.checkpoints.on_host import small_programs, works_on_host
from jlora.merging.checkpoints.piecewise import unbind
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.run import merge_checkpoints

SHAPES = {"w": (24, 40), "v": (40,), "e": (2, 6, 5)}
METHODS = {name: form.method for name, form in FORMS.items()}
METHODS |= {"tsv": tsv, "iso_c": iso_c}
ONE = ("passthrough", "nearswap", "arcee_fusion")  # these take one model
NUMBERS = {
  "slerp": {"t": 0.3}, "nearswap": {"t": 0.01}, "sce": {"density": 0.5},
  "ties": {"density": 0.5}, "passthrough": {"weight": 0.5},
  "breadcrumbs": {"density": 0.6, "gamma": 0.1},
}  # fmt: skip
NUMBERS |= {"breadcrumbs_ties": NUMBERS["breadcrumbs"]}
NUMBERS |= dict.fromkeys(("dare_linear", "dare_ties"), {"density": 0.5})
NUMBERS |= dict.fromkeys(("della", "della_linear"), {"density": 0.6})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A base and two finetunes, in bfloat16."""
  folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
  draw = lambda shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  base = {name: draw(shape) for name, shape in SHAPES.items()}
  for name in ("base", "a", "b"):
    size = np.float32(0 if name == "base" else 0.1)
    tensors = {
      key: (w + size * draw(w.shape)).astype(ml_dtypes.bfloat16)
      for key, w in base.items()
    }
    write_safetensors(folder / f"{name}.safetensors", tensors)
  return folder


def recipe_of(name, models):
  names = ["a"] if name in ONE else ["a", "b"]
  inputs = tuple(Input(str(models / f"{x}.safetensors")) for x in names)
  needs_base = name in FORMS and FORMS[name].base != "subtracted"
  base = None if needs_base else str(models / "base.safetensors")
  return Recipe(
    METHODS[name], (Slice(inputs),), settings=NUMBERS.get(name, {}), base=base
  )


def merged(recipe, out):
  merge_checkpoints(recipe, out, log=io.StringIO())
  found = open_checkpoint(out)
  return {name: np.float32(found[name]) for name in found}


def test_every_method_of_recipes_is_here():
  plain = {unbind(method)[0] for method in METHODS.values()}
  assert plain == on_host.METHODS
  assert all(works_on_host(method) for method in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_compiled_and_the_result_is_that_of_programs(
  name, models, tmp_path, monkeypatch, caplog
):
  recipe = recipe_of(name, models)
  with jax.log_compiles(), caplog.at_level("DEBUG", "jax"):
    by_numpy = merged(recipe, tmp_path / "numpy")
    assert not [x for x in caplog.messages if "ompil" in x or "tracing" in x]
    monkeypatch.setattr(on_host, "LIMIT", 0)
    jax.clear_caches()
    by_programs = merged(recipe, tmp_path / "programs")
    assert [x for x in caplog.messages if "ompil" in x]
  base = open_checkpoint(models / "base.safetensors")
  for key, found in by_numpy.items():
    under, wanted = np.float32(base[key]), by_programs[key]
    np.testing.assert_array_equal(found == under, wanted == under)
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-6)


def test_a_command_starts_no_backend(models, tmp_path):
  """Of a platform that there is not, so that starting it would be an error."""
  recipe = {
    "merge_method": "dare_ties",
    "base_model": str(models / "base.safetensors"),
    "models": [
      {
        "model": str(models / f"{name}.safetensors"),
        "parameters": {"weight": 0.5, "density": 0.5},
      }
      for name in "ab"
    ],
  }
  (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
  command = [sys.executable, "-m", "jlora.commands.merge"]
  command += [f"--config={tmp_path}/recipe.yml", f"--out={tmp_path}/out"]
  command += [f"--cache={tmp_path}/cache"]
  done = subprocess.run(
    command, env={**os.environ, "JAX_PLATFORMS": "none"}, capture_output=True
  )
  assert done.returncode == 0, done.stderr.decode()
  assert not (tmp_path / "cache").exists()


def test_what_others_wrote_is_compiled():
  def own(stack, weights, base, *, key):
    return jnp.sum(stack, axis=0)

  assert not works_on_host(own)
  assert not works_on_host(functools.partial(ties, elect=jnp.sign))
  assert works_on_host(functools.partial(linear, normalize=False))


def test_the_limit_is_of_all_tensors_of_a_program():
  half = on_host.LIMIT // 2
  assert small_programs([("a", half), ("b", half), ("a", half - 1)]) == {
    "a", "b"
  }  # fmt: skip
  assert small_programs([("a", half), ("b", half), ("a", half)]) == {"b"}


def test_a_large_tensor_is_compiled(models, monkeypatch, tmp_path):
  """Its copies would take more memory than a program does."""
  seen = []
  was = mergers.Merger.is_on_host
  monkeypatch.setattr(
    mergers.Merger,
    "is_on_host",
    lambda self, job: seen.append((job.name, was(self, job))) or seen[-1][1],
  )
  monkeypatch.setattr(mergers, "LARGEST", 100)
  merged(recipe_of("ties", models), tmp_path / "out")
  assert dict(seen) == {"w": False, "v": True, "e": True}
