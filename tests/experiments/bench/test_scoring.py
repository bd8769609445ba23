# SPDX-License-Identifier: Apache-2.0
"""The scoring benchmark's ratios, and SmolLM2's loss where it is cached."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers

from experiments.bench import scoring
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import models


@pytest.fixture
def pretended(monkeypatch):
  """Ours takes 1 s and 2 s of processor time, transformers 3 s and 4 s."""

  def take_turns(names, folder, sizes):
    found = {"ours": [1.0, 2.0, 5.0], "transformers": [3.0, 4.0, 5.0]}
    return {name: np.array([found[name]] * sizes.turns) for name in names}

  monkeypatch.setattr(scoring, "_take_turns", take_turns)


def _rows(sizes=scoring.QUICK):
  return list(scoring.measure_scoring("", sizes, label="pretended"))


def test_ratios_are_those_of_the_turns(pretended):
  ours, theirs, ratio = _rows()
  assert ours.value == 64.0
  assert theirs.value == pytest.approx(64 / 3)
  assert (ratio.value, ratio.goal) == (3.0, ">= 1")
  assert "2.00 x in processor time" in ratio.note


def test_without_torch_its_row_says_so(pretended, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  ours, ratio = _rows()
  assert ours.what == "ours"
  assert (ratio.value, ratio.note) == (None, "not run")


def test_scorers_that_disagree_are_no_comparison(monkeypatch):
  monkeypatch.setattr(
    scoring,
    "_take_turns",
    lambda names, *_: {n: np.full((1, 3), i) for i, n in enumerate(names)},
  )
  with pytest.raises(RuntimeError, match="disagree about the same text"):
    _rows()


@pytest.mark.long
def test_both_are_run_and_agree():
  """In processes of their own, on a tiny model."""
  sizes = scoring.QUICK._replace(turns=1)
  with scoring.some_model(None, quick=True) as (folder, label):
    rows = list(scoring.measure_scoring(folder, sizes, label=label))
  assert [row.what for row in rows] == [
    "ours",
    "transformers",
    "ours over transformers",
  ]
  assert all(row.value > 0 for row in rows)


def test_a_worker_that_fails_is_named(tmp_path):
  rows = scoring.measure_scoring(tmp_path, scoring.QUICK, label="nothing")
  with pytest.raises(RuntimeError, match="--worker=ours.* ended with 1"):
    list(rows)


@pytest.mark.long
def test_smollm2_says_what_transformers_says():
  """Losses in nats per token of 512 tokens of pydoc and 1,024 of the Bible."""
  folder = smollm2.cache_folder() / "smollm2-135m-instruct"
  if not (folder.exists() and (smollm2.cache_folder() / "kjv.txt").exists()):
    pytest.skip("python -m experiments.lib.data.smollm2 has not been run")
  encode = smollm2.tokenizer(folder)
  apply, params = models.load(folder)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  # The help topics differ with Python's version; the Bible is one file.
  for text, length, known in (
    (texts.pydoc(), 512, None),
    (smollm2.kjv(), 1024, 1.3002),
  ):
    tokens = encode(text[: 12 * length])[None, : length + 1]
    loss = finetunes.held_out_loss(apply, params, tokens)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
      logits = reference(ids[:, :-1]).logits[0]
    theirs = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert loss == pytest.approx(theirs, abs=1e-4)
    if known:
      assert loss == pytest.approx(known, abs=1e-3)
