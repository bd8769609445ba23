# SPDX-License-Identifier: Apache-2.0
"""A LoRA and a branch on a model of digits: what is compared, is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from experiments import digits_composition
from experiments.digits_composition import (
  BOTH,
  SMOKE,
  Sampler,
  as_table,
  compose,
  figure_rows,
)
from experiments.lib.data.digits import Judges, judge, rotate
from experiments.lib.figures import digit_samples
from experiments.lib.models.digit_models import (
  Denoiser,
  blur,
  denoise,
  init_control,
  init_model,
  shuffle,
  with_hint,
)
from jlora.training import trainer


@pytest.fixture(scope="module")
def small():
  return init_model(Denoiser(16, 1), jax.random.key(0))


def loras_of(params):
  found = {}
  for path, leaf in jlora.paths.flatten(params).items():
    if path.endswith("kernel"):
      a, b = (
        0.1 * jax.random.normal(jax.random.key(i), (2, size))
        for i, size in enumerate(leaf.shape)
      )
      found[path] = jlora.Lora(a, b, jnp.float32(1))
  return found


def grown(branches):
  """Branches that write something; no constant, which a norm would undo."""
  key = jax.random.key(5)
  part = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(key, x.shape),
    trainer.trained_part(branches),
  )
  return trainer.with_part(branches, part)


def test_a_fresh_control_is_the_base_and_a_grown_one_hears_each_row(small):
  model, params = small
  x, times, _ = blur(jax.random.key(1), jnp.zeros((4, 64)))
  hint = jax.nn.one_hot(jnp.array([0, 1, 0, 1]), 10)
  fresh = init_control(params, jax.random.key(2))
  assert list(fresh) == ["down_0/kernel"]
  run = jlora.adapt(model, strict=True)
  base = model(params, x, times)
  found = run(jlora.bind(params, with_hint(fresh, hint)), x, times)
  np.testing.assert_array_equal(found, base)

  other = hint.at[1].set(jax.nn.one_hot(7, 10))
  one, two = (
    run(jlora.bind(params, with_hint(grown(fresh), h)), x, times)
    for h in (hint, other)
  )
  moved = np.abs(np.asarray(one - two)).max(axis=1)
  assert moved[1] > 1e-3
  assert moved[[0, 2, 3]].max() == 0


def test_weights_choose_what_is_sampled(small):
  model, params = small
  loras, control = loras_of(params), init_control(params, jax.random.key(2))
  control = grown(control)
  draw = Sampler(model, SMOKE, jax.random.key(3))
  noise = jax.random.normal(jax.random.key(3), (SMOKE.count, 64))
  found = draw(params, loras, control, (0, 0))
  wanted = denoise(model, params, noise, SMOKE.sampling)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  merged = jlora.apply(params, loras)
  style = draw(params, loras, control, (1, 0))
  wanted = denoise(model, merged, noise, SMOKE.sampling)
  np.testing.assert_allclose(style, wanted, atol=1e-4)
  assert np.abs(style - found).max() > 1e-2
  both = draw(params, loras, control, (1, 1))
  np.testing.assert_allclose(
    both, draw(merged, loras, control, (0, 1)), atol=1e-4
  )
  assert np.abs(both - style).max() > 1e-2


def test_shuffling_keeps_entries_and_norms(small):
  loras = loras_of({"exit": small[1]["exit"]})
  other = shuffle(loras, jax.random.key(4))
  for path, lora in loras.items():
    np.testing.assert_array_equal(
      np.sort(lora.a.ravel()), np.sort(other[path].a.ravel())
    )
    one, two = jlora.loras.dense(lora), jlora.loras.dense(other[path])
    np.testing.assert_allclose(
      np.linalg.norm(one), np.linalg.norm(two), rtol=1e-5
    )
    assert np.linalg.norm(one - two) > 0.5 * np.linalg.norm(one)


def test_both_counts_images_that_have_both():
  judges = Judges(
    lambda x: x[:, 0] > 0, lambda x: x[:, 1].astype(int), {"plain, style": 1.0}
  )
  images = np.zeros((4, 64))
  images[:, 0] = [1, 1, 0, 0]
  images[:, 1] = [5, 6, 5, 6]
  cells = judge({"one": images}, judges, np.full(4, 5))
  row = as_table(cells).splitlines()[-1]
  assert row == "| one | 50.0% ± 25.0% | 50.0% ± 25.0% | 25.0% ± 21.7% |"


def test_smoke(capsys, tmp_path, monkeypatch):
  styles = {"rotated": rotate}
  monkeypatch.setattr(digits_composition, "STYLES", styles)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    cells = compose(0, SMOKE)
  assert list(cells) == list(styles)
  said = capsys.readouterr().out
  assert said.count(f"| {BOTH} |") == len(styles)
  assert said.count("LoRA merged") == len(styles)
  rows = figure_rows(cells, 10)
  assert len(rows) == 2 + 3 * len(styles)
  digit_samples.save(tmp_path / "rows.png", rows)
  assert (tmp_path / "rows.png").stat().st_size > 1000
