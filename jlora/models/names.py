# SPDX-License-Identifier: Apache-2.0
"""The names of the Llama family's parameters: Hugging Face and Flax.

One table serves both directions: reading a checkpoint into a Flax tree, and
naming the modules of an adapter that was extracted from such a tree.
"""

import re

#: (Hugging Face module, Flax path of the module, kind of its leaves).
#: `{}` is the layer's number.
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
  ("model.norm", "norm", "norm"),
  ("lm_head", "head", "linear"),
)

#: kind -> (Hugging Face leaf, Flax leaf, transposed between the two).
LEAVES = {
  "embedding": (("weight", "embedding", False),),
  "norm": (("weight", "scale", False),),
  "linear": (("weight", "kernel", True), ("bias", "bias", False)),
}


def _rows() -> list[tuple[tuple[str, str], bool]]:
  """((Hugging Face name, Flax path), transposed) of every parameter."""
  return [
    ((f"{module}.{hf_leaf}", f"{path}/{leaf}"), transposed)
    for module, path, kind in MODULES
    for hf_leaf, leaf, transposed in LEAVES[kind]
  ]


def _find(name: str, column: int) -> tuple[str, bool]:
  """The other column's name of `name`, and whether the leaf is transposed."""
  rows = _rows()
  for pair, transposed in rows:
    pattern = re.escape(pair[column]).replace(r"\{\}", r"(\d+)")
    if match := re.fullmatch(pattern, name):
      return pair[1 - column].format(*match.groups()), transposed
  raise ValueError(
    f"no parameter of the Llama family is called {name!r}; names look like "
    f"{rows[2][0][column].format(0)!r}"
  )


def from_hf(name: str) -> tuple[str, bool]:
  """The Flax path of a Hugging Face parameter, and whether to transpose it.

  Args:
    name: a tensor's name in a checkpoint of the Llama family.

  Returns:
    The path, and True where torch's (out, in) is Flax's (in, out).

  Raises:
    ValueError: if the family has no such parameter.

  Example:
    >>> from_hf("model.layers.3.self_attn.q_proj.weight")
    ('layers/3/attn/q/kernel', True)
    >>> from_hf("model.norm.weight")
    ('norm/scale', False)
  """
  return _find(name, 0)


def to_hf(path: str) -> tuple[str, bool]:
  """The Hugging Face name of a Flax path: the inverse of `from_hf`.

  Args:
    path: a parameter's path in a tree of `jlora.models`.

  Returns:
    The tensor's name, and True where it is to be transposed.

  Raises:
    ValueError: if the family has no such parameter.

  Example:
    >>> to_hf("layers/3/mlp/down/kernel")
    ('model.layers.3.mlp.down_proj.weight', True)
  """
  return _find(path, 1)


def hf_module(path: str) -> str:
  """The Hugging Face module that holds a Flax path, as PEFT names it.

  Args:
    path: a parameter's path in a tree of `jlora.models`.

  Returns:
    The module's dotted name, without the leaf.

  Raises:
    ValueError: if the family has no such parameter.

  Example:
    >>> hf_module("layers/3/attn/q/kernel")
    'model.layers.3.self_attn.q_proj'
  """
  return to_hf(path)[0].rpartition(".")[0]
