# SPDX-License-Identifier: Apache-2.0
"""The PEFT folder's tensor layouts, and what its consumers accept.

A folder holds `adapter_model.safetensors`, with two tensors for every changed
module, and `adapter_config.json`, which says which modules to wrap and how the
product of the two is scaled. `LAYOUTS` has a row for each kind of layer, and
each consumer (PEFT, vLLM) has a `Profile`. vLLM's is not tested by running it:
its names are checked against its source, of the version in `vllm.json`.

References:
  huggingface/peft 0.21.2, `tuners/lora/layer.py`; vllm 0.33.0,
  `lora/peft_helper.py`, `lora/lora_model.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlora.formats.peft import vllm_names

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# How the reason of a parameter begins that lies beside matrices with LoRAs.
REPLACES = "PEFT replaces whole modules"
TASK_TYPES = (
  "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS",
  "FEATURE_EXTRACTION",
)  # fmt: skip

# Parameters that PEFT wraps on one module, the outermost wrapper last. This is
# the order in which transformers' modules define them; no file records it.
PARAMETER_ORDER = ("gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
  """The limits of one consumer of adapter folders.

  Attributes:
    name: the consumer's name, for messages.
    max_rank: the largest rank it accepts, or None.
    refused: kind of change -> why the consumer refuses it. Kinds are those of
      `LAYOUTS`, and "bias", and "full" for tensors stored whole.
    stacks_experts: whether it stacks separate experts on loading.
    one_rank: whether it takes no patterns of ranks, so that all modules are
      given the largest, by zeros.
    refuses_class: (architectures of config.json, whether transformers has one
      of them) -> why it takes no adapter for such a model, or ""; None if all
      are taken.
    refuses_module: (module, kind of layout, architectures) -> why it refuses or
      ignores a module's LoRA, or ""; None if it names modules as transformers
      does. One that has it finds a module by its name on disk, too.

  Example:
    >>> VLLM.max_rank, sorted(VLLM.refused)
    (512, ['bias', 'convolution', 'full'])
  """

  name: str
  max_rank: int | None = None
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stacks_experts: bool = False
  one_rank: bool = False
  refuses_class: Callable[[Sequence[str], bool], str] | None = None
  refuses_module: Callable[[str, str, Sequence[str]], str] | None = None


PEFT = Profile("PEFT", stacks_experts=True)

# max_rank is the largest value of --max-lora-rank. A server compares `r` with
# its own setting and takes each module's rank from the tensors.
VLLM = Profile(
  "vLLM",
  max_rank=512,
  refused={
    "bias": "vLLM refuses lora_bias; merge the change into a checkpoint",
    "convolution": "vLLM has no LoRA for convolutions",
    "full": "vLLM refuses modules_to_save; merge the change into a checkpoint",
  },
  refuses_class=vllm_names.class_refusal,
  refuses_module=vllm_names.refusal_of,
)


# Its converter to GGUF takes one rank and one alpha for the whole folder: with
# patterns the change of a module would be off by r_max / r_i.
LLAMACPP = Profile(
  "llama.cpp",
  refused={
    "bias": "llama.cpp has no biases; merge the change into a checkpoint",
    "convolution": "llama.cpp has no LoRA for convolutions",
    "full": "llama.cpp adds no whole tensors; merge them into a checkpoint",
  },
  stacks_experts=True,
  one_rank=True,
)


class FileLayout(NamedTuple):
  """The layout in a file of the Loras of one kind of layer.

  Attributes:
    kind: the kind's name.
    a: what follows the module's name in the key of the first tensor.
    b: the same for the second.
    store: (a (..., r, in), b (..., r, out), kernel) -> the two stored arrays;
      `kernel` is a convolution's (in channels, height, width).
    load: (stored A, stored B, rank) -> (a, b).
    wraps_parameter: whether PEFT wraps the parameter (`target_parameters`)
      instead of its module, because it does not know the module's class.
  """

  kind: str
  a: str
  b: str
  store: Callable[..., tuple[np.ndarray, np.ndarray]]
  load: Callable[..., tuple[np.ndarray, np.ndarray]]
  wraps_parameter: bool = False


def _store_matrix(a, b, kernel):
  """Returns a and bᵀ."""
  return a, b.T


def _load_matrix(a, b, rank):
  """Reverts `_store_matrix`."""
  return a, b.T


def _store_transposed(a, b, kernel):
  """Returns b and aᵀ: PEFT takes all matrices for (out, in)."""
  return b, a.T


def _load_transposed(a, b, rank):
  """Reverts `_store_transposed`."""
  return b.T, a


def _store_convolution(a, b, kernel):
  """Returns a with the kernel's axes, and bᵀ as a 1x1 convolution."""
  ones = (1,) * (len(kernel) - 1)
  return a.reshape(len(a), *kernel), b.T.reshape(*b.shape[::-1], *ones)


def _load_convolution(a, b, rank):
  """Reverts `_store_convolution`."""
  return a.reshape(len(a), -1), b.reshape(len(b), -1).T


def _store_experts(a, b, kernel):
  """Orders A by expert then unit, B's columns by unit then expert."""
  return a.reshape(-1, a.shape[-1]), b.T.reshape(b.shape[-1], -1)


def _load_experts(a, b, rank):
  """Reverts `_store_experts`."""
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
# Matrices that are parameters of a module which is no linear layer.
PARAMETER = ROUTER._replace(kind="parameter")
TRANSPOSED = EXPERTS._replace(
  kind="transposed parameter", store=_store_transposed, load=_load_transposed
)
#: Names of parameters that are (in, out).
IN_OUT = ("text_projection",)
LAYOUTS = (
  LINEAR_FILE, EMBEDDING, CONVOLUTION, EXPERTS, ROUTER, PARAMETER, TRANSPOSED,
)  # fmt: skip
BIAS = "lora_B.bias"
