# SPDX-License-Identifier: Apache-2.0
"""Kernels of five axes, projections of attention and of text: extracted."""

import numpy as np
import peft
import pytest
import torch

from jlora import extraction
from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.formats import load_peft, open_adapter
from jlora.formats.adapted import open_model
from tests.helpers.image_adapters import product

D = 6
RANK = 2


class Odd(torch.nn.Module):
  """A video model's patches, OpenCLIP's attention and its last projection."""

  def __init__(self):
    super().__init__()
    self.patches = torch.nn.Conv3d(3, D, (1, 2, 2), (1, 2, 2))
    self.attn = torch.nn.MultiheadAttention(D, 2, batch_first=True)
    self.text = torch.nn.Module()
    self.text.text_projection = torch.nn.Parameter(torch.randn(D, D + 1))

  def forward(self, x):
    x = self.patches(x).flatten(2).mT
    return self.attn(x, x, x)[0] @ self.text.text_projection


NAMES = ("patches.weight", "attn.in_proj_weight", "text.text_projection")


@pytest.fixture
def pair(tmp_path):
  """A model, and a finetune whose changes have the rank of the adapter."""
  torch.manual_seed(0)
  model, rng = Odd(), np.random.default_rng(0)
  base = {n: x.detach().numpy() for n, x in model.state_dict().items()}
  tuned = dict(base)
  for name in NAMES:
    n_out, *rest = base[name].shape
    change = rng.standard_normal((n_out, RANK)) @ rng.standard_normal(
      (RANK, int(np.prod(rest)))
    )
    tuned[name] = base[name] + change.reshape(base[name].shape).astype("f4")
  for name, tensors in (("base", base), ("tuned", tuned)):
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  return model, tuned, tmp_path


def test_they_are_extracted_and_loaded_by_peft(pair):
  model, tuned, folder = pair
  paths = [folder / f"{name}.safetensors" for name in ("base", "tuned")]
  out = folder / "out"
  report = extraction.extract_checkpoint(*paths, out, rank=RANK,
                                         task_type=None)  # fmt: skip
  assert {row["path"] for row in report.modules} == set(NAMES)
  base = open_checkpoint(paths[0])
  adapter = open_adapter(out, paths[0])
  stored = load_peft(out, like=base.spec).loras
  assert set(stored) == set(NAMES)
  assert len(adapter) == len(NAMES)
  for name in NAMES:
    change = tuned[name] - base[name]
    found = product(stored[name])
    if name.endswith("text_projection"):
      found = found.T
    np.testing.assert_allclose(found.reshape(change.shape), change, atol=1e-4)
  wrapped = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
  for name, x in wrapped.state_dict().items():
    np.testing.assert_allclose(x.numpy(), tuned[name], atol=1e-4)
  merged = open_model(f"{paths[0]}+{out}")
  for name in NAMES:
    np.testing.assert_allclose(merged[name], tuned[name], atol=1e-4)


def test_what_no_rule_reads_says_so(tmp_path):
  rng, paths = np.random.default_rng(0), []
  for name in ("base", "tuned"):
    paths.append(tmp_path / f"{name}.safetensors")
    shapes = {"a.q.weight": (4, 4), "b.scale_shift_table": (2, 4),
              "a.norm.weight": (4,)}  # fmt: skip
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    write_safetensors(paths[-1], tensors)
  report = extraction.extract_checkpoint(*paths, tmp_path / "out", rank=1,
                                         task_type=None)  # fmt: skip
  whole = {row["base"][0]: row["why"] for row in report.ledger
           if row["status"] == "kept whole"}  # fmt: skip
  assert whole == {
    "b.scale_shift_table": "no rule says which of its axes a layer sums over",
    "a.norm.weight": "",
  }
