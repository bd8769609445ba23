# SPDX-License-Identifier: Apache-2.0
"""Extraction from trees: containers, ranks, batches and doors."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.extraction.trees import extract
from jlora.factoring.factorisers import svd
from jlora.loras import dense
from jlora.paths import matching
from jlora.selection import ranks_of
from jlora.training.inits import init_lora
from tests.helpers.small_pairs import draw, write_pair


def tree(seed, dtype=jnp.float32):
  """Two layers of one shape, so that all tests share a compilation."""
  names = ("layer_0", "layer_1")
  return {
    name: {
      "kernel": jnp.asarray(draw(6, 5, seed=seed + at)).astype(dtype),
      "bias": jnp.zeros(5, dtype),
    }
    for at, name in enumerate(names)
  }


BASE, FINETUNED = tree(0, jnp.bfloat16), tree(10)
PATHS = ["layer_0/kernel", "layer_1/kernel"]


def exact(path, base=BASE, finetuned=FINETUNED):
  layer, leaf = path.split("/")
  sides = (np.asarray(t[layer][leaf], np.float64) for t in (base, finetuned))
  left, right = sides
  return right - left


def best(delta, rank):
  u, s, vt = np.linalg.svd(delta, full_matrices=False)
  return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def same(left, right):
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_mixed_dtypes_give_the_best_change():
  loras = extract(BASE, FINETUNED, rank=2)
  assert list(loras) == PATHS
  for path, lora in loras.items():
    assert (lora.a.shape, lora.b.shape) == ((2, 6), (2, 5))
    assert lora.a.dtype == lora.b.dtype == jnp.float32
    np.testing.assert_allclose(dense(lora), best(exact(path), 2), atol=1e-5)


def test_storage_dtype_is_the_callers():
  loras = extract(BASE, FINETUNED, rank=2, dtype=jnp.bfloat16)
  assert loras[PATHS[0]].a.dtype == jnp.bfloat16
  assert loras[PATHS[0]].b.dtype == jnp.bfloat16


def test_jitted_and_eager_agree():
  eager = extract(BASE, FINETUNED, rank=2)
  jitted = jax.jit(functools.partial(extract, rank=2))(BASE, FINETUNED)
  for path in PATHS:
    np.testing.assert_allclose(
      dense(jitted[path]), dense(eager[path]), atol=1e-5
    )


def test_unchanged_modules_keep_the_structure():
  loras = extract(BASE, BASE, rank=2)
  assert list(loras) == PATHS
  assert all(not np.any(dense(lora)) for lora in loras.values())


def test_rank_by_path_leaves_others_out_and_clips():
  with pytest.warns(
    UserWarning, match=r"layer_1/kernel: rank 5 of \(6, 5\), 55 "
  ):
    loras = extract(BASE, FINETUNED, rank={PATHS[1]: 64})
  assert list(loras) == [PATHS[1]]
  assert loras[PATHS[1]].rank == 5


def test_subset_and_order_do_not_change_the_factors():
  both = extract(BASE, FINETUNED, rank=2)
  one = extract(BASE, FINETUNED, rank=2, select=matching(".*_1/kernel"))
  same(one[PATHS[1]], both[PATHS[1]])
  turned = [dict(reversed(t.items())) for t in (BASE, FINETUNED)]
  same(extract(*turned, rank=2), both)


def test_the_key_reaches_the_factoriser():
  seen = []

  def spy(delta, rank, key):
    seen.append(np.asarray(key))
    return svd(delta, rank, key)

  extract(BASE, FINETUNED, rank=1, factor=spy)
  extract(BASE, FINETUNED, rank=1, factor=spy, key=jax.random.key(1))
  assert len({tuple(key.tolist()) for key in seen}) == 4


def test_linen_variables():
  model = nn.Dense(5, use_bias=False)
  base = model.init(jax.random.key(0), jnp.ones((1, 6)))
  finetuned = jax.tree.map(lambda w: w + 1.0, base)
  loras = extract(base, finetuned, rank=1)
  assert list(loras) == ["params/kernel"]
  np.testing.assert_allclose(dense(loras["params/kernel"]), 1.0, atol=1e-5)


def test_nnx_state():
  state = nnx.state(
    nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0)), nnx.Param
  )
  finetuned = jax.tree.map(lambda w: w + 1.0, state)
  loras = extract(state, finetuned, rank=1)
  assert list(loras) == ["kernel"]
  np.testing.assert_allclose(dense(loras["kernel"]), 1.0, atol=1e-5)


@pytest.mark.parametrize(
  ("path", "shape", "matrix", "beside"),
  [
    ("blocks/kernel", (3, 6, 5), (3, 6, 5), {"blocks/norm": np.ones((3, 6))}),
    ("attn/q/kernel", (6, 2, 4), (6, 8), {}),  # (in, head, out)
    ("conv/kernel", (3, 3, 2, 4), (18, 4), {}),
  ],
)
def test_batched_and_folded_leaves(path, shape, matrix, beside):
  base, finetuned = (draw(*shape, seed=seed) for seed in (0, 1))
  loras = extract({path: base, **beside}, {path: finetuned, **beside}, rank=2)
  lora = loras[path]
  assert lora.a.shape == (*matrix[:-2], 2, matrix[-2])
  assert lora.scale.shape == matrix[:-2]
  delta = (finetuned.astype(np.float64) - base).reshape(matrix)
  np.testing.assert_allclose(dense(lora), best(delta, 2), atol=1e-4)


SHORT = jax.tree.map(lambda w: w[:3], FINETUNED)


def without(path):
  return {k: v for k, v in FINETUNED.items() if k != path}


@pytest.mark.parametrize(
  ("finetuned", "options", "message"),
  [
    (without("layer_1"), {}, "only in base: layer_1/bias, layer_1/kernel"),
    (SHORT, {}, r"\(6, 5\) against \(3, 5\)"),
    (FINETUNED, {"rank": 0}, "at least 1, got layer_0/kernel: 0"),
    (FINETUNED, {"rank": {PATHS[0]: -1}}, "at least 1, got layer_0/kernel: -1"),
    (FINETUNED, {"rank": {"layer_7/kernel": 2}}, "layer_7/kernel; there are"),
    (FINETUNED, {"rank": {}}, "no path at all"),
    (FINETUNED, {"select": matching("none")}, "No matrix was selected"),
    (FINETUNED, {"views": ()}, "No matrix was selected"),
  ],
)  # fmt: skip
def test_errors_at_the_door(finetuned, options, message):
  with pytest.raises(ValueError, match=message):
    extract(BASE, finetuned, **options)


def test_ranks_of_many_unknown_paths_are_counted():
  with pytest.raises(ValueError, match="names 5 paths"):
    ranks_of({f"x{i}": 1 for i in range(5)}, ["q"])


def test_open_checkpoints_that_do_not_line_up(tmp_path):
  """A prefix, a tied head, a grown vocabulary and fused experts at once."""
  experts = [f"model.layers.0.mlp.experts.{e}" for e in range(2)]
  singles = {
    f"{expert}.{part}.weight": draw(5, 5, seed=10 * e + at)
    for e, expert in enumerate(experts)
    for at, part in enumerate(("gate_proj", "up_proj"))
  }
  fused = np.stack([
    np.concatenate([singles[f"{x}.{p}.weight"] + 1
                    for p in ("gate_proj", "up_proj")])
    for x in experts
  ])  # fmt: skip
  q = draw(5, 5, seed=3)
  base = {
    "model.layers.0.q_proj.weight": q,
    "model.embed_tokens.weight": draw(7, 5),
    **singles,
  }
  finetuned = {
    "language_model.model.layers.0.q_proj.weight": q + 1,
    "language_model.model.embed_tokens.weight": draw(9, 5),
    "language_model.model.layers.0.mlp.experts.gate_up_proj": fused,
  }
  sides = map(open_checkpoint, write_pair(tmp_path, base, finetuned))
  with pytest.warns(UserWarning, match="1 tensors are left out: model.embed_t"):
    loras = extract(*sides, rank=1)
  assert set(loras) == {"model.layers.0.q_proj.weight", *singles}
  for lora in loras.values():
    np.testing.assert_allclose(dense(lora), 1.0, atol=1e-4)


def test_a_tied_head_is_compared_with_the_table(tmp_path):
  table = draw(5, 5)
  base = {"model.embed_tokens.weight": table}
  finetuned = {"model.embed_tokens.weight": table, "lm_head.weight": table + 1}
  sides = map(open_checkpoint, write_pair(tmp_path, base, finetuned))
  loras = extract(*sides, rank=1)
  np.testing.assert_allclose(dense(loras["lm_head.weight"]), 1.0, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_change_that_is_not_finite_gives_a_scale_of_nan(bad):
  base = {"good": jnp.ones((5, 4)), "bad": jnp.ones((5, 4))}
  finetuned = {"good": base["good"] + 1, "bad": base["bad"].at[2, 1].set(bad)}
  loras = extract(base, finetuned, rank=2)
  assert np.isnan(loras["bad"].scale)
  np.testing.assert_allclose(dense(loras["good"]), 1.0, atol=1e-5)


def test_gpt2_is_read_as_its_config_says(tmp_path):
  name = "transformer.h.0.mlp.c_fc.weight"
  sides = write_pair(tmp_path, {name: draw(4, 7)}, {name: draw(4, 7, seed=1)})
  for side in sides:
    (side / "config.json").write_text('{"model_type": "gpt2"}')
  assert extract(*map(open_checkpoint, sides), rank=1)[name].a.shape == (1, 4)


NO_ARRAYS = {
  "float": 3.0,
  "int": 2,
  "string": "mlp",
  "none": None,
  "function": jnp.tanh,
  "custom function": jax.nn.relu,
  "class": np.float32,
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_leaves_that_are_no_arrays_are_passed_over(kind, recwarn):
  leaf = NO_ARRAYS[kind]
  base = {"w": np.zeros((4, 5), np.float32), "other": leaf}
  loras = extract(base, {**base, "w": base["w"] + 1}, rank=1)
  assert list(loras) == ["w"]
  assert list(init_lora(base, 1)) == ["w"]
  assert list(jlora.compare(base, base, loras).rows) == ["w"]
  assert not recwarn.list


@pytest.mark.parametrize(("one", "two"), [(3.0, 4.0), (2, 3)])
def test_numbers_of_python_that_differ_are_named(one, two):
  base = {"w": np.zeros((4, 5), np.float32), "step": one}
  with pytest.warns(UserWarning, match="1 leaves that differ .* out: step"):
    extract(base, {**base, "step": two}, rank=1)


@pytest.mark.filterwarnings("ignore:.*hold more numbers than their weights")
def test_an_equinox_module_with_its_functions():
  one, two = (
    eqx.nn.MLP(6, 5, 16, 2, key=jax.random.key(seed)) for seed in (0, 1)
  )
  programs = extract(one, two, rank=16, shifts=True)
  assert "layers/0/weight" in programs
  assert "layers/2/bias" in programs
  x = jnp.linspace(-1, 1, 6)
  np.testing.assert_allclose(jlora.apply(one, programs)(x), two(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0,)])
@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("options", [{}, {"select": lambda path, leaf: True}])
def test_parameters_without_entries_are_passed_over(shape, like, options):
  base = {"w": np.zeros((4, 5), np.float32), "z": np.zeros(shape, np.float32)}
  base = jax.tree.map(like, base)
  finetuned = {**base, "w": base["w"] + 1}
  programs = extract(base, finetuned, rank=1, shifts=True, **options)
  assert list(programs) == ["w"]
  assert list(init_lora(base, 1, **options)) == ["w"]
  jax.jit(functools.partial(extract, rank=1, **options))(base, finetuned)
  assert jlora.compare(base, finetuned, programs).totals["error"] < 1e-4
