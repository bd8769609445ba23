# SPDX-License-Identifier: Apache-2.0
"""Fresh adapters: their laws, their scales, and that they change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapting.transforms import apply
from jlora.factoring.factorisers import svd
from jlora.loras import Lora, dense
from jlora.paths import flatten
from jlora.selection import is_linear
from jlora.training.inits import (
  by_rank,
  by_root,
  gaussian,
  init_lora,
  kaiming,
  orthogonal,
  principal,
  relative_to_base,
  reversed_normal,
  split_base,
)
from tests.helpers.tiny_models import load_model

PARAMS = {
  "embed": {"embedding": jnp.ones((11, 6))},
  "layers": {
    "q": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
    "up": {"kernel": jnp.ones((3, 6, 5)), "bias": jnp.ones((3, 5))},  # scanned
  },
}


@pytest.mark.parametrize(
  ("scaling", "scales"),
  [(by_rank, [16, 1, 0.25, 0.0625]), (by_root, [16, 4, 2, 1])],
)
def test_scales_are_those_of_the_papers(scaling, scales):
  assert [scaling(16, rank) for rank in (1, 16, 64, 256)] == scales
  found = init_lora({"w": jnp.ones((300, 300))}, 64, scaling=scaling)
  assert found["w"].scale == scales[2]


@pytest.mark.parametrize("init", [kaiming, gaussian, reversed_normal])
def test_a_fresh_adapter_changes_nothing(init, key):
  loras = init_lora(PARAMS, 2, key, init=init, select=lambda *_: True)
  assert list(loras) == ["embed/embedding", "layers/q/kernel",
                         "layers/up/kernel"]  # fmt: skip
  assert loras["layers/up/kernel"].a.shape == (3, 2, 6)
  assert loras["layers/up/kernel"].scale.shape == (3,)
  chex.assert_trees_all_equal(apply(PARAMS, loras), PARAMS)


def test_embeddings_are_reversed_and_not_taken_unasked(key):
  everything = init_lora(PARAMS, 2, key, select=lambda *_: True)
  table = everything["embed/embedding"]
  assert not table.a.any()
  assert table.b.all()
  assert everything["layers/q/kernel"].a.all()
  assert "embed/embedding" not in init_lora(PARAMS, 2, key)


@pytest.mark.parametrize(
  ("path", "linear"),
  [
    ("layers/0/attn/q/kernel", True),
    ("model.layers.0.mlp.down_proj.weight", True),
    ("layers/0/embed_gate_proj_mlp/up/kernel", True),
    ("heads/0/kernel", True),
    ("embed/embedding", False),
    ("head/kernel", False),
    ("lm_head.weight", False),
    ("model.embed_tokens.weight", False),
    ("wte/embedding", False),
    ("transformer.wpe.weight", False),
  ],
)
def test_what_counts_as_linear(path, linear):
  assert is_linear(path, jnp.ones((2, 2))) == linear
  assert not is_linear(path, jnp.ones(2))
  assert not is_linear(path, jnp.ones((2, 2), jnp.int32))


def test_the_laws_are_loralibs_and_pefts(key):
  """Moments and bounds, against the peer's own layer."""
  n, r = 400, 50
  for name, init in ((True, kaiming), ("gaussian", gaussian)):
    config = peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=name)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(n, 7, bias=False))
    theirs = peft.get_peft_model(net, config).base_model.model[0]
    theirs = theirs.lora_A.default.weight.detach().numpy()
    a, b = init(key, (n, 7), r)
    assert a.shape == theirs.shape
    assert not b.any()
    assert float(a.std()) == pytest.approx(theirs.std(), rel=0.02)
    assert abs(float(a.mean())) < 4 * theirs.std() / np.sqrt(theirs.size)
  a, _ = kaiming(key, (n, 7), r)
  assert float(jnp.abs(a).max()) == pytest.approx(1 / np.sqrt(n), rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the peers
def test_all_linear_is_pefts_all_linear():
  reference, _, params = load_model("llama-tied")
  config = peft.LoraConfig(r=2, target_modules="all-linear")
  wrapped = peft.get_peft_model(reference, config)
  theirs = sum("lora_A" in name for name, _ in wrapped.named_parameters())
  wrapped.unload()
  load_model.cache_clear()  # the reference has been wrapped
  assert len(init_lora(params, 2)) == theirs == 14


@settings(max_examples=6, deadline=None)
@given(
  ranks=st.dictionaries(
    st.sampled_from(["layers/q/kernel", "layers/up/kernel"]),
    st.integers(1, 2),
    min_size=1,
  ),
  seed=st.integers(0, 9),
)
def test_neither_order_nor_subset_changes_a_module(ranks, seed):
  key = jax.random.key(seed)
  some = init_lora(PARAMS, ranks, key)
  assert {path: lora.rank for path, lora in some.items()} == ranks
  for path, lora in some.items():
    alone = init_lora(PARAMS, {path: ranks[path]}, key)[path]
    chex.assert_trees_all_equal(lora, alone)


def test_shapes_suffice(key):
  shapes = jax.eval_shape(lambda: PARAMS)
  found = init_lora(shapes, 2, key)
  chex.assert_trees_all_equal(found, init_lora(PARAMS, 2, key))
  abstract = jax.eval_shape(lambda p: init_lora(p, 2, key), PARAMS)
  chex.assert_trees_all_equal_shapes(abstract, found)


def test_an_adapter_larger_than_its_weight_is_told():
  with pytest.warns(UserWarning, match=r"q/kernel: rank 5 of \(6, 4\), 50"):
    assert (
      init_lora(PARAMS, {"layers/q/kernel": 5})["layers/q/kernel"].rank == 5
    )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rank": 0}, "rank must be at least 1"),
    ({"rank": {"nowhere": 2}}, "rank names 1 paths that are no modules"),
    ({"rank": 2, "select": lambda *_: False}, "No matrix was selected"),
    ({"rank": 2, "init": [(".*up.*", kaiming)]}, "no rule of init matches"),
  ],
)
def test_mistakes_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    init_lora(PARAMS, **arguments)


def test_torch_names_are_read_as_torch(key):
  params = {"model.layers.0.q_proj.weight": np.ones((4, 6), np.float32)}
  lora = init_lora(params, 2, key)["model.layers.0.q_proj.weight"]
  assert lora.a.shape == (2, 6)
  assert lora.b.shape == (2, 4)
  assert list(flatten(params)) == ["model.layers.0.q_proj.weight"]


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
    "layers": {"kernel": rng.standard_normal((2, 6, 9), np.float32),
               "bias": np.zeros((2, 9), np.float32)},
  }  # fmt: skip


@STARTS
def test_rest_and_adapter_sum_to_the_base(params, start):
  loras, rest = split_base(params, 3, start=start, alpha=5)
  assert rest["q"]["bias"] is params["q"]["bias"]
  assert float(jnp.abs(rest["q"]["kernel"] - params["q"]["kernel"]).max()) > 0.1
  chex.assert_trees_all_close(apply(rest, loras), params, atol=3e-6)


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
  chex.assert_trees_all_close(
    apply(params, plain), apply(rest, trained), atol=2e-5
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


def test_mistakes_of_starts_are_named(params):
  with pytest.raises(ValueError, match=r"q/kernel: 9 for \(12, 8\)"):
    split_base(params, 9)
  loras, _ = split_base(params, 2)
  with pytest.raises(ValueError, match="only in start: layers/kernel"):
    relative_to_base({"q/kernel": loras["q/kernel"]}, loras)
