# SPDX-License-Identifier: Apache-2.0
"""Reports and results of a comparison, small and made by hand."""

import math

import numpy as np

from jlora.extraction.report import Report, total_up

TOP = 8  # rank that everything is factored at


def module(path, sigma, shape=(16, 12), rank=TOP, floor=1e-6):
  """The row of a module whose change has these singular values."""
  sigma = np.asarray(sigma, float)
  norm = float(np.linalg.norm(sigma))
  errors = [float(np.linalg.norm(sigma[k:])) / norm for k in range(TOP + 1)]
  kept = float(np.linalg.norm(sigma[:rank])) / norm
  error = errors[rank] * norm
  return {
    "path": path,
    "shape": list(shape),
    "rank": rank,
    "relative_error": errors[rank],
    "energy": kept**2,
    "mse": error**2 / math.prod(shape),
    "cosine_distance": 1 - kept,
    "optimality": 1.0,
    "mean_abs_delta": 0.25,
    "relative_change": 0.01,
    "stable_rank": (norm / float(sigma[0])) ** 2,
    "effective_rank": 3.0,
    "noise_floor": floor,
    "noise_floor_rank": int((sigma[:TOP] > floor).sum()),
    "norm": norm,
    "error": error,
    "bytes": 4 * rank * sum(shape),
    "parameter_bytes": 4 * math.prod(shape),
    "singular_values": sigma[:TOP].tolist(),
    "relative_errors": errors,
  }


def entry(name, status="extracted", why=""):
  return {"base": [name], "finetuned": [name], "status": status, "why": why}


KINDS = ("mlp.down_proj", "self_attn.q_proj")


def name_of(layer, kind):
  return f"model.layers.{layer}.{kind}.weight"


def report(layers=(0, 2, 10)):
  """Layers out of order in the file, a hole, an embedding, and a lost norm."""
  rng = np.random.default_rng(0)
  rows = [
    module(
      name_of(layer, kind),
      np.arange(1, 13) ** -(0.2 + 0.1 * place + 0.02 * layer),
    )
    for place, kind in enumerate(KINDS)
    for layer in sorted(layers, key=str)  # 0, 10, 2: as names sort
    if (layer, kind) != (2, "self_attn.q_proj")
  ]
  sigma = np.sort(rng.random(12))[::-1]
  rows.append(module("model.embed_tokens.weight", sigma))
  ledger = [entry(row["path"]) for row in rows]
  ledger.append(entry(name_of(2, "self_attn.q_proj"), "unchanged"))
  ledger.append(entry("model.norm.weight", "not representable", "a <norm>"))
  settings = {"base": "org/base", "finetuned": "org/<ft>", "rank": TOP,
              "dtype": "float32"}  # fmt: skip
  return Report(settings, rows, total_up(rows, ledger), ledger)


def kl_row(rank, kl):
  return {
    "rank": rank, "kl": kl, "kl_error": kl / 8, "reverse_kl": kl,
    "reverse_kl_error": kl / 8, "agreement": 0.9, "agreement_error": 0.01,
    "tokens": 256, "loss": 2.5 + kl, "loss_error": 0.1,
    "perplexity": math.exp(2.5 + kl), "recovered": 1 - kl / 0.25,
  }  # fmt: skip


def results(chosen=4):
  similarities = [
    {"pair": pair, "what": "said <here>", "cosine": cosine,
     "cosine_error": 0.05, "below_ceiling": 1 - cosine,
     "below_ceiling_error": None}
    for pair, cosine in (("finetuned / extracted", 0.75),
                         ("finetuned / base", 0.25))
  ]  # fmt: skip
  sample = {"prompt": "In <b>", "base": "x", "finetuned": "y & z",
            "finetuned again": "y", "extracted": "see http"}  # fmt: skip
  return {
    "settings": {"command": "python -m experiments.compare", "chosen": chosen},
    "kl": {
      "kjv": {
        "finetuned": {"loss": 2.5, "loss_error": 0.1, "perplexity": 12.18},
        "ranks": [kl_row(0, 0.25), kl_row(4, 0.02), kl_row(8, 0.001)],
      }
    },
    "generation": {
      "prompts": 2, "prompt_tokens": 4, "steps": 8, "text": "kjv",
      "temperatures": [
        {"temperature": 0.0, "rows": similarities, "examples": [sample]},
        {"temperature": 1.0, "rows": similarities, "examples": [sample]},
      ],
    },
  }  # fmt: skip
