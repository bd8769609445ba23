# SPDX-License-Identifier: Apache-2.0
"""Programs that are no Lora, alone and composed, on one base in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import models
from jlora.adapting.binding import bind
from jlora.adapting.programs import Branch, Rows, Shift, prepend
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from tests.jlora.adapting.test_models import CONFIGS, TOKENS, loras_for

EMBED = "embed/embedding"
UP = "layers/1/mlp/up/kernel"


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.fixture(scope="module")
def small():
  return models.init(CONFIGS["llama, tied"], jax.random.key(0))


def grown(params, rows):
  """The same parameters with a larger table."""
  table = params["embed"]["embedding"]
  return {**params, "embed": {"embedding": jnp.concatenate([table, rows])}}


def larger(count):
  """The same model with so many words more."""
  config = {**CONFIGS["llama, tied"], "vocab_size": 23 + count}
  return models.init(config, jax.random.key(0))[0]


def branch(params, x):
  return jnp.tanh(x @ params["in"]) @ params["out"]


def test_rows_are_a_larger_table_that_the_head_does_not_see(small):
  run, params = small
  rows = draw(1, 2, 16)
  tokens = TOKENS.at[:, 3].set(23).at[0, 5].set(24)
  found = jax.jit(adapt(run))(bind(params, {EMBED: Rows(rows)}), tokens)
  wanted = jax.jit(larger(2))(grown(params, rows), tokens)
  assert found.shape[-1] == 23
  np.testing.assert_allclose(found, wanted[..., :23], rtol=1e-4, atol=1e-5)


LOOKS = {
  "table[ids]": lambda t, i: t[i],
  "take": lambda t, i: jnp.take(t, i, axis=0),
  "one by one": lambda t, i: jnp.stack([t[at] for at in i]),
  "vmap": lambda t, i: jax.vmap(lambda at: t[at])(i),
  "scanned ids": lambda t, i: jax.lax.scan(lambda c, at: (c, t[at]), 0, i)[1],
  "cast and scaled": lambda t, i: (2 * t.astype(jnp.float32))[i] / 2,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("has_lora", [False, True])
def test_further_rows_are_found_however_they_are_looked_up(look, has_lora):
  table, rows, ids = draw(1, 9, 6), draw(2, 2, 6), jnp.array([8, 9, 0, 10])
  lora = Lora(draw(3, 2, 9), draw(4, 2, 6), jnp.float32(1))
  more = [{"t": lora}] if has_lora else []
  merged = apply({"t": table}, {"t": lora})["t"] if has_lora else table
  found = adapt(lambda p, i: LOOKS[look](p["t"], i))(
    bind({"t": table}, [{"t": Rows(rows)}, *more]), ids
  )
  wanted = jnp.concatenate([merged, rows])[ids]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "read",
  [
    lambda t, i: jax.nn.one_hot(i, 9) @ t,
    lambda t, i: jax.lax.dynamic_slice_in_dim(t, i[0], 3),
    lambda t, i: jnp.tanh(t)[i],
    lambda t, i: t + i.sum(dtype="f4")[None, None],
    lambda t, i: t[i, :2],
  ],
)
def test_further_rows_are_not_lost_in_silence(read):
  bound = bind({"t": draw(1, 9, 6)}, {"t": Rows(draw(2, 2, 6))})
  with pytest.raises(ValueError, match="t has 2 further rows"):
    adapt(lambda p, i: read(p["t"], i))(bound, jnp.array([8, 9, 0]))


def test_a_prompt_is_rows_before_the_tokens(small):
  run, params = small
  rows = draw(2, 4, 16)
  tokens = prepend(TOKENS, params["embed"]["embedding"], 4)
  assert tokens.shape == (2, 11)
  bound = bind(params, {EMBED: Rows(rows)})
  found = jax.jit(adapt(run))(bound, tokens)
  np.testing.assert_allclose(
    found,
    larger(4)(grown(params, rows), tokens)[..., :23],
    rtol=1e-4,
    atol=1e-5,
  )
  generate = jax.jit(adapt(lambda p, t: models.generate(run, p, t, 3)))
  said = generate(bound, tokens)  # the cache holds the prompt too
  assert said.shape == (2, 3)
  assert int(said.max()) < 23


def test_a_branch_of_zeros_is_the_base_and_learns(small):
  run, params = small
  own = {"in": draw(3, 16, 4), "out": jnp.zeros((4, 24))}
  base = run(params, TOKENS)

  def logits(own):
    return adapt(run)(bind(params, {UP: Branch(branch, own)}), TOKENS)

  assert np.asarray(logits(own)).tobytes() == np.asarray(base).tobytes()
  grads = jax.grad(lambda own: jnp.sum(jnp.sin(logits(own))))(own)
  assert np.abs(grads["out"]).max() > 0
  assert np.abs(grads["in"]).max() == 0  # ControlNet's zero convolution


def test_a_linear_branch_is_a_lora_whatever_the_orientation():
  a, b = draw(4, 2, 6), draw(5, 2, 8)
  line = Branch(lambda p, x: x @ p[0].T @ p[1], (a, b))
  lora = Lora(a, b, jnp.float32(1))
  w, x = draw(6, 6, 8), draw(7, 5, 6)
  forms = [
    lambda w, x: x @ w,
    lambda w, x: w.T @ x.T,
    lambda w, x: jnp.einsum("td,dhk->htk", x, w.reshape(6, 2, 4)),
  ]
  for form in forms:
    found = adapt(form)(bind({"w": w}, {"w": line})["w"], x)
    wanted = adapt(form)(bind({"w": w}, {"w": lora})["w"], x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_all_kinds_compose_in_one_call(small):
  run, params = small
  loras = loras_for(params)
  rows, norm = draw(8, 1, 16), "norm/scale"
  own = {"in": draw(9, 16, 4), "out": draw(10, 4, 24)}
  tokens = TOKENS.at[:, 2].set(23)
  sets = [
    loras, {EMBED: Rows(rows)}, {norm: Shift(draw(11, 16))},
    {UP: Branch(branch, own)},
  ]  # fmt: skip
  weights = [0.5, 1.0, 2.0, -1.0]
  found = jax.jit(adapt(run))(bind(params, sets, weights), tokens)

  merged = apply(params, [loras, sets[2]], [0.5, 2.0])
  negative = Branch(branch, own, -1.0)
  wanted = jax.jit(adapt(larger(1)))(
    bind(grown(merged, rows), {UP: negative}), tokens
  )[..., :23]
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
  # In any order, and one after the other.
  step = params
  for own_set, weight in reversed(list(zip(sets, weights, strict=True))):
    step = bind(step, [own_set], [weight])
  again = jax.jit(adapt(run))(step, tokens)
  np.testing.assert_allclose(found, again, rtol=1e-3, atol=1e-4)


def test_no_programs_is_the_identity(small):
  run, params = small
  bound = bind(params, [])
  assert jax.tree.structure(bound) == jax.tree.structure(params)
  np.testing.assert_array_equal(adapt(run)(bound, TOKENS), run(params, TOKENS))


def test_negation_forgets(small):
  _, params = small
  loras = loras_for(params)
  there = apply(params, loras)
  back = apply(there, [loras], [-1.0])
  for one, other in zip(*map(jax.tree.leaves, (back, params)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_dropout_is_right_on_average_and_spares_the_base():
  w, x = draw(12, 6, 8), draw(13, 5, 6)
  loras = {"w": Lora(draw(14, 2, 6), draw(15, 2, 8), jnp.float32(0.3))}

  def one(key):
    return adapt(jnp.dot)(x, bind({"w": w}, loras, dropout=(0.4, key))["w"])

  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.vmap(one)(keys)
  exact = x @ apply({"w": w}, loras)["w"]
  error = np.std(found, axis=0) / np.sqrt(len(keys))
  assert np.all(np.abs(found.mean(0) - exact) < 5 * error + 1e-5)
  # Dropping inputs of the branch: the rank of what changes is the Lora's.
  rest = np.asarray(found[0] - x @ w)
  assert np.linalg.matrix_rank(rest, tol=1e-3) <= 2
  assert np.abs(rest - (exact - x @ w)).max() > 1e-2


WRONG = {
  "no parameter": ({"v": Shift(jnp.zeros(2))}, "no parameter: v"),
  "a shift": ({"w": Shift(jnp.zeros(2))}, r"Shift \(2,\)"),
  "rows": ({"w": Rows(jnp.zeros((2, 3)))}, r"Rows \(2, 3\)"),
  "a branch": ({"n": Branch(branch, ())}, "n float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_programs_that_do_not_fit_are_refused(name):
  programs, message = WRONG[name]
  params = {"w": jnp.zeros((6, 8)), "n": jnp.zeros(8)}
  with pytest.raises(ValueError, match=message):
    bind(params, programs)


def test_ids_choose_from_one_bank():
  bank = {"w": Lora(jnp.ones((2, 1, 6)), jnp.ones((2, 1, 8)), jnp.ones(2))}
  with pytest.raises(ValueError, match="one bank, got 2 sets"):
    bind({"w": jnp.zeros((6, 8))}, [bank, bank], ids=0)


def test_weights_are_one_for_each():
  with pytest.raises(ValueError, match="2 weights for 1 adapters"):
    bind({"w": jnp.zeros(2)}, {"w": Shift(jnp.zeros(2))}, [1.0, 2.0])


@pytest.mark.parametrize(
  "program", [Rows(jnp.zeros((2, 8))), Branch(branch, ())]
)
def test_what_has_no_dense_form_is_not_applied(program):
  with pytest.raises(ValueError, match="no dense form"):
    apply({"w": jnp.zeros((6, 8))}, {"w": program})


def test_a_branch_without_a_matmul_is_refused():
  bound = bind({"w": jnp.zeros((6, 8))}, {"w": Branch(branch, ())})
  with pytest.raises(ValueError, match="w has a branch"):
    adapt(lambda p: jnp.sin(p["w"]))(bound)


def test_a_branch_that_writes_the_wrong_width_is_refused():
  bound = bind({"w": jnp.zeros((6, 8))}, {"w": Branch(lambda p, x: x, ())})
  with pytest.raises(ValueError, match=r"wrote \(5, 6\)"):
    adapt(lambda p, x: x @ p["w"])(bound, jnp.ones((5, 6)))
