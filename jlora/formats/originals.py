# SPDX-License-Identifier: Apache-2.0
"""Tensors of single files: which component they are of, and diffusers' names.

A single file has the tensors of a whole pipeline, each component under a prefix
of its own, and most with the names that the original's authors gave. Diffusers
keeps some of those tensors in parts, others in another order: the table in
`names` says which, here it is said of tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.formats.name_rows import (
  OPEN_CLIP,
  OPEN_CLIP_PARAMETERS,
  TEXT_ROWS,
  Plan,
  Row,
)
from jlora.formats.names import (
  Found,
  covering,
  find_ours,
  find_theirs,
  is_exchanged,
  names_of,
)

#: The denoiser, whatever component that is, and the last text encoder.
MAIN, T5 = "main", "t5"
#: Prefix in single files -> component; no two begin alike.
PREFIXES = {
  "model.diffusion_model.": MAIN,
  "diffusion_model.": MAIN,
  "cond_stage_model.transformer.": "text_encoder",
  "cond_stage_model.model.": "text_encoder",
  "conditioner.embedders.0.transformer.": "text_encoder",
  "conditioner.embedders.0.model.": "text_encoder_2",  # of SDXL's refiner
  "conditioner.embedders.1.model.": "text_encoder_2",
  "text_encoders.clip_l.transformer.": "text_encoder",
  "text_encoders.clip_h.transformer.": "text_encoder",
  "text_encoders.clip_g.transformer.": "text_encoder_2",
  "text_encoders.t5xxl.transformer.": T5,
}
#: Prefixes that say nothing alone: other files have them too.
BESIDE = {"first_stage_model.": "vae", "vae.": "vae"}
AVERAGES = "model_ema."

ORIGINAL, DIFFUSERS = "original", "diffusers"


class Table(NamedTuple):
  """What the names of a component are, and how to turn them.

  Attributes:
    spelling: `ORIGINAL`, `DIFFUSERS`, or "" if no table has the names.
    component: of a pipeline, "" if that is not known.
    rows: of modules.
    parameters: of whole parameters.
    plan: of a UNet.
  """

  spelling: str
  component: str = ""
  rows: tuple[Row, ...] = ()
  parameters: tuple[Row, ...] = ()
  plan: Plan = Plan()


class Cut(NamedTuple):
  """What a parameter of diffusers is of an original tensor.

  Attributes:
    name: of the original tensor, without its prefix.
    part: the number of the part, counted from 0.
    shares: of the outputs that each part has.
    exchanged: whether the halves of the outputs change places.
    transposed: whether the axes of the matrix change places.
  """

  name: str
  part: int = 0
  shares: tuple[int, ...] = (1,)
  exchanged: bool = False
  transposed: bool = False

  def rows(self, count: int) -> tuple[int, int]:
    """Returns the first of its outputs and one past the last.

    Args:
      count: outputs of the original tensor.

    Raises:
      ValueError: they cannot be dealt out by the shares.
    """
    unit, rest = divmod(count, sum(self.shares))
    if rest:
      raise ValueError(
        f"{self.name}: {count} outputs cannot be cut into parts of "
        f"{', '.join(map(str, self.shares))}; it is no model of that family."
      )
    start = unit * sum(self.shares[: self.part])
    return start, start + unit * self.shares[self.part]


def split_prefixes(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """Tells components by prefixes.

  Args:
    names: of a single file.

  Returns:
    {name: (component, the rest)}, "" for what is of none. Empty if no prefix of
    a single file is there at all.

  Example:
    >>> split_prefixes(["model.diffusion_model.out.2.bias", "betas"])
    {'model.diffusion_model.out.2.bias': ('main', 'out.2.bias'),
     'betas': ('', 'betas')}
  """
  names = list(names)
  found = {name: _split(name, PREFIXES) for name in names}
  if not any(found.values()):
    return {}
  has_g = any("clip_g." in name for name in names)
  last = "text_encoder_3" if has_g else "text_encoder_2"
  parts = {n: one or _split(n, BESIDE) or ("", n) for n, one in found.items()}
  return {n: (last if c == T5 else c, rest) for n, (c, rest) in parts.items()}


def _split(name: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
  """Takes the prefix off a name; None if it has none of these."""
  for prefix, component in prefixes.items():
    if name.startswith(prefix):
      return component, name[len(prefix) :]
  return None


def table_of(shapes: Mapping[str, Sequence[int]]) -> Table:
  """Finds the table that has most names of one component.

  Args:
    shapes: parameter -> shape, without prefixes.

  Returns:
    Table; that of no names if none has half of them.

  Example:
    >>> table = table_of({"double_blocks.0.img_attn.qkv.weight": (24, 8)})
    >>> table.spelling, table.component
    ('original', 'transformer')
  """
  modules = [module_of(name)[0] for name, s in shapes.items() if len(s) > 1]
  # One name of each kind: of a thousand layers none says more than the first.
  kinds = {re.sub(r"\d+", "#", module): module for module in modules[::-1]}
  modules = list(kinds.values())
  if not modules:
    return Table("")
  if _share(modules, lambda m: find_ours(m, _TEXT)) > 0.5:
    return Table(DIFFUSERS, "text_encoder")
  if _share(modules, lambda m: find_theirs(m, OPEN_CLIP, Plan())) > 0.5:
    rows, more = OPEN_CLIP, OPEN_CLIP_PARAMETERS
    return Table(ORIGINAL, "text_encoder", rows, more)
  plan = _plan(shapes)
  ours = covering(modules, lambda m, family: find_ours(m, family.rows))
  own = covering(modules, lambda m, family: find_theirs(m, family.rows, plan))
  if own is None or (
    ours
    and _share(modules, lambda m: find_ours(m, ours.rows))
    >= _share(modules, lambda m: find_theirs(m, own.rows, plan))
  ):
    return Table(DIFFUSERS, ours.component) if ours else Table("")
  return Table(ORIGINAL, own.component, own.rows, own.parameters, plan)


# Names of text encoders, with and without `text_model.`, tables included.
_TEXT = tuple(
  Row((name,), name)
  for row in TEXT_ROWS
  for name in dict.fromkeys(
    (row.theirs, row.theirs.removeprefix("text_model."))
  )
) + tuple(
  Row((name,), name)
  for name in (
    "text_model.embeddings.token_embedding",
    "embeddings.token_embedding",
  )
)


def _share(
  modules: Sequence[str], find: Callable[[str], Found | None]
) -> float:
  """Returns the share of names that are found."""
  return sum(find(module) is not None for module in modules) / len(modules)


def _plan(names: Iterable[str]) -> Plan:
  """Returns a UNet's plan: a block ends with the convolution `op`."""
  ends = [
    int(match[1])
    for name in names
    if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))
  ]
  return Plan(min(ends) - 1) if ends else Plan()


