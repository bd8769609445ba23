# SPDX-License-Identifier: Apache-2.0
"""Which permutations of hidden units leave a network's function alone, as data.

A row of a table says, of the parameters that a regex matches, which permutation
acts on each axis. Axes are divided by commas and align at the right, so that a
kernel (in, out), a convolution (height, width, in, out) and a bias (out,) share
a row. An axis of several factors names them in order, `kv.3 group.3 value.3`;
one of several arrays side by side joins them with `+`; `-` is not permuted. The
regex's groups fill the names, so that each layer has permutations of its own.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jlora.messages import name_some
from jlora.views import FLAX_VIEWS, ViewRule

FIXED = "-"


class Row(NamedTuple):
  """How the axes of some parameters are permuted.

  Attributes:
    pattern: regex of whole paths.
    axes: the names, in the grammar above.
    stack: the permutation that exchanges whole arrays, for experts kept apart:
      they are numbered by the last group.
  """

  pattern: str
  axes: str
  stack: str = ""


@dataclasses.dataclass(frozen=True)
class Symmetry:
  """A family of networks: its rows, and what they leave unsaid.

  Attributes:
    rows: the first whose pattern matches a path counts.
    inside: kind -> kind: permutations inside the units of another, one for each
      of them; a name's kind is what stands before its dot.
    sizes: kind -> units, where no axis tells it.
    views: how kernels are read as (in, out): of Loras and of activations.

  Example:
    >>> Symmetry((Row("w", "-, unit"), Row("v", "unit, -"))).sizes
    {}
  """

  rows: tuple[Row, ...]
  inside: Mapping[str, str] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  views: tuple[ViewRule, ...] = FLAX_VIEWS


#: Decoders of the Llama family, by the paths of `jlora.models`, whose
#: `hf_symmetry` makes rows for a checkpoint's names of them. Rotary positions
#: turn channels of a query and key pairwise by their place, so these stay;
#: those of values are free. Query heads move within their key's group, groups
#: as wholes.
DECODER = (
  Row(r"embed/embedding", "-, stream"),
  Row(r"(?:layers/\d+/(?:attn|mlp)_norm|norm)/scale", "stream"),
  Row(r"layers/(\d+)/attn/q/.*", "stream, kv.{0} group.{0} -"),
  Row(r"layers/(\d+)/attn/k/.*", "stream, kv.{0} -"),
  Row(r"layers/(\d+)/attn/v/.*", "stream, kv.{0} value.{0}"),
  Row(r"layers/(\d+)/attn/o/.*", "kv.{0} group.{0} value.{0}, stream"),
  Row(r"layers/\d+/attn/[qk]_norm/scale", "-"),
  Row(r"layers/(\d+)/mlp/(?:gate|up)/.*", "stream, unit.{0}"),
  Row(r"layers/(\d+)/mlp/down/.*", "unit.{0}, stream"),
  Row(r"layers/(\d+)/moe/router/.*", "stream, expert.{0}"),
  Row(r"layers/(\d+)/moe/experts/(\d+)/(?:gate|up)/.*", "stream, inner.{0}",
      "expert.{0}"),
  Row(r"layers/(\d+)/moe/experts/(\d+)/down/.*", "inner.{0}, stream",
      "expert.{0}"),
  Row(r"head/.*", "stream, -"),
)  # fmt: skip

#: GPT-2: positions are learned, so queries and keys share a permutation too.
GPT2 = (
  Row(r"wte/embedding", "-, stream"),
  Row(r"wpe/embedding", "-, stream"),
  Row(r"(?:h/\d+/ln_[12]|ln_f)/(?:scale|bias)", "stream"),
  Row(r"h/(\d+)/attn/c_attn/.*",
      "stream, head.{0} key.{0} + head.{0} key.{0} + head.{0} value.{0}"),
  Row(r"h/(\d+)/attn/c_proj/.*", "head.{0} value.{0}, stream"),
  Row(r"h/(\d+)/mlp/c_fc/.*", "stream, unit.{0}"),
  Row(r"h/(\d+)/mlp/c_proj/.*", "unit.{0}, stream"),
  Row(r"head/.*", "stream, -"),
)  # fmt: skip


def decoder(heads: int, kv_heads: int | None = None) -> Symmetry:
  """The symmetry of `jlora.models`' Llama, Mistral, Mixtral, Qwen2 and Qwen3.

  Args:
    heads: of queries.
    kv_heads: of keys and values; as many without it.

  Returns:
    Symmetry, by `DECODER`.

  Raises:
    ValueError: kv_heads does not divide heads.

  Example:
    >>> decoder(heads=8, kv_heads=2).sizes
    {'kv': 2, 'group': 4}
  """
  kv_heads = kv_heads or heads
  if heads % kv_heads:
    raise ValueError(f"{kv_heads} key heads do not divide {heads} query heads.")
  inside = {"group": "kv", "value": "kv", "inner": "expert"}
  return Symmetry(DECODER, inside, {"kv": kv_heads, "group": heads // kv_heads})


def gpt2(heads: int) -> Symmetry:
  """The symmetry of `jlora.models`' GPT-2.

  Args:
    heads: of attention.

  Returns:
    Symmetry, by `GPT2`.

  Example:
    >>> gpt2(12).inside
    {'key': 'head', 'value': 'head'}
  """
  return Symmetry(GPT2, {"key": "head", "value": "head"}, {"head": heads})


def chain(
  layers: Sequence[str | Sequence[str]], *, flattened: Collection[str] = ()
) -> Symmetry:
  """The symmetry of layers in a row: an MLP, or convolutions and dense layers.

  Args:
    layers: paths of the modules from input to output; a sequence is a layer and
      the norms that follow it, each with one number a channel. Means and
      variances of a batch norm go along.
    flattened: layers whose input is a flattened image, (height, width,
      channel) of the layer before.

  Returns:
    Symmetry with permutations unit.0, unit.1, ... of all outputs but the last.

  Raises:
    ValueError: a layer in `flattened` that there is not.

  Example:
    >>> chain(["in", "out"]).rows[0]
    Row(pattern='in/.*', axes='-, unit.0', stack='')
  """
  groups = [(one,) if isinstance(one, str) else tuple(one) for one in layers]
  unknown = set(flattened) - {group[0] for group in groups}
  if unknown:
    raise ValueError(f"flattened: no such layers: {name_some(sorted(unknown))}")
  rows, before = [], FIXED
  for i, (layer, *norms) in enumerate(groups):
    after = FIXED if i == len(groups) - 1 else f"unit.{i}"
    into = f"- {before}" if layer in flattened else before
    rows.append(Row(rf"{re.escape(layer)}/.*", f"{into}, {after}"))
    rows += [Row(rf"{re.escape(norm)}/.*", after) for norm in norms]
    before = after
  return Symmetry(tuple(rows))
