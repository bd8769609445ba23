# SPDX-License-Identifier: Apache-2.0
"""Adapters that begin as a part of the base: nothing is lost, none is added."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jlora.application import apply
from jlora.factoring import svd
from jlora.loras import Lora, dense
from jlora.starts import (
  orthogonal,
  principal,
  relative_to_base,
  split_base,
)

EXACT = functools.partial(principal, factor=svd)
STARTS = pytest.mark.parametrize("start", [principal, orthogonal, EXACT])


def test_pissa_of_a_diagonal_matrix():
  params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
  loras, rest = split_base(params, 1, alpha=1)
  a, root = np.abs(loras["w"].a), np.sqrt(3)
  np.testing.assert_allclose(a, [[root, 0, 0]], atol=1e-5)
  np.testing.assert_allclose(rest["w"], np.diag([0.0, 2.0, 1.0]), atol=1e-5)


@pytest.fixture
def params():
  """NumPy's: factored on the host, without compiling."""
  rng = np.random.default_rng(0)
  return {
    "q": {"kernel": rng.standard_normal((12, 8), np.float32),
          "bias": np.ones(8, np.float32)},
    "layers": {"kernel": rng.standard_normal((2, 6, 9), np.float32)},
  }  # fmt: skip


@STARTS
def test_rest_and_adapter_sum_to_the_base(params, start):
  loras, rest = split_base(params, 3, start=start, alpha=5)
  assert rest["q"]["bias"] is params["q"]["bias"]
  assert float(jnp.abs(rest["q"]["kernel"] - params["q"]["kernel"]).max()) > 0.1
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=3e-6),
    apply(rest, loras),
    params,
  )


@STARTS
@pytest.mark.parametrize("moved", [False, True])
def test_training_on_the_rest_is_a_plain_adapter_of_the_base(
  params, key, start, moved
):
  loras, rest = split_base(params, 2, start=start, alpha=3)
  trained = {
    path: Lora(
      lora.a + float(moved) * np.array(jax.random.normal(key, lora.a.shape)),
      lora.b * (1 + moved),
      lora.scale,
    )
    for path, lora in loras.items()
  }
  plain = relative_to_base(trained, loras)
  assert {lora.rank for lora in plain.values()} == {4}
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=2e-5),
    apply(params, plain),
    apply(rest, trained),
  )
  if not moved:
    for lora in plain.values():
      np.testing.assert_allclose(dense(lora), 0, atol=1e-6)


def test_scales_that_changed_are_honoured(params):
  loras, _ = split_base(params, 2)
  doubled = {
    path: Lora(lora.a, lora.b / 2, 2 * lora.scale)
    for path, lora in loras.items()
  }
  for lora in relative_to_base(doubled, loras).values():
    np.testing.assert_allclose(dense(lora), 0, atol=1e-6)


@pytest.mark.parametrize(
  ("start", "name"), [(EXACT, "pissa"), (orthogonal, "olora")]
)
def test_starts_are_pefts(start, name, key):
  """The same residual and the same product as the peer's own layer."""
  n_in, n_out, r, alpha = 9, 7, 3, 6
  w = np.array(jax.random.normal(key, (n_in, n_out)))
  net = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
  net[0].weight.data = torch.from_numpy(w.T.copy())
  config = peft.LoraConfig(
    r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=name
  )
  layer = peft.get_peft_model(net, config).base_model.model[0]
  theirs = layer.get_delta_weight("default").detach().numpy().T
  left = layer.base_layer.weight.detach().numpy().T
  loras, rest = split_base({"w": jnp.asarray(w)}, r, start=start, alpha=alpha)
  np.testing.assert_allclose(dense(loras["w"]), theirs, atol=1e-5)
  np.testing.assert_allclose(rest["w"], left, atol=1e-5)
  norms = [
    np.linalg.norm(x.weight.detach().numpy())
    for x in (layer.lora_A.default, layer.lora_B.default)
  ]
  found = [np.linalg.norm(x) for x in (loras["w"].a, loras["w"].b)]
  np.testing.assert_allclose(found, norms, rtol=1e-4)


def test_mistakes_are_named(params):
  with pytest.raises(ValueError, match=r"q/kernel: 9 for \(12, 8\)"):
    split_base(params, 9)
  loras, _ = split_base(params, 2)
  with pytest.raises(ValueError, match="only in start: layers/kernel"):
    relative_to_base({"q/kernel": loras["q/kernel"]}, loras)