def module_of(name: str) -> tuple[str, str]:
  """Splits a parameter's name into module and leaf.

  Args:
    name: such as `conv_in.weight`, or `attn.in_proj_weight` of torch's
      attention.

  Returns:
    The two; the leaf is "" where the name has none.

  Example:
    >>> module_of("attn.in_proj_weight"), module_of("modulation")
    (('attn.in_proj', 'weight'), ('modulation', ''))
  """
  match = re.fullmatch(r"(.+?)(?:\.|(?<=in_proj)_)(weight|bias)", name)
  return (match[1], match[2]) if match else (name, "")


def cuts_of(shapes: Mapping[str, Any], table: Table) -> dict[str, Cut]:
  """Turns the names of one component into diffusers'.

  Args:
    shapes: parameter -> anything with `.shape`, without prefixes.
    table: from `table_of`.

  Returns:
    {name in diffusers: Cut}. A name that no row has stays as it is.

  Raises:
    ValueError: two tensors would have one name.

  Example:
    >>> import numpy as np
    >>> spec = {"double_blocks.0.img_attn.qkv.bias": np.ones(6),
    ...         "double_blocks.0.img_attn.qkv.weight": np.ones((6, 2))}
    >>> table = table_of({name: x.shape for name, x in spec.items()})
    >>> for name, cut in cuts_of(spec, table).items():
    ...   print(name, cut.rows(6))
    transformer_blocks.0.attn.to_q.bias (0, 2)
    transformer_blocks.0.attn.to_k.bias (2, 4)
    transformer_blocks.0.attn.to_v.bias (4, 6)
    transformer_blocks.0.attn.to_q.weight (0, 2)
    transformer_blocks.0.attn.to_k.weight (2, 4)
    transformer_blocks.0.attn.to_v.weight (4, 6)
  """
  found: dict[str, Cut] = {}
  for name in shapes:
    for ours, cut in _cuts(name, shapes, table).items():
      if ours in found:
        raise ValueError(
          f"{found[ours].name} and {name} are both {ours} in diffusers; the "
          "file is of two models."
        )
      found[ours] = cut
  return found


def _cuts(name: str, shapes: Mapping[str, Any], table: Table) -> dict[str, Cut]:
  """Returns the parameters of diffusers that one tensor is."""
  if table.spelling != ORIGINAL:
    return {name: Cut(name)}
  if row := find_theirs(name, table.parameters, table.plan):
    transposed = row.row.transposed
    return {names_of(row)[0]: Cut(name, transposed=transposed)}
  module, leaf = module_of(name)
  row = find_theirs(module, table.rows, table.plan) if leaf else None
  if row is None:
    return {name: Cut(name)}
  weight = shapes.get(f"{module}.weight", shapes[name]).shape
  exchanged = row.row.exchanged or (
    len(weight) > 1 and is_exchanged(row.row, tuple(weight))
  )
  shares = row.row.shares
  return {
    f"{ours}.{leaf}": Cut(name, part, shares, exchanged)
    for part, ours in enumerate(names_of(row))
  }
