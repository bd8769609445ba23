# SPDX-License-Identifier: Apache-2.0
"""The matrices of real models, and how many rows meet them at once."""

from typing import NamedTuple


class Matrix(NamedTuple):
  """A projection of a model: its name and (in, out)."""

  model: str
  name: str
  k: int
  n: int


# From the models' config.json; k and v are narrower than q where heads share.
MATRICES = (
  Matrix("Llama-3-8B", "q, o", 4096, 4096),
  Matrix("Llama-3-8B", "k, v", 4096, 1024),
  Matrix("Llama-3-8B", "gate, up", 4096, 14336),
  Matrix("Llama-3-8B", "down", 14336, 4096),
  Matrix("Llama-3-70B", "q, o", 8192, 8192),
  Matrix("Llama-3-70B", "gate, up", 8192, 28672),
  Matrix("Llama-3-70B", "down", 28672, 8192),
  Matrix("Mistral-Nemo-12B", "q", 5120, 4096),
  Matrix("Mistral-Nemo-12B", "gate, up", 5120, 14336),
  Matrix("Qwen3-8B", "gate, up", 4096, 12288),
  Matrix("Qwen3-8B", "down", 12288, 4096),
  Matrix("SmolLM2-135M", "q, o", 576, 576),
  Matrix("SmolLM2-135M", "gate, up", 576, 1536),
  Matrix("SmolLM2-135M", "down", 1536, 576),
)

# Rows: tokens of a training step, of a prompt, of a batch that is decoded.
ROWS = {"training": 8192, "prefill": 2048, "decode": 64}
