# SPDX-License-Identifier: Apache-2.0
"""Models of images and of text alone, saved and loaded by their libraries.

Needs the extra `formats`.
"""

import copy
import io
import warnings

import numpy as np
import pytest

import jlora
from jlora.extraction import extract_checkpoint
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from tests.jlora.formats.test_consumers import clip, sd1, sdxl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


def bert():
  return transformers.BertModel(
    transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)
  )


def vit():
  return transformers.ViTModel(
    transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
  )


def save_pair(folder, make, count=1):
  """Saves a model and finetunes of it, of which every matrix has changed."""
  base = make()
  models = [base]
  for seed in range(count):
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
      for name, weight in model.named_parameters():
        if weight.ndim > 1 and name.endswith(".weight"):
          weight += 0.05 * torch.randn_like(weight)
    models.append(model)
  paths = [folder / name for name in ("base", "one", "two")[: count + 1]]
  for model, path in zip(models, paths, strict=True):
    model.save_pretrained(path)
  return models, paths


@pytest.mark.parametrize("make", [sd1, clip, bert, vit])
def test_peft_loses_what_the_report_says(make, tmp_path):
  (base, tuned), paths = save_pair(tmp_path, make)
  out = tmp_path / "out"
  report = extract_checkpoint(*paths, out, rank=3, task_type=None)
  before = {name: x.clone() for name, x in base.state_dict().items()}
  model = type(base).from_pretrained(paths[0])
  merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
  found, wanted = merged.state_dict(), tuned.state_dict()
  errors = []
  for name, x in wanted.items():
    change, left = (x - side[name] for side in (before, found))
    if change.abs().max() > 0:
      errors.append((left.double().norm() / change.double().norm()).item())
  # Files have names of their own, which are not those in memory.
  told = [row["relative_error"] for row in report.modules]
  whole = [entry for entry in report.ledger if entry["status"] == "kept whole"]
  told += [0.0] * len(whole)
  np.testing.assert_allclose(sorted(errors), sorted(told), atol=1e-6)


@pytest.mark.parametrize("make", [sd1, sdxl])
def test_a_merge_of_components_is_loaded_by_diffusers(make, tmp_path):
  (_, one, two), paths = save_pair(tmp_path, make, 2)
  inputs = tuple(Input(str(path)) for path in paths[1:])
  recipe = Recipe(jlora.merging.linear, (Slice(inputs),))
  out = tmp_path / "out"
  jlora.merge_checkpoints(recipe, out, log=io.StringIO())
  model, info = type(one).from_pretrained(out, output_loading_info=True)
  assert not any(info.values())
  sides = (dict(side.named_parameters()) for side in (one, two))
  left, right = sides
  for name, x in model.named_parameters():
    mean = (left[name] + right[name]) / 2
    np.testing.assert_allclose(x.detach(), mean.detach(), atol=1e-6)
