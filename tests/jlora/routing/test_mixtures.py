# SPDX-License-Identifier: Apache-2.0
"""Finetunes as experts: what loads them, and what the router does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jlora import models
from jlora.adapting.transforms import apply
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.extraction.trees import extract
from jlora.factoring.moments import dense_inputs
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.routing.mixture_folders import save_mixture
from jlora.routing.mixtures import mix_experts, random_rows, router_rows
from tests.helpers import tiny_models

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 9))
TOKENS = TOKENS.astype(np.int32)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
  """A base, two finetunes of it, and the base's model."""
  root = tmp_path_factory.mktemp("family")
  tiny_models.write_model(root / "base", "llama")
  base = open_checkpoint(root / "base")
  rng = np.random.default_rng(1)
  config = models.read_config(root / "base")
  model, params = models.load(root / "base")
  for name in ("law", "code"):
    tuned = jax.tree.map(
      lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype),
      params,
    )
    models.save(root / name, tuned, config)
  return base, open_checkpoint(root / "law"), open_checkpoint(root / "code")


def logits(folder):
  model, params = models.load(folder)
  return np.asarray(model(params, TOKENS))


def test_one_expert_over_and_over_is_that_model(family, tmp_path):
  base, *_ = family
  rows = random_rows(jax.random.key(0), 3, 32)
  save_mixture(tmp_path / "moe", base, [base] * 3, rows)
  np.testing.assert_allclose(
    logits(tmp_path / "moe"), logits(base.path), rtol=2e-5, atol=2e-5
  )


def test_a_router_that_always_says_one_gives_its_mlps_alone(family, tmp_path):
  base, law, code = family
  save_mixture(tmp_path / "moe", base, [law, code], np.zeros((2, 32)), chosen=1)
  _, params = models.load(base.path)
  _, tuned = models.load(law.path)
  taken = {
    path: leaf for path, leaf in flatten(tuned).items() if "/mlp/" in path
  }
  mixed = jax.tree_util.tree_map_with_path(
    lambda path, leaf: taken.get("/".join(k.key for k in path), leaf), params
  )
  model, _ = models.load(base.path)
  np.testing.assert_allclose(
    logits(tmp_path / "moe"), model(mixed, TOKENS), rtol=2e-5, atol=2e-5
  )


def test_transformers_says_the_same(family, tmp_path):
  base, law, code = family
  rows = {i: random_rows(jax.random.key(i), 2, 32) * 9 for i in range(2)}
  save_mixture(
    tmp_path / "moe", base, [law, code], rows, max_shard_bytes=20_000
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
  assert type(model).__name__ == "MixtralForCausalLM"
  found = model(torch.from_numpy(TOKENS.astype(np.int64))).logits
  np.testing.assert_allclose(
    found.detach().numpy(), logits(tmp_path / "moe"), rtol=1e-4, atol=1e-4
  )


@pytest.mark.filterwarnings("ignore:.*hold more numbers")  # whole changes
@pytest.mark.filterwarnings("ignore:.*are no matrices and left out")
def test_adapters_are_experts_too(family, tmp_path):
  base, law, _ = family
  full = extract(base, law, rank=32)
  with pytest.warns(
    UserWarning, match=r"no MLPs.*embed_tokens|no MLPs.*self_attn"
  ):
    save_mixture(tmp_path / "a", base, [full], np.zeros((1, 32)), chosen=1)
  save_mixture(tmp_path / "b", base, [law], np.zeros((1, 32)), chosen=1)
  np.testing.assert_allclose(
    logits(tmp_path / "a"), logits(tmp_path / "b"), rtol=1e-3, atol=1e-3
  )


def test_prompts_find_their_expert(family):
  base, *_ = family
  model, params = models.load(base.path)
  path = "layers/1/mlp/gate/kernel"
  prompts = [np.full((1, 4), token, np.int32) for token in (3, 17)]
  states = [
    dense_inputs(model, params, prompt, [path])[path][:, -1]
    for prompt in prompts
  ]
  rows = router_rows(states)
  scores = np.concatenate(states) @ rows.T
  assert scores.argmax(-1).tolist() == [0, 1]
  with pytest.warns(UserWarning, match="nearly dependent"):
    apart = router_rows(states, states[::-1])
  np.testing.assert_allclose(apart[0], -apart[1], atol=1e-6)


def test_adapters_that_stay_adapters_are_the_same_mixture(family):
  """Against the block of a Mixtral whose experts have the changes in them."""
  base, *_ = family
  _, params = models.load(base.path)
  mlp = params["layers"]["0"]["mlp"]
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape) * 0.1, "float32")

  experts = [
    {
      f"{name}/kernel": Lora(
        draw(3, w["kernel"].shape[0]),
        draw(3, w["kernel"].shape[1]),
        jnp.ones(()),
      )
      for name, w in mlp.items()
    }
    for _ in range(3)
  ]
  rows, x = draw(3, 32), draw(2, 5, 32) * 10

  def block(p, x):
    gate = jax.nn.silu(x @ p["gate"]["kernel"])
    return gate * (x @ p["up"]["kernel"]) @ p["down"]["kernel"]

  found = mix_experts(block, mlp, experts, rows, x)
  gates = np.zeros((2, 5, 3))
  scores = np.einsum("btd,ed->bte", x, rows)
  for at in np.ndindex(2, 5):
    best = np.argsort(-scores[at])[:2]
    gates[at][best] = np.exp(scores[at][best]) / np.exp(scores[at][best]).sum()
  outs = [block(apply(mlp, expert), x) for expert in experts]
  wanted = sum(gates[..., i, None] * np.asarray(y) for i, y in enumerate(outs))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="rows are"):
    mix_experts(block, mlp, experts, rows[:2], x)


