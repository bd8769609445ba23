# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in another order say the same to transformers."""

import shutil

import numpy as np
import pytest
import torch
import transformers

from jlora import models
from jlora.alignment.layouts import lay_out_units
from jlora.alignment.matching import match_activations, match_weights
from jlora.alignment.permutations import (
  compose,
  identity,
  is_identity,
  permute,
  permute_loras,
)
from jlora.alignment.symmetries import Row, Symmetry, decoder, gpt2
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.views import GPT2_VIEWS, view_of
from tests.helpers import tiny_models
from tests.helpers.unit_orders import draw

SYMMETRIES = {
  "llama": decoder(4, 2),
  "llama-tied": decoder(4, 2),
  "llama-biases": decoder(4, 2),
  "mixtral": decoder(4, 2),
  "qwen3": decoder(4, 2),
  "gpt2": gpt2(4),
  "gpt2-untied": gpt2(4),
}
TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 9))


@pytest.fixture(scope="module", params=SYMMETRIES)
def case(request, tmp_path_factory):
  """The family's model, its folder, tensors, tables of both names, orders."""
  folder = tmp_path_factory.mktemp(request.param)
  model = tiny_models.write_model(folder, request.param)
  tensors = dict(open_checkpoint(folder))
  own = SYMMETRIES[request.param]
  symmetry = models.hf_symmetry(own)
  return model, folder, tensors, own, symmetry, draw(tensors, symmetry, 1)


def test_transformers_says_the_same_of_weights_that_moved(case, tmp_path):
  model, folder, tensors, own, symmetry, orders = case
  other = permute(tensors, orders, symmetry)
  moved = [not np.array_equal(x, other[name]) for name, x in tensors.items()]
  assert np.mean(moved) > 0.7
  shutil.copytree(folder, tmp_path / "other")
  whole = {name: np.ascontiguousarray(x) for name, x in other.items()}
  write_safetensors(
    tmp_path / "other/model.safetensors", whole, metadata={"format": "pt"}
  )
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
  tokens = torch.from_numpy(TOKENS)
  with torch.no_grad():
    expected, found = (m(tokens).logits.numpy() for m in (model, again.eval()))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # Both tables are one: these models' own paths move alike.
  params = permute(models.load(folder)[1], orders, own)
  for path, leaf in flatten(models.load(tmp_path / "other")[1]).items():
    np.testing.assert_array_equal(leaf, flatten(params)[path], path)


def test_a_planted_order_is_found(case):
  _, _, tensors, _, symmetry, orders = case
  other = permute(tensors, orders, symmetry)
  found = match_weights(tensors, other, symmetry).permutations
  layout = lay_out_units(symmetry, tensors)
  assert is_identity(compose(found, orders, layout))


def turn(x, name):
  """A weight as (in, out), and back."""
  rules = view_of(name, x.shape, GPT2_VIEWS)
  return x.T if rules.is_transposed else x


def test_loras_go_along(case):
  _, _, tensors, _, symmetry, orders = case
  rng, loras = np.random.default_rng(3), {}
  for name, x in tensors.items():
    if x.ndim == 2:
      a, b = (
        rng.standard_normal((2, n), np.float32) for n in turn(x, name).shape
      )
      loras[name] = Lora(a, b, np.float32(1))
  dense = lambda lora, name: turn(lora.a.T @ lora.b, name)  # noqa: E731
  changes = {name: dense(lora, name) for name, lora in loras.items()}
  expected = permute({**tensors, **changes}, orders, symmetry)
  moved = permute_loras(loras, orders, symmetry, tensors)
  assert moved.keys() == loras.keys()
  for name, lora in moved.items():
    np.testing.assert_allclose(dense(lora, name), expected[name], atol=1e-5)


def test_activations_are_of_the_axis_of_outputs(case):
  _, _, tensors, _, symmetry, orders = case
  ends = ("layers.0.self_attn.v_proj.weight", "h.0.mlp.c_fc.weight")
  name = next(n for n in tensors if n.endswith(ends))
  still = {k: v for k, v in orders.items() if k != "stream"}
  # Numbered outputs tell where the network puts them.
  shape = turn(tensors[name], name).shape
  numbers = np.broadcast_to(np.arange(shape[1]), shape)
  numbered = permute({**tensors, name: turn(numbers, name)}, still, symmetry)
  index = turn(numbered[name], name)[0]
  x = np.random.default_rng(0).standard_normal((80, shape[1]), np.float32)
  found = match_activations({name: x}, {name: x[:, index]}, symmetry, tensors)
  layout = lay_out_units(symmetry, tensors)
  back = compose(found.permutations, {**identity(layout), **still}, layout)
  seen = layout.places[name].names() - {"stream"}
  assert seen
  assert is_identity({unit: back[unit] for unit in seen})


def test_every_spelling_and_constant_has_a_row():
  shapes = {
    "h.0.ln_1.bias": (8,), "transformer.h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.bias": (1, 1, 16, 16), "h.0.attn.masked_bias": (),
  }  # fmt: skip
  found = lay_out_units(models.hf_symmetry(gpt2(2)), {
    name: np.empty(shape) for name, shape in shapes.items()
  })  # fmt: skip
  assert found.sizes == {"stream": 8, "head.0": 2, "value.0": 4}
  router = {"model.layers.3.mlp.gate.weight": np.empty((4, 8))}
  found = lay_out_units(models.hf_symmetry(decoder(2)), router)
  assert found.sizes == {"expert.3": 4, "stream": 8}


def test_rows_of_other_paths_are_refused():
  rows = (*decoder(2).rows, Row("conv/.*", "-"))
  with pytest.raises(ValueError, match=r"1 rows are of no path.*conv/"):
    models.hf_symmetry(Symmetry(rows))
