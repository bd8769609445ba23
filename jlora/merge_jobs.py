# SPDX-License-Identifier: Apache-2.0
"""Which tensors a merge makes, and from which each one."""

import re
from typing import Any, NamedTuple

import numpy as np

from jlora.layer_slices import Layers
from jlora.merged_checkpoints import merged_dtype
from jlora.messages import name_some
from jlora.pairs import Pair, Part, Stack, names_of
from jlora.recipes import Settings, Slice, first_setting

_EMBEDDING = re.compile(r"(.*\.)?(embed\w*|wte|wpe|tok_embeddings)(\..*)?")

Catalogue = dict[str, Pair]  # a name as the reference has it -> where it lies


class Source(NamedTuple):
  """Where one input of a tensor lies.

  Attributes:
    model: its name in the recipe.
    side: which tensors of it.
  """

  model: str
  side: Part | Stack


class Job(NamedTuple):
  """One tensor of the result.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    sources: what is merged.
    base: what the method subtracts.
    settings: numbers of the method, with `weights`, as sorted pairs; None:
      the only source is taken as it is.
    note: what is not as usual.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  sources: tuple[Source, ...]
  base: Source | None
  settings: tuple[tuple[str, Any], ...] | None
  note: str = ""


class Planner:
  """Jobs of a recipe, slice by slice.

  Args:
    recipe: what to merge.
    models: name -> open checkpoint.
    catalogues: model -> where it has what the reference names.
    layers: the reference's.

  Example:
    >>> Planner.__name__
    'Planner'
  """

  def __init__(self, recipe, models, catalogues, layers: Layers):
    self._recipe, self._models = recipe, models
    self._catalogues, self._layers = catalogues, layers
    self._reference = recipe.models[0]
    inputs = [one for part in recipe.slices for one in part.inputs]
    self._own = {"weight"}.union(*(one.settings for one in inputs))

  def plan(self) -> tuple[list[Job], list[int]]:
    """All jobs, and of the result's layers which of its model each one is."""
    slices = self._recipe.slices
    before, after = self._outside(slices[0]), self._outside(slices[-1])
    jobs = [
      self._job(slices[0], name, name, 0.0, [0] * len(slices[0].inputs))
      for name in before
      if _EMBEDDING.fullmatch(name)
    ]
    taken: list[int] = []
    for part in slices:
      starts, count = self._range(part)
      for step in range(count):
        jobs += self._layer(part, len(taken), starts, step, count)
        taken.append(starts[0] + step)
    jobs += [
      self._job(slices[-1], name, name, 0.0, [0] * len(slices[-1].inputs))
      for name in after
      if not _EMBEDDING.fullmatch(name)
    ]
    return jobs, taken

  def _lead(self, part: Slice) -> str:
    """The model whose names a slice has: the reference, if it is in it."""
    inputs = part.inputs
    is_whole = all(one.layers is None for one in inputs)
    return self._reference if is_whole else inputs[0].model

  def _outside(self, part: Slice) -> list[str]:
    place_of = self._layers.place_of
    own = self._catalogues[self._lead(part)]
    return [name for name in own if place_of(name) is None]

  def _range(self, part: Slice) -> tuple[list[int], int]:
    """Each input's first layer, and how many there are."""
    given = [one.layers or (0, self._layers.count) for one in part.inputs]
    counts = {end - start for start, end in given}
    if len(counts) > 1 or min(counts) < (1 if self._layers.count else 0):
      said = [
        f"{o.model} {list(r)}" for o, r in zip(part.inputs, given, strict=True)
      ]
      raise ValueError(
        f"Layers of a slice must be as many of each model: {name_some(said)}."
      )
    return [start for start, _ in given], counts.pop()

  def _layer(self, part, index, starts, step, count) -> list[Job]:
    """The tensors of one layer of the result."""
    lead, at = self._lead(part), starts[0] + step
    rests = [
      found[1]
      for name in self._catalogues[lead]
      if (found := self._layers.place_of(name)) and found[0] == at
    ]
    if not rests:
      raise ValueError(f"{lead} has no layer {at}: {self._layers}.")
    place = step / (count - 1) if count > 1 else 0.0
    name_at, offsets = self._layers.name_at, [s + step for s in starts]
    return [
      self._job(part, name_at(index, rest), rest, place, offsets)
      for rest in rests
    ]

  def _job(self, part: Slice, name, rest, place, offsets) -> Job:
    """One tensor: `rest` is its name, or that in layers `offsets`."""
    is_inside = name != rest
    names = [
      self._layers.name_at(at, rest) if is_inside else rest for at in offsets
    ]
    pairs = [
      self._find(one.model, own)
      for one, own in zip(part.inputs, names, strict=True)
    ]
    shape = self._shape(part, name, pairs)
    base = self._base(part, names)
    merged = [
      (one, pair)
      for one, pair in zip(part.inputs, pairs, strict=True)
      if one.model != self._recipe.base
    ]
    if not merged:
      raise ValueError(f"{name}: there is nothing to merge beside the base.")
    notes = dict.fromkeys(
      f"{one.model}: {pair.note}" for one, pair in merged if pair.note
    )
    own = self._catalogues[self._reference].get(names[0], pairs[0])
    if any(pair.whole for pair in pairs):
      sources = (Source(self._reference, own.finetuned),)
      settings = None
    else:
      sources = tuple(Source(one.model, p.finetuned) for one, p in merged)
      settings = self._settings(part, [one for one, _ in merged], name, place)
    return Job(
      name=name,
      shape=shape,
      dtype=self._dtype(names[0], sources[0]),
      sources=sources,
      base=None if settings is None else base,
      settings=settings,
      note="; ".join(notes),
    )

  def _dtype(self, name: str, source: Source) -> np.dtype:
    """What the recipe says, or as the reference stores the tensor."""
    own = self._catalogues[self._reference].get(name)
    if own is not None:
      source = Source(self._reference, own.finetuned)
    model = self._models[source.model]
    stored = getattr(model, "base", model).spec[names_of(source.side)[0]].dtype
    return merged_dtype(stored, self._recipe.dtype)

  def _find(self, model: str, name: str) -> Pair:
    found = self._catalogues[model].get(name)
    if found is None:
      lacking = [
        other
        for other in self._catalogues[self._reference]
        if other not in self._catalogues[model]
      ]
      raise ValueError(
        f"{model} lacks {name_some(lacking or [name])}; models of one merge "
        "have the same tensors."
      )
    return found

  def _shape(self, part, name, pairs) -> tuple[int, ...]:
    shapes = {pair.shape for pair in pairs}
    if len(shapes) > 1:
      said = [
        f"{o.model} {p.shape}" for o, p in zip(part.inputs, pairs, strict=True)
      ]
      raise ValueError(f"{name} differs in shape: {name_some(said)}.")
    return pairs[0].shape

  def _base(self, part: Slice, names: list[str]) -> Source | None:
    """The base's tensor: its own layer's if it is listed, else the first's."""
    base = self._recipe.base
    if base is None:
      return None
    listed = [
      own
      for one, own in zip(part.inputs, names, strict=True)
      if one.model == base
    ]
    return Source(base, self._find(base, (listed or names)[0]).finetuned)

  def _settings(self, part, inputs, name, place):
    """Numbers of the method: of each input where any has its own."""
    levels = [part.settings, self._recipe.settings]
    keys = {key for level in levels for key in level}
    keys |= {key for one in inputs for key in one.settings}
    found = {}
    for key in sorted(keys | {"weight"}):
      each = inputs if key in self._own else [None]
      values = tuple(
        self._number(
          [*([one.settings] if one else []), *levels], key, name, place
        )
        for one in each
      )
      ours = "weights" if key == "weight" else key
      found[ours] = values if key in self._own else values[0]
    return tuple(sorted(found.items()))

  def _number(self, levels: list[Settings], key, name, place) -> float:
    value = first_setting(levels, key, name, place)
    if value is None:
      if any(key in level for level in levels) or key != "weight":
        raise ValueError(
          f"{key} says nothing of {name}: none of its conditions holds. Add "
          "one without filter."
        )
      return 1.0
    return float(value)
