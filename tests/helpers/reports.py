# SPDX-License-Identifier: Apache-2.0
"""A report by hand: three modules, nine tensors."""

from jlora.extraction.report import Report, total_up


def row(path, norm, error, **given):
  """A module's row; what is not given is the same for all."""
  return {
    "path": path,
    "shape": [64, 32],
    "rank": 8,
    "norm": norm,
    "error": error,
    "relative_error": error / norm,
    "energy": 1 - (error / norm) ** 2,
    "relative_change": 0.01,
    "stable_rank": 2.25,
    "noise_floor_rank": 5,
    "singular_values": [2.0] * 8,
    "optimality": 1.0625,
    "bytes": 2**20,
    "parameter_bytes": 2**22,
  } | given


def entry(name, status, why="", finetuned=()):
  base = [] if finetuned else [name]
  return {
    "base": base, "finetuned": [*finetuned], "status": status, "why": why
  }  # fmt: skip


MODULES = [
  row("model.layers.0.self_attn.q_proj.weight", 5.0, 3.0),
  row("model.layers.1.self_attn.q_proj.weight", 12.0, 0.0, rank=4,
      relative_change=0.03, noise_floor_rank=7),
  row("model.layers.0.mlp.down_proj.weight", 1.0, 0.96, shape=[4, 128, 32],
      relative_change=None, optimality=None, bytes=2**19),
]  # fmt: skip
LEDGER = [
  *(entry(f"model.{i}.weight", "extracted") for i in range(3)),
  entry("head", "extracted", "tied to embed"),
  *(entry(f"norm.{i}", "kept whole", "its shape differs") for i in range(2)),
  entry("same", "unchanged", "equal in value, not in bytes"),
  entry("lost", "not representable", "not selected"),
  entry("new", "not representable", "only there", finetuned=["new", "other"]),
]
SETTINGS = {"base": 'org/"base"', "finetuned": "org/tuned", "rank": 8}


def report(modules=MODULES, ledger=LEDGER):
  return Report(SETTINGS, modules, total_up(modules, ledger), ledger)
