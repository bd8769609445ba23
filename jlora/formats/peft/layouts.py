# SPDX-License-Identifier: Apache-2.0
"""The PEFT adapter folder: how tensors lie in it, what consumers accept.

A folder holds `adapter_model.safetensors`, two tensors for every changed
module, and `adapter_config.json`, which says which modules to wrap and how the
product of the two is scaled. What differs between kinds of layers is a row of
`LAYOUTS`; what differs between consumers is a `Profile`.

References:
  huggingface/peft 0.21.2, `tuners/lora/layer.py`; vllm `lora/peft_helper.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

# Parameters that PEFT wraps on one module, the outermost wrapper last: the
# order in which transformers' modules define them, which no file records.
PARAMETER_ORDER = ("gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
  """What one consumer of adapter folders accepts.

  Attributes:
    name: how the consumer is called in messages.
    max_rank: the largest rank it takes, or None.
    refused: kind of change -> why it cannot be carried. Kinds are those of
      `LAYOUTS`, and "bias", and "full" for tensors kept whole.
    stacks_experts: whether separate experts are stacked when they are loaded.

  Example:
    >>> VLLM.max_rank, sorted(VLLM.refused)
    (512, ['bias', 'convolution', 'full'])
  """

  name: str
  max_rank: int | None = None
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stacks_experts: bool = False


PEFT = Profile("PEFT", stacks_experts=True)

# Any rank up to the largest value of --max-lora-rank loads: a server compares
# r with its own setting and takes each module's rank from the tensors.
VLLM = Profile(
  "vLLM",
  max_rank=512,
  refused={
    "bias": "vLLM refuses lora_bias; merge the change into a checkpoint",
    "convolution": "vLLM has no LoRA for convolutions",
    "full": "vLLM refuses modules_to_save; merge the change into a checkpoint",
  },
)


class FileLayout(NamedTuple):
  """How a Lora of one kind of layer is stored.

  Attributes:
    kind: the kind's name.
    a: what follows the module's name in the key of the first tensor.
    b: the same for the second.
    store: (a (..., r, in), b (..., r, out), kernel) -> the two stored arrays;
      `kernel` is a convolution's (in channels, height, width).
    load: (stored A, stored B, rank) -> (a, b).
    wraps_parameter: whether PEFT wraps the parameter (`target_parameters`)
      and not its module, which then is of a class that PEFT does not know.
  """

  kind: str
  a: str
  b: str
  store: Callable[..., tuple[np.ndarray, np.ndarray]]
  load: Callable[..., tuple[np.ndarray, np.ndarray]]
  wraps_parameter: bool = False


def _store_matrix(a, b, kernel):
  return a, b.T


def _load_matrix(a, b, rank):
  return a, b.T


def _store_convolution(a, b, kernel):
  ones = (1,) * (len(kernel) - 1)
  return a.reshape(len(a), *kernel), b.T.reshape(*b.shape[::-1], *ones)


def _load_convolution(a, b, rank):
  return a.reshape(len(a), -1), b.reshape(len(b), -1).T


def _store_experts(a, b, kernel):
  """A by expert then unit, B's columns by unit then expert, as PEFT reads."""
  return a.reshape(-1, a.shape[-1]), b.T.reshape(b.shape[-1], -1)


def _load_experts(a, b, rank):
  return a.reshape(-1, rank, a.shape[-1]), b.reshape(len(b), rank, -1).T


LINEAR_FILE = FileLayout(
  "linear", "lora_A.weight", "lora_B.weight", _store_matrix, _load_matrix
)
EMBEDDING = FileLayout(
  "embedding",
  "lora_embedding_A",
  "lora_embedding_B",
  _store_matrix,
  _load_matrix,
)
CONVOLUTION = FileLayout(
  "convolution",
  "lora_A.weight",
  "lora_B.weight",
  _store_convolution,
  _load_convolution,
)
EXPERTS = FileLayout(
  "experts",
  "lora_A.weight",
  "lora_B.weight",
  _store_experts,
  _load_experts,
  wraps_parameter=True,
)
ROUTER = EXPERTS._replace(kind="router", store=_store_matrix, load=_load_matrix)
LAYOUTS = (LINEAR_FILE, EMBEDDING, CONVOLUTION, EXPERTS, ROUTER)
BIAS = "lora_B.bias"
