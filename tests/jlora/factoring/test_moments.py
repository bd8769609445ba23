# SPDX-License-Identifier: Apache-2.0
"""Second moments against the inputs themselves; errors as outputs show them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.loras import Lora, dense
from jlora.paths import flatten
from tests.helpers import tiny_models

RNG = np.random.default_rng(0)


class Twice(nn.Module):
  """Two layers; the first is called again on its own output."""

  @nn.compact
  def __call__(self, x):
    first = nn.Dense(6, name="first")
    y = jnp.tanh(first(jnp.tanh(first(x))))
    return nn.Dense(4, use_bias=False, name="last")(y)


class Nested(nn.Module):
  """A table of words and a module within a module."""

  @nn.compact
  def __call__(self, tokens):
    return Twice(name="body")(nn.Embed(9, 6, name="embed")(tokens))


TOKENS = [RNG.integers(0, 9, shape) for shape in ((2, 5), (3, 4), (2, 5))]
PARAMS = Nested().init(jax.random.key(0), TOKENS[0])["params"]


def bare(params, tokens):
  return Nested().apply({"params": params}, tokens)


def inputs(params, tokens):
  """What each kernel reads, in float64."""
  body = jax.tree.map(lambda w: np.asarray(w, np.float64), params["body"])
  x = np.asarray(params["embed"]["embedding"], np.float64)[tokens]
  x = x.reshape(-1, 6)
  first = lambda x: np.tanh(  # noqa: E731
    x @ body["first"]["kernel"] + body["first"]["bias"]
  )
  return {
    "body/first/kernel": np.concatenate([x, first(x)]),
    "body/last/kernel": first(first(x)),
  }


def test_moments_are_those_of_the_inputs():
  found = jlora.factoring.second_moments(bare, PARAMS, iter(TOKENS))
  read = [inputs(PARAMS, tokens) for tokens in TOKENS]
  assert set(found) == set(read[0])
  for path, moment in found.items():
    x = np.concatenate([each[path] for each in read])
    assert moment.count == len(x)
    assert moment.total.dtype == np.float32
    np.testing.assert_allclose(moment.total, x.T @ x, rtol=1e-4, atol=1e-5)


def test_paths_are_those_of_the_tree_that_was_given():
  found = jlora.factoring.second_moments(
    Nested().apply, {"params": PARAMS}, TOKENS[:1]
  )
  assert set(found) == {"params/body/first/kernel", "params/body/last/kernel"}


def test_other_parameters_do_not_trace_again():
  traces = []

  def counted(params, tokens):
    traces.append(tokens.shape)
    return bare(params, tokens)

  for factor in (1.0, 2.0):
    params = jax.tree.map(lambda w, f=factor: w * np.float32(f), PARAMS)
    jlora.factoring.second_moments(counted, params, TOKENS)
  assert traces == [(2, 5), (3, 4)]


def test_bfloat16_inputs_add_up_in_float32():
  model = nn.Dense(2, dtype=jnp.bfloat16, name=None)
  x = jnp.ones((4096, 3), jnp.bfloat16)
  params = model.init(jax.random.key(0), x)
  found = jlora.factoring.second_moments(model.apply, params, [x])
  assert found["params/kernel"].total.max() == 4096


@pytest.mark.parametrize("case", ["llama-tied", "mixtral", "gpt2"])
def test_every_kernel_of_our_models_has_a_moment(case):
  _, apply, params = tiny_models.load_model(case)
  tokens = RNG.integers(0, tiny_models.VOCABULARY, (2, 7)).astype(np.int32)
  found = jlora.factoring.second_moments(apply, params, [tokens, tokens[:1]])
  kernels = {p: x for p, x in flatten(params).items() if p.endswith("kernel")}
  assert found.keys() == kernels.keys()
  for path, moment in found.items():
    width = kernels[path].shape[0]
    assert moment.total.shape == (width, width)
    # Every expert computes every token.
    assert moment.count == 21
    assert np.linalg.eigvalsh(moment.total)[0] > -1e-3 * moment.total.max()


def test_the_first_layer_of_a_decoder_reads_normed_embeddings():
  _, apply, params = tiny_models.load_model("llama-tied")
  tokens = RNG.integers(0, tiny_models.VOCABULARY, (2, 7)).astype(np.int32)
  found = jlora.factoring.second_moments(apply, params, [tokens])
  x = np.asarray(params["embed"]["embedding"], np.float64)[tokens]
  x = x.reshape(-1, x.shape[-1])
  x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  x *= np.asarray(params["layers"]["0"]["attn_norm"]["scale"])
  for name in ("q", "k", "v"):
    np.testing.assert_allclose(
      found[f"layers/0/attn/{name}/kernel"].total, x.T @ x, rtol=1e-4, atol=1e-4
    )


class Scanned(nn.Module):
  """Two layers as one, scanned."""

  @nn.compact
  def __call__(self, x):
    def body(module, x, _):
      del module
      return nn.Dense(4, name="dense")(x), None

    scan = nn.scan(
      body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    return scan(self, x, None)[0]


def test_scanned_layers_are_refused_by_name():
  x = np.ones((3, 4), np.float32)
  params = Scanned().init(jax.random.key(0), x)
  with pytest.raises(
    ValueError, match=r"within nn\.scan, nn\.remat or nn\.vmap"
  ):
    jlora.factoring.second_moments(Scanned().apply, params, [x])


def delta_and_lora():
  delta = RNG.standard_normal((6, 4)).astype(np.float32)
  a = RNG.standard_normal((2, 6)).astype(np.float32)
  b = RNG.standard_normal((2, 4)).astype(np.float32)
  return delta, Lora(a, b, np.float32(0.3))


@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
def test_the_weighted_error_is_that_of_the_outputs(like):
  delta, lora = delta_and_lora()
  x = RNG.standard_normal((50, 6)) * np.geomspace(1, 1e-3, 6)
  moment = jlora.factoring.Moment(like(np.float32(x.T @ x)), 50)
  rest = delta - np.asarray(dense(jax.tree.map(jnp.asarray, lora)))
  wanted = np.linalg.norm(x @ rest) / np.linalg.norm(x @ delta)
  found = jlora.factoring.weighted_error(like(delta), lora, moment)
  assert found == pytest.approx(wanted, rel=1e-5)


def test_white_inputs_give_the_plain_error():
  delta, lora = delta_and_lora()
  rows = jlora.compare({"w": 0 * delta}, {"w": delta}, {"w": lora}).rows
  found = jlora.factoring.weighted_error(
    delta, lora, 7 * np.eye(6, dtype=np.float32)
  )
  assert found == pytest.approx(rows["w"]["relative_error"], rel=1e-5)


def test_nothing_is_lost_where_nothing_is_read():
  delta, lora = delta_and_lora()
  assert (
    jlora.factoring.weighted_error(delta, lora, np.zeros((6, 6), np.float32))
    == 0
  )


def test_what_is_refused():
  delta, lora = delta_and_lora()
  with pytest.raises(ValueError, match=r"delta \(4, 6\), a \(2, 6\)"):
    jlora.factoring.weighted_error(delta.T, lora, np.eye(6))
  with pytest.raises(ValueError, match=r"moment \(4, 4\) do not fit"):
    jlora.factoring.weighted_error(delta, lora, np.eye(4))
  with pytest.raises(ValueError, match=r"No input of an nn\.Dense was seen"):
    jlora.factoring.second_moments(bare, PARAMS, [])
  with pytest.raises(ValueError, match=r"No input of an nn\.Dense was seen"):
    jlora.factoring.second_moments(
      lambda params, x: x @ params, np.eye(5), [np.eye(5)]
    )
  other = lambda params, tokens: bare(params["a"], tokens)  # noqa: E731
  with pytest.raises(ValueError, match="2 kernels are not in params: body/fir"):
    jlora.factoring.second_moments(other, {"a": PARAMS}, TOKENS)
