# SPDX-License-Identifier: Apache-2.0
"""Adapters of Flax trees in PEFT itself: the same logits as in ours."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jlora
from jlora import models
from jlora.paths import flatten
from tests.helpers import tiny_models

RANK = 3
TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 11))
pytestmark = [
  # PEFT 0.21 asks transformers 5.23 for what it has renamed.
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
  pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
  # Of experts that it has fused itself it looks for the old names.
  pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]


def finetuned(params, part):
  """The parameters with a change of RANK in every matrix of a part."""
  rng = np.random.default_rng(1)

  def change(path, leaf):
    if leaf.ndim < 2 or not re.fullmatch(part, path):
      return leaf
    a, b = (rng.standard_normal((RANK, side)) for side in leaf.shape)
    return leaf + 0.1 * jnp.asarray(a.T @ b, leaf.dtype)

  flat = {path: change(path, leaf) for path, leaf in flatten(params).items()}
  return jlora.paths.unflatten(flat, params)


def logits_of(theirs):
  with torch.no_grad():
    return theirs.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def export(folder, case, part):
  """Writes the adapter of a part; the logits that it should give."""
  reference, apply, params = tiny_models.load_model(case)
  tuned = finetuned(params, part)
  changed = [
    path
    for path, leaf in flatten(params).items()
    if leaf.ndim > 1 and re.fullmatch(part, path)
  ]
  loras = jlora.extract(
    params, tuned, rank=dict.fromkeys(changed, RANK), factor=jlora.factoring.svd
  )
  left = jlora.save_peft(
    folder,
    loras,
    like=flatten(params),
    rename=models.hf_name,
    model_type=reference.config.model_type,
  )
  assert left == {}
  tokens = jnp.asarray(TOKENS, jnp.int32)
  base, wanted, adapted = (
    np.asarray(jax.jit(apply)(tree, tokens))
    for tree in (params, tuned, jlora.apply(params, loras))
  )
  scale = np.linalg.norm(adapted)
  assert np.linalg.norm(adapted - base) > 1e-2 * scale
  # The changes are of this rank, so nothing is lost on the way.
  assert np.linalg.norm(adapted - wanted) < 1e-5 * scale
  return copy.deepcopy(reference), adapted


@pytest.mark.parametrize(
  ("case", "part"),
  [
    ("gpt2", ".*"),
    ("gpt2", "wte/.*"),
    ("gpt2-untied", "head/.*"),
    ("mixtral", ".*"),
    ("mixtral", ".*/router/.*"),
    ("mixtral", ".*/experts/2/down/.*"),
    ("qwen2", ".*/mlp/.*"),
  ],
)
def test_peft_says_what_our_model_says(case, part, tmp_path):
  model, wanted = export(tmp_path, case, part)
  theirs = peft.PeftModel.from_pretrained(model, tmp_path)
  keys = theirs.load_adapter(tmp_path, "default")
  assert not keys.missing_keys
  assert not keys.unexpected_keys
  found = logits_of(theirs)
  assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_layers_whose_experts_did_not_change_stay_as_they_are(tmp_path):
  """PEFT adapts the experts of all layers, and says what it was not given."""
  part = "layers/1/moe/experts/2/down/.*"
  model, wanted = export(tmp_path, "mixtral", part)
  with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.0\.mlp"):
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
  found = logits_of(theirs)
  assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("case", ["gpt2", "mixtral"])
def test_what_was_exported_comes_back_to_its_paths(case, tmp_path):
  _, _, params = tiny_models.load_model(case)
  model_type = tiny_models.write_model(
    tmp_path / "base", case
  ).config.model_type
  tuned = finetuned(params, ".*")
  loras = jlora.extract(params, tuned, rank=RANK, factor=jlora.factoring.svd)
  jlora.save_peft(
    tmp_path / "adapter",
    loras,
    like=flatten(params),
    rename=models.hf_name,
    model_type=model_type,
  )
  base = jlora.open_checkpoint(tmp_path / "base")
  found = jlora.load_peft(
    tmp_path / "adapter", like=base.spec, model_type=base.model_type
  )
  assert (found.biases, found.full) == ({}, {})
  again = {models.from_hf(name)[0]: x for name, x in found.loras.items()}
  assert again.keys() == loras.keys()
  for path, lora in again.items():
    np.testing.assert_allclose(
      jlora.loras.dense(lora), jlora.loras.dense(loras[path]), atol=1e-6
    )
