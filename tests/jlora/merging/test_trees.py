# SPDX-License-Identifier: Apache-2.0
"""Merges of whole models: names, shapes, tied leaves, settings by path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.loras import Lora


def model(seed, **more):
  rng = np.random.default_rng(seed)
  return {
    "layers": [
      {"w": jnp.float32(rng.standard_normal((4, 3))), "b": jnp.ones(3)}
      for _ in range(2)
    ],
    "head": jnp.bfloat16(rng.standard_normal(5)),
    **more,
  }


def test_each_leaf_keeps_its_place_and_dtype():
  first, second = model(0), model(1)
  merged = jlora.merge([first, second], weights=[1.0, 3.0])
  assert jax.tree.structure(merged) == jax.tree.structure(first)
  wanted = first["layers"][1]["w"] * 0.25 + second["layers"][1]["w"] * 0.75
  np.testing.assert_allclose(merged["layers"][1]["w"], wanted, atol=1e-6)
  assert merged["head"].dtype == jnp.bfloat16


def test_dtypes_may_differ_and_are_rounded_once():
  short, exact = {"w": jnp.bfloat16([1.0])}, {"w": jnp.float32([1 + 2**-7])}
  merged = jlora.merge([short, exact], weights=[0.0, 1.0])["w"]
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(merged), [1 + 2**-7])
  merged = jlora.merge([exact, short], weights=[0.5, 0.5])["w"]
  np.testing.assert_array_equal(merged, [1 + 2**-8])


def test_mappings_that_are_no_pytrees_give_a_flat_one():
  class Lazy(dict):  # as an open checkpoint
    pass

  models = [Lazy({"a.w": np.ones(2, np.float32) * i}) for i in (1, 3)]
  merged = jlora.merge(models)
  assert list(merged) == ["a.w"]
  np.testing.assert_allclose(merged["a.w"], [2, 2])


def test_settings_by_path_and_their_weights():
  models = [{"q": jnp.zeros(2), "k": jnp.zeros(2)} for _ in range(2)]
  models[1] = jax.tree.map(lambda x: x + 1, models[1])

  def settings(path):
    return {"weights": [1.0, 3.0], "normalize": False} if path == "q" else {}

  merged = jlora.merge(models, settings=settings)
  np.testing.assert_allclose(merged["q"], [3, 3])
  np.testing.assert_allclose(merged["k"], [0.5, 0.5])
  merged = jlora.merge(models, settings={"normalize": False})
  np.testing.assert_allclose(merged["q"], [1, 1])


def test_each_parameter_is_drawn_by_its_name():
  base = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
  ones = jax.tree.map(lambda x: x + 1, base)
  run = functools.partial(
    jlora.merge, method=jlora.merging.dare, settings={"density": 0.5}
  )
  both = run([ones], base=base)
  assert not np.array_equal(both["a"], both["b"])
  alone = run([{"b": ones["b"]}], base={"b": base["b"]})
  np.testing.assert_array_equal(alone["b"], both["b"])
  other = run([ones], base=base, key=jax.random.key(1))
  assert not np.array_equal(other["a"], both["a"])
  assert set(np.unique(both["a"])) == {0, 2}


def test_tied_weights_are_merged_once():
  def tied(value):
    shared = jnp.full(64, value)
    return {"embed": shared, "head": shared}

  base, one = tied(0.0), tied(1.0)
  method = functools.partial(jlora.merging.dare, density=0.5)
  merged = jlora.merge([one], method=method, base=base)
  assert merged["embed"] is merged["head"]


def test_adapters_are_told_by_their_type():
  rng = np.random.default_rng(0)

  def adapter(rank):
    a, b = (rng.standard_normal((rank, n), np.float32) for n in (4, 3))
    return {"q": Lora(a, b, np.float32(2))}

  one, two = adapter(1), adapter(2)
  merged = jlora.merge(
    [one, two], method=jlora.merging.concat, weights=[1.0, -1.0]
  )
  assert merged["q"].rank == 3
  wanted = jlora.loras.dense(one["q"]) - jlora.loras.dense(two["q"])
  np.testing.assert_allclose(jlora.loras.dense(merged["q"]), wanted, atol=1e-5)
  ties = functools.partial(jlora.merging.core_space, method=jlora.merging.ties)
  assert jlora.merge([one, two], method=ties)["q"].rank == 3
  with pytest.raises(ValueError, match="q: linear merges arrays and was given"):
    jlora.merge([one, two])
  with pytest.raises(ValueError, match="q: Loras are changes already"):
    jlora.merge([one, two], method=jlora.merging.concat, base=one)
  with pytest.raises(ValueError, match="differ in shape"):
    jlora.merge([one, {"q": jnp.ones((4, 3))}], method=jlora.merging.concat)


def test_it_can_be_compiled_with_weights_as_an_argument():
  models = [model(0), model(1)]
  run = jax.jit(lambda weights: jlora.merge(models, weights=list(weights)))
  found = run(jnp.array([1.0, 3.0]))
  wanted = jlora.merge(models, weights=[1.0, 3.0])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.float32(x), np.float32(y), atol=1e-6
    ),
    found,
    wanted,
  )
  slope = jax.grad(lambda w: run(w)["layers"][0]["w"].sum())(jnp.ones(2))
  assert np.isfinite(slope).all()


def test_leaves_that_are_not_floating_must_agree():
  models = [model(i, step=jnp.int32(7), name="a") for i in range(2)]
  merged = jlora.merge(models)
  assert (merged["step"], merged["name"]) == (7, "a")
  models[1]["step"] = jnp.int32(8)
  with pytest.raises(ValueError, match="step: not floating and not equal, 7"):
    jlora.merge(models)
  with pytest.raises(ValueError, match="step: not floating, and traced"):
    jax.jit(lambda *models: jlora.merge(models))(
      *({"step": own["step"]} for own in models)
    )


@pytest.mark.parametrize(
  ("models", "more", "why"),
  [
    ([], {}, "at least one"),
    (
      [{"a": 1.0}, {c: 1.0 for c in "bcdef"}],
      {},
      "only in model 0: a; only in model 1: b, c, d and 2 more",
    ),
    ([{"a": 1.0}], {"base": {}}, "only in model 0: a"),
    (
      [{"a": jnp.ones(2)}, {"a": jnp.ones(3)}],
      {},
      r"model 0 and model 1 differ in shape: a: \(2,\) and \(3,\)",
    ),
    (
      [{"a": jnp.ones(2)}, {"a": jnp.ones(2, int)}],
      {},
      r"a: \(2,\) and \(2, 'int32'\)",
    ),
    (
      [{"a": jnp.ones(2)}] * 2,
      {"weights": [1.0, -1.0]},
      "a: weights .* sum to zero",
    ),
    ([{"a": jnp.ones(2)}], {"weights": [1.0, 2.0]}, "a: weights .* one for"),
    (
      [{"a": jnp.ones(2)}],
      {"method": jlora.merging.ties},
      "a: ties .* pass the base",
    ),
  ],
)
def test_the_door(models, more, why):
  with pytest.raises(ValueError, match=why):
    jlora.merge(models, **more)


def test_a_known_mistake_is_found_though_each_merge_is_compiled():
  base = {"a": jnp.ones(2)}
  for density in (1.5, [0.5, -0.1]):
    with pytest.raises(ValueError, match="a: density"):
      jlora.merge(
        [base, base],
        method=jlora.merging.ties,
        base=base,
        settings={"density": density},
      )


def test_one_threshold_for_a_whole_model():
  """TIES' own trimming: a matrix that changed little loses more."""
  rng = np.random.default_rng(0)
  base = {"a": jnp.zeros(50), "b": jnp.zeros((5, 10))}
  models = [
    {
      "a": jnp.float32(rng.standard_normal(50)),
      "b": jnp.float32(0.1 * rng.standard_normal((5, 10))),
      "step": 3,
    }
    for _ in range(2)
  ]
  base["step"] = 3
  found = jlora.merging.magnitude_thresholds(models, base, [0.2, 0.5])
  for own, share, threshold in zip(models, (0.2, 0.5), found, strict=True):
    sizes = np.abs(np.concatenate([own["a"], np.ravel(own["b"])]))
    assert threshold == np.sort(sizes)[-int(share * 100)]
  merged = jlora.merge(
    models[:1],
    method=jlora.merging.ties,
    base=base,
    settings={"threshold": found[:1]},
  )
  assert np.count_nonzero(merged["a"]) + np.count_nonzero(merged["b"]) == 20
  assert np.count_nonzero(merged["b"]) < 5


def test_thresholds_of_sharded_models():
  mesh = jax.make_mesh((8,), ("x",))
  rng = np.random.default_rng(0)
  values = np.float32(rng.standard_normal((16, 3)))
  spec = jax.sharding.PartitionSpec("x")
  placed = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
  zero = jax.tree.map(jnp.zeros_like, placed)
  for model, base in ((placed, zero), (values, 0 * values)):
    found = jlora.merging.magnitude_thresholds(
      [{"w": model}], {"w": base}, 0.25
    )
    assert found[0] == np.sort(np.abs(values).ravel())[-12]


def test_tied_weights_count_once_in_a_threshold():
  shared, none = jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3)
  model = {"embed": shared, "head": shared, "w": jnp.array([9.0])}
  base = {"embed": none, "head": none, "w": jnp.zeros(1)}
  found = jlora.merging.magnitude_thresholds([model], base, 0.3)  # one of four
  np.testing.assert_array_equal(found, [9.0])
  model = {**model, "head": shared + 0}
  found = jlora.merging.magnitude_thresholds([model], base, 0.3)  # two of seven
  np.testing.assert_array_equal(found, [3.0])