@pytest.mark.parametrize(
  ("positive", "negative", "message"),
  [
    ([np.ones((1, 3)), np.ones((2, 3))], None, "0 and 1 say the same"),
    ([np.ones((1, 3)), np.zeros((1, 3))], None, "experts 1 are zero"),
    ([np.ones((1, 3)), np.zeros((0, 3))], None, r"expert 1: \(0, 3\)"),
    ([np.ones((1, 3)), np.ones((1, 2))], None, r"expert 1: \(1, 2\)"),
    ([], None, "no expert"),
    ([np.eye(2)[:1], np.full((1, 2), np.inf)], None, "experts 1 are zero or"),
    ([np.ones(3)], None, r"expert 0: \(3,\)"),
    ([np.eye(3)[:1]], [np.ones((1, 2))], r"negative .*3.* expert 0: \(1, 2\)"),
    ([np.eye(3)[:1]], [], "states of 1 experts, negative of 0"),
  ],
)
def test_prompts_that_tell_nothing_are_refused(positive, negative, message):
  with pytest.raises(ValueError, match=message):
    router_rows(positive, negative)


def test_rows_that_are_nearly_the_same_are_said():
  with pytest.warns(UserWarning, match="nearly dependent"):
    router_rows([np.array([[1.0, 0.0]]), np.array([[1.0, 0.1]])])


def test_what_does_not_fit_leaves_nothing(family, tmp_path):
  base, law, _ = family
  rows = np.zeros((1, 32))
  cases = [
    ([], rows, 1, "at least one expert"),
    ([law], np.zeros((2, 32)), 1, r"layer 0: \(2, 32\)"),
    ([law], {0: rows}, 1, "layer 1: none"),
    ([law], rows, 2, "chosen is 2"),
    ([{}], rows, 1, "no change of an MLP"),
  ]
  for experts, routers, chosen, message in cases:
    with pytest.raises(ValueError, match=message):
      save_mixture(tmp_path / "moe", base, experts, routers, chosen=chosen)
  tiny_models.write_model(tmp_path / "biased", "llama-biases")
  biased = open_checkpoint(tmp_path / "biased")
  with pytest.raises(ValueError, match="biases"):
    save_mixture(tmp_path / "moe", biased, [biased], rows, chosen=1)
  tiny_models.write_model(tmp_path / "gpt2", "gpt2")
  other = open_checkpoint(tmp_path / "gpt2")
  with pytest.raises(ValueError, match="of type gpt2"):
    save_mixture(tmp_path / "moe", other, [other], rows, chosen=1)
  name = "model.layers.0.mlp.gate_proj.weight"
  n_out, n_in = base.spec[name].shape
  a, b = (jnp.full((1, n), 1e30, jnp.float32) for n in (n_in, n_out))
  large = {name: Lora(a, b, jnp.float32(1))}
  with pytest.raises(
    ValueError, match="experts.0.w1.weight: .* are NaN or inf"
  ):
    save_mixture(tmp_path / "moe", base, [large], rows, chosen=1)
  save_mixture(tmp_path / "moe", base, [law], rows, chosen=1)
  with pytest.raises(ValueError, match="exists"):
    save_mixture(tmp_path / "moe", base, [law], rows, chosen=1)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["biased", "gpt2", "moe"]
  config = json.loads((tmp_path / "moe" / "config.json").read_text())
  assert config["num_local_experts"] == 1
