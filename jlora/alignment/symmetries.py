# SPDX-License-Identifier: Apache-2.0
"""Tables of the permutations of hidden units that keep a network's function.

A row of a table names, for all parameters that its regex matches, the
permutation that acts on each axis. Commas separate the axes. They align at the
right, so that a kernel (in, out), a convolution (height, width, in, out) and a
bias (out,) share a row. An axis that is a product of several factors lists them
in order, `kv.3 group.3 value.3`. An axis of several arrays side by side joins
them with `+`. `-` marks what is not permuted. The regex's groups fill the `{}`
in the names, so that each layer has its own permutations.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jlora.messages import name_some
from jlora.views import FLAX_VIEWS, ViewRule

FIXED = "-"


class Row(NamedTuple):
  """One row of a symmetry: which permutations act on some parameters' axes.

  Attributes:
    pattern: regex of whole paths.
    axes: the permutations' names, in the grammar of this module's docstring.
    stack: the permutation that exchanges whole arrays, for experts that are
      stored as separate arrays; the regex's last group is the array's number.
  """

  pattern: str
  axes: str
  stack: str = ""


@dataclasses.dataclass(frozen=True)
class Symmetry:
  """The permutations of hidden units that keep the function of some networks.

  Attributes:
    rows: the table; the first row whose pattern matches a path counts.
    inside: inner kind -> outer kind. Each unit of the outer permutation has its
      own inner permutation. A name's kind is the part before its dot.
    sizes: kind -> units, where the axes' lengths do not determine them.
    views: how kernels are read as (in, out), for Loras and activations.

  Example:
    >>> Symmetry((Row("w", "-, unit"), Row("v", "unit, -"))).sizes
    {}
  """

  rows: tuple[Row, ...]
  inside: Mapping[str, str] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  views: tuple[ViewRule, ...] = FLAX_VIEWS


#: Decoders of the Llama family, by the paths of `jlora.models`. Its
#: `hf_symmetry` turns these rows into rows for a checkpoint's names. Rotary
#: positions pair up the channels of queries and keys by index, so these cannot
#: move; the channels of values can. Query heads move within the group of their
#: key head, and groups move as wholes.
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
  """Returns the symmetry of Llama, Mistral, Mixtral, Qwen2 and Qwen3 models.

  Args:
    heads: number of query heads.
    kv_heads: number of key and value heads; None means `heads`.

  Returns:
    Symmetry for the parameter paths of `jlora.models`, with the rows `DECODER`.

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
  """Returns the symmetry of GPT-2 models.

  Args:
    heads: number of attention heads.

  Returns:
    Symmetry for the parameter paths of `jlora.models`, with the rows `GPT2`.

  Example:
    >>> gpt2(12).inside
    {'key': 'head', 'value': 'head'}
  """
  return Symmetry(GPT2, {"key": "head", "value": "head"}, {"head": heads})


def chain(
  layers: Sequence[str | Sequence[str]], *, flattened: Collection[str] = ()
) -> Symmetry:
  """Returns the symmetry of an MLP or CNN: layers that follow one another.

  Args:
    layers: paths of the modules from input to output. A sequence is a layer and
      the norms that follow it, each with one number per channel; the means and
      variances of a batch norm are permuted with it.
    flattened: layers whose input is the flattened (height, width, channel)
      image of the layer before.

  Returns:
    Symmetry with permutations unit.0, unit.1, ..., one for the outputs of each
    layer but the last.

  Raises:
    ValueError: `flattened` names a layer that is not in `layers`.

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
