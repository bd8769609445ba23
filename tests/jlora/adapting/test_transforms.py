# SPDX-License-Identifier: Apache-2.0
"""Parameters with an adapter in them, against float32 sums by NumPy."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jlora
from jlora.adapting.transforms import apply
from jlora.loras import Lora
from jlora.views import EXPERTS_IN_OUT_VIEWS
from tests.helpers.small_pairs import draw

BF16 = ml_dtypes.bfloat16
RANK = 2


def lora(inputs, outputs, batch=(), scale=0.5, seed=0):
  """Whole numbers of 7 bits, whose products are exact in float32."""
  rng = np.random.default_rng(seed)
  a = rng.integers(-127, 128, (*batch, RANK, inputs)).astype(np.float32)
  b = rng.integers(-127, 128, (*batch, RANK, outputs)).astype(np.float32)
  return Lora(
    jnp.asarray(a), jnp.asarray(b), jnp.full(batch, scale, jnp.float32)
  )


def change_of(lora):
  """(..., in, out) float32, exact."""
  product = np.einsum("...ri,...ro->...io", lora.a, lora.b)
  return np.asarray(lora.scale)[..., None, None] * product


def torch_conv(matrix):
  return matrix.reshape(4, 3, 3, 6).transpose(3, 0, 1, 2)


def flax_conv(matrix):
  return matrix.reshape(3, 3, 4, 6)


def heads(matrix):
  return matrix.reshape(4, 2, 3)


def q_einsum(matrix):
  return matrix.reshape(4, 2, 3).transpose(1, 0, 2)


def transposed(matrix):
  return np.swapaxes(matrix, -1, -2)


# A parameter's name, its (..., in, out), and that matrix in the name's layout.
LAYOUTS = [
  ("m.q_proj.weight", (4, 6), transposed),
  ("m.conv.weight", (36, 6), torch_conv),
  ("m.embed_tokens.weight", (4, 6), np.asarray),
  ("m.experts.gate_up_proj", (3, 4, 6), transposed),
  ("m.experts.2.up_proj.weight", (4, 6), transposed),
  ("layers/0/q/kernel", (4, 6), np.asarray),
  ("layers/0/conv_in/kernel", (36, 6), flax_conv),
  ("layers/0/query/kernel", (4, 6), heads),
  ("layers/0/q_einsum/w", (4, 6), q_einsum),
  ("layers/mlp/up/kernel", (3, 4, 6), np.asarray),
]


@pytest.mark.parametrize(("name", "shape", "lay"), LAYOUTS)
def test_layouts_get_the_float32_sum_rounded_once(name, shape, lay):
  *batch, inputs, outputs = shape
  given = lora(inputs, outputs, tuple(batch))
  change = lay(change_of(given))
  leaf = (1000 * draw(*change.shape)).astype(BF16)
  found = apply({name: jnp.asarray(leaf)}, {name: given})[name]
  expected = (leaf.astype(np.float32) + change).astype(BF16)
  twice = leaf.astype(np.float32) + change.astype(BF16).astype(np.float32)
  assert np.any(twice.astype(BF16) != expected)  # once is not twice
  assert found.dtype == BF16
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_each_leaf_keeps_its_own_dtype(dtype):
  given = lora(4, 6)
  leaf = draw(4, 6).astype(dtype)
  found = apply({"w": jnp.asarray(leaf)}, {"w": given})["w"]
  expected = (leaf.astype(np.float32) + change_of(given)).astype(dtype)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, expected)


def tree():
  """A nested tree of two kernels and what is no matrix."""
  kernels = [{"kernel": jnp.asarray(draw(4, 6, seed=at))} for at in range(2)]
  return {
    "layers": kernels,
    "norm": (jnp.ones(3), np.ones(2)),
    "step": jnp.int32(7),
  }


def test_other_leaves_are_the_same_objects():
  params, given = tree(), lora(4, 6)
  found = apply(params, {"layers/1/kernel": given})
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert found["layers"][0]["kernel"] is params["layers"][0]["kernel"]
  assert found["norm"][0] is params["norm"][0]
  assert found["norm"][1] is params["norm"][1]
  assert found["step"] is params["step"]
  np.testing.assert_array_equal(
    params["layers"][1]["kernel"], draw(4, 6, seed=1)
  )
  expected = draw(4, 6, seed=1) + change_of(given)
  np.testing.assert_array_equal(found["layers"][1]["kernel"], expected)


def test_an_empty_adapter_changes_nothing():
  params = tree()
  found = apply(params, {})
  assert all(
    left is right
    for left, right in zip(
      jax.tree.leaves(found), jax.tree.leaves(params), strict=True
    )
  )


def test_under_jit_and_scale_swept_without_a_new_trace():
  chex.clear_trace_counter()
  summed = jax.jit(chex.assert_max_traces(apply, n=1))
  params = {"w": jnp.asarray(draw(4, 6).astype(BF16))}
  for scale in (0.5, 2.0):
    given = {"w": lora(4, 6, scale=scale)}
    np.testing.assert_array_equal(
      summed(params, given)["w"], apply(params, given)["w"]
    )


def test_gradients_reach_factors_and_parameters():
  given = lora(4, 6)
  loss = lambda params, loras: jnp.sum(apply(params, loras)["w"])  # noqa: E731
  params, loras = jax.grad(loss, (0, 1))({"w": jnp.zeros((4, 6))}, {"w": given})
  np.testing.assert_array_equal(params["w"], np.ones((4, 6)))
  expected = 0.5 * np.asarray(given.b).sum(-1, keepdims=True)
  np.testing.assert_array_equal(
    loras["w"].a, np.broadcast_to(expected, (RANK, 4))
  )


def test_views_given_go_before_those_of_the_names():
  name, given = "m.experts.down_proj", lora(4, 4, (3,))
  leaf = draw(3, 4, 4)
  for views, change in (
    (None, transposed(change_of(given))),
    (EXPERTS_IN_OUT_VIEWS, change_of(given)),
  ):
    found = apply({name: jnp.asarray(leaf)}, {name: given}, views=views)
    np.testing.assert_array_equal(found[name], leaf + change)


def test_no_parameter_of_that_name():
  loras = {f"x{at}": lora(4, 6) for at in range(4)}
  with pytest.raises(ValueError, match=(
    "4 programs have no parameter: x0, x1, x2 and 1 more; there are "
    "layers/0/kernel, layers/1/kernel, norm/0 and 2 more"
  )):  # fmt: skip
    apply(tree(), loras)


def test_shapes_that_do_not_fit_name_both():
  params = {f"w{at}": jnp.zeros((6, 4)) for at in range(4)}
  with pytest.raises(ValueError) as error:  # noqa: PT011
    apply(params, {path: lora(4, 6) for path in params})
  for path in ("w0", "w1", "w2"):
    named = f"{path} float32 (6, 4) for a (2, 4), b (2, 6)"
    assert named in str(error.value)
  assert "4 programs do not fit" in str(error.value)
  assert "w3" not in str(error.value)
  assert "and 1 more" in str(error.value)


@pytest.mark.parametrize(
  ("path", "leaf"),
  [
    ("norm", np.zeros(6, np.float32)),
    ("layers/bias", np.zeros((4, 6), np.float32)),
    ("w", np.zeros((4, 6), np.int8)),
    ("w", np.zeros((3, 4, 6), np.float32)),
  ],
)
def test_what_is_no_floating_matrix_is_refused(path, leaf):
  with pytest.raises(ValueError, match="1 programs do not fit.*floating") as e:
    apply({path: jnp.asarray(leaf)}, {path: lora(4, 6)})
  assert f"{path} {leaf.dtype} {leaf.shape}" in str(e.value)


def test_malformed_loras_are_refused():
  broken = Lora(jnp.ones((2, 4)), jnp.ones((3, 6)), jnp.float32(1))
  with pytest.raises(ValueError, match="1 malformed Lora: w: a"):
    apply({"w": jnp.zeros((4, 6))}, {"w": broken})


def test_scales_over_float16_s_range():
  """What they scale is small: nothing on the way is infinite."""
  half, scale = jnp.float16, jnp.float32(1e5)
  lora = Lora(jnp.full((1, 8), 1e-3, half), jnp.full((1, 8), 1e-3, half), scale)
  params, x = {"w": jnp.zeros((8, 8), half)}, jnp.ones((2, 8), half)
  change = jlora.bind(params, {"w": lora})
  run = lambda p, x: x @ p["w"]  # noqa: E731
  bank = jlora.make_bank([{"w": lora}] * 2)
  for y in (
    jlora.adapt(run)(change, x),
    jlora.adapt(lambda p, x: jnp.einsum("bi,io->ob", x, p["w"]))(change, x),
    jlora.adapt_rows(run)(params, bank, jnp.array([0, 1]), x),
  ):
    np.testing.assert_allclose(np.float32(y), 0.8, rtol=5e-3)
  kernel = {"conv.weight": jnp.zeros((8, 8, 1, 1), half)}
  convolved = jlora.adapt(
    lambda p, x: lax.conv(x, p["conv.weight"], (1, 1), "SAME")
  )(jlora.bind(kernel, {"conv.weight": lora}), jnp.ones((1, 8, 2, 2), half))
  np.testing.assert_allclose(np.float32(convolved), 0.8, rtol=5e-3)
