# SPDX-License-Identifier: Apache-2.0
"""Translates parameter names between Hugging Face and Flax.

One table serves both directions: reading a checkpoint into a Flax tree, and
naming the modules of an adapter that was extracted from such a tree:

    jlora.save_peft(folder, loras, like=jlora.paths.flatten(params),
                    rename=models.hf_name, model_type="gpt2")
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jlora.messages import name_some

#: (Hugging Face module, Flax path of the module, kind of its leaves).
#: The first `{}` is the number of the layer, the second that of the expert.
MODULES = (
  ("model.embed_tokens", "embed", "embedding"),
  ("model.layers.{}.input_layernorm", "layers/{}/attn_norm", "norm"),
  ("model.layers.{}.self_attn.q_proj", "layers/{}/attn/q", "linear"),
  ("model.layers.{}.self_attn.k_proj", "layers/{}/attn/k", "linear"),
  ("model.layers.{}.self_attn.v_proj", "layers/{}/attn/v", "linear"),
  ("model.layers.{}.self_attn.o_proj", "layers/{}/attn/o", "linear"),
  ("model.layers.{}.self_attn.q_norm", "layers/{}/attn/q_norm", "norm"),
  ("model.layers.{}.self_attn.k_norm", "layers/{}/attn/k_norm", "norm"),
  ("model.layers.{}.post_attention_layernorm", "layers/{}/mlp_norm", "norm"),
  ("model.layers.{}.mlp.gate_proj", "layers/{}/mlp/gate", "linear"),
  ("model.layers.{}.mlp.up_proj", "layers/{}/mlp/up", "linear"),
  ("model.layers.{}.mlp.down_proj", "layers/{}/mlp/down", "linear"),
  ("model.layers.{}.block_sparse_moe.gate", "layers/{}/moe/router", "linear"),
  ("model.layers.{}.block_sparse_moe.experts.{}.w1",
   "layers/{}/moe/experts/{}/gate", "linear"),
  ("model.layers.{}.block_sparse_moe.experts.{}.w3",
   "layers/{}/moe/experts/{}/up", "linear"),
  ("model.layers.{}.block_sparse_moe.experts.{}.w2",
   "layers/{}/moe/experts/{}/down", "linear"),
  ("model.norm", "norm", "norm"),
  ("lm_head", "head", "linear"),
  ("transformer.wte", "wte", "embedding"),
  ("transformer.wpe", "wpe", "embedding"),
  ("transformer.h.{}.ln_1", "h/{}/ln_1", "norm"),
  ("transformer.h.{}.attn.c_attn", "h/{}/attn/c_attn", "conv1d"),
  ("transformer.h.{}.attn.c_proj", "h/{}/attn/c_proj", "conv1d"),
  ("transformer.h.{}.ln_2", "h/{}/ln_2", "norm"),
  ("transformer.h.{}.mlp.c_fc", "h/{}/mlp/c_fc", "conv1d"),
  ("transformer.h.{}.mlp.c_proj", "h/{}/mlp/c_proj", "conv1d"),
  ("transformer.ln_f", "ln_f", "norm"),
)  # fmt: skip

#: kind -> (Hugging Face leaf, Flax leaf, transposed between the two).
LEAVES = {
  "embedding": (("weight", "embedding", False),),
  "norm": (("weight", "scale", False), ("bias", "bias", False)),
  "linear": (("weight", "kernel", True), ("bias", "bias", False)),
  "conv1d": (("weight", "kernel", False), ("bias", "bias", False)),
}

#: (part of a name in MODULES, regex of its spellings). GPT-2 may be saved
#: without its head; transformers 5 calls Mixtral's router `mlp` in memory.
SPELLINGS = (
  ("transformer.", r"(?:transformer\.)?"),
  (".block_sparse_moe.gate.", r"\.(?:block_sparse_moe|mlp)\.gate\."),
)

#: (regex of a tensor of all experts, (expert, out, in); Flax modules of its
#: rows, in order), as transformers 5 holds them in memory.
FUSED = (
  (r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj", ("gate", "up")),
  (r"model\.layers\.(\d+)\.mlp\.experts\.down_proj", ("down",)),
)

#: Regexes of tensors that are not parameters: causal masks, rotary angles.
CONSTANTS = (
  r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


class LeafSource(NamedTuple):
  """The tensor of a checkpoint, or the part of one, that holds a leaf.

  Attributes:
    name: the tensor's.
    shape: the leaf's, (in, out) for a kernel.
    transposed: whether the tensor is (out, in).
    expert: index on the tensor's first axis; None if the leaf is the whole
      tensor.
    row: the leaf's first row on the output axis, within that expert.
  """

  name: str
  shape: tuple[int, ...]
  transposed: bool
  expert: int | None = None
  row: int = 0


def find_sources(
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, LeafSource]:
  """Finds the tensor, or part of one, that holds each leaf of the Flax tree.

  Args:
    shapes: name -> shape of every tensor of a checkpoint.

  Returns:
    Flax path -> LeafSource. Tensors of `CONSTANTS` are left out.

  Raises:
    ValueError: a name that no parameter has, or two names of one leaf.

  Example:
    >>> find_sources({"lm_head.weight": (9, 4)})["head/kernel"].shape
    (4, 9)
    >>> fused = {"model.layers.0.mlp.experts.down_proj": (2, 4, 6)}
    >>> list(find_sources(fused))
    ['layers/0/moe/experts/0/down/kernel', 'layers/0/moe/experts/1/down/kernel']
  """
  found: dict[str, LeafSource] = {}
  for name, shape in shapes.items():
    if any(re.fullmatch(pattern, name) for pattern in CONSTANTS):
      continue
    new = dict(_fused_sources(name, shape))
    if not new:
      path, transposed = from_hf(name)
      new = {
        path: LeafSource(name, shape[::-1] if transposed else shape, transposed)
      }
    if twice := sorted(found.keys() & new.keys()):
      raise ValueError(
        f"{name} and {found[twice[0]].name} are both {name_some(twice)}; "
        "remove one of them"
      )
    found |= new
  return found


def _fused_sources(
  name: str, shape: tuple[int, ...]
) -> Iterable[tuple[str, LeafSource]]:
  """Yields (path, source) of every kernel in a tensor of all experts."""
  for pattern, modules in FUSED:
    if (match := re.fullmatch(pattern, name)) and len(shape) == 3:
      experts, out, into = shape[0], shape[1] // len(modules), shape[2]
      for expert in range(experts):
        for i, module in enumerate(modules):
          path = f"layers/{match[1]}/moe/experts/{expert}/{module}/kernel"
          yield path, LeafSource(name, (into, out), True, expert, i * out)


def _rows() -> list[tuple[tuple[str, str], bool]]:
  """Returns ((Hugging Face name, Flax path), transposed) of all parameters."""
  return [
    ((f"{module}.{hf_leaf}", f"{path}/{leaf}"), transposed)
    for module, path, kind in MODULES
    for hf_leaf, leaf, transposed in LEAVES[kind]
  ]


def pattern_of(name: str) -> str:
  r"""Returns a regex for a name of `MODULES` with its leaf, in all spellings.

  The regex matches whole names and has a group for each number, `{}`.

  Example:
    >>> pattern_of("transformer.h.{}.ln_1.weight")
    '(?:transformer\\.)?h\\.(\\d+)\\.ln_1\\.weight'
  """
  pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
  for part, spelled in SPELLINGS:
    pattern = pattern.replace(re.escape(part), spelled)
  return pattern


def _find(name: str, column: int) -> tuple[str, bool]:
  """Translates a name to the other column; also returns whether transposed."""
  rows = _rows()
  for pair, transposed in rows:
    if match := re.fullmatch(pattern_of(pair[column]), name):
      return pair[1 - column].format(*match.groups()), transposed
  raise ValueError(
    f"no parameter of these models is called {name!r}; names look like "
    f"{rows[3][0][column].format(0)!r}"
  )


def from_hf(name: str) -> tuple[str, bool]:
  """Returns the Flax path of a Hugging Face name, and whether to transpose.

  Args:
    name: a tensor's name in a checkpoint, in any of its spellings; not that of
      a tensor of all experts.

  Returns:
    The path, and True where torch's (out, in) is Flax's (in, out).

  Raises:
    ValueError: the models have no such parameter.

  Example:
    >>> from_hf("model.layers.3.self_attn.q_proj.weight")
    ('layers/3/attn/q/kernel', True)
    >>> from_hf("h.3.attn.c_attn.weight")
    ('h/3/attn/c_attn/kernel', False)
  """
  return _find(name, 0)


def to_hf(path: str) -> tuple[str, bool]:
  """Returns the Hugging Face name of a Flax path, and whether to transpose.

  Args:
    path: a parameter's path in a tree of `jlora.models`.

  Returns:
    The tensor's name as transformers saves it, and True where Flax's (in, out)
    is torch's (out, in). The inverse of `from_hf`.

  Raises:
    ValueError: the models have no such parameter.

  Example:
    >>> to_hf("layers/3/mlp/down/kernel")
    ('model.layers.3.mlp.down_proj.weight', True)
  """
  return _find(path, 1)


def hf_name(path: str) -> str:
  """Returns the Hugging Face name of a Flax path, for `save_peft`'s `rename`.

  Args:
    path: a parameter's path in a tree of `jlora.models`.

  Returns:
    The parameter's name as transformers saves it.

  Raises:
    ValueError: the models have no such parameter.

  Example:
    >>> hf_name("layers/3/attn/q/kernel")
    'model.layers.3.self_attn.q_proj.weight'
  """
  return to_hf(path)[0]
