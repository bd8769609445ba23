# SPDX-License-Identifier: Apache-2.0
"""Plans a merge of checkpoints from headers alone.

`plan_merge` opens the models and pairs their tensors; `Planner` lists what each
tensor of the result is made of, slice by slice.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.merged import merged_dtype
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.formats.adapted import open_model
from jlora.merging.checkpoints.recipes import (
  Recipe,
  Settings,
  Slice,
  first_setting,
)
from jlora.messages import name_some
from jlora.pairing.buffers import why_no_parameter
from jlora.pairing.layers import LayerNames, find_layers
from jlora.pairing.match import Vocabulary, common_rows, is_table, pair_up
from jlora.pairing.pairs import Pair, Side, TensorPart, names_of
from jlora.pairing.vocabularies import differing_rows, read_tokens

Catalogue = dict[str, Pair]  # a name as the reference has it -> where it lies


class InputTensor(NamedTuple):
  """The place of one input of a tensor: its model and where it lies there.

  Attributes:
    model: the model's name in the recipe.
    side: which tensors of the model.
  """

  model: str
  side: Side


class Job(NamedTuple):
  """One tensor of the result, and what it is made of.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    sources: what is merged.
    base: what the method subtracts.
    settings: numbers of the method, with `weights`, as sorted pairs; None: the
      only source is copied.
    note: what is unusual about it, for the report.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  sources: tuple[InputTensor, ...]
  base: InputTensor | None
  settings: tuple[tuple[str, Any], ...] | None
  note: str = ""


class MergePlan(NamedTuple):
  """All models of a merge, open, and the jobs for all tensors of the result.

  Attributes:
    models: name -> checkpoint.
    reference: name of the model whose configuration and tokenizer are taken.
    jobs: in the order of the result's files.
    config: the reference's config.json.
    taken: for each layer of the result, its layer in the slice's first model.
    notes: tensors that only one model has and are left out, and tokens that
      differ.
  """

  models: dict[str, Any]
  reference: str
  jobs: list[Job]
  config: dict[str, Any]
  taken: list[int]
  notes: list[str]


def plan_merge(recipe: Recipe) -> MergePlan:
  """Plans a merge: opens the models and lists the tensors of the result.

  Tensors outside all layers come from the first slice if they are embeddings,
  else from the last. Only headers are read.

  Args:
    recipe: what to merge.

  Returns:
    MergePlan.

  Raises:
    ValueError: models that cannot be read or do not belong together, weights
      that are packed in a way that jlora does not read, layers
      that do not exist, a setting none of whose conditions holds, or, with
      `common_rows`, tokenizers that give rows other tokens than the
      reference's. With another policy the latter is only noted: rows are added
      up by number.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> from jlora.merging import Input, Slice, linear
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/m.safetensors"
    ...   write_safetensors(file, {"w": np.ones(3)})
    ...   plan = plan_merge(Recipe(linear, (Slice((Input(file),)),)))
    >>> plan.jobs[0].name, plan.jobs[0].settings
    ('w', (('weights', (1.0,)),))
  """
  models = {name: open_model(name) for name in recipe.models}
  for model in models.values():
    check_dequantised(getattr(model, "base", model))
  reference = recipe.models[0]
  first = models[reference]
  config = first.config
  catalogues = {
    name: _catalogue(name, first.spec, model.spec, recipe.vocabulary)
    for name, model in models.items()
  }
  _add_heads(catalogues)
  is_sliced = any(one.layers for part in recipe.slices for one in part.inputs)
  layers = _layers(first, config, is_sliced or _has_gradients(recipe))
  jobs, taken = Planner(recipe, models, catalogues, layers).plan()
  notes = [] if is_sliced else _left_out(catalogues, jobs, layers)
  notes += _other_tokens(recipe, models, jobs)
  notes += _other_buffers(models)
  return MergePlan(models, reference, jobs, config, taken, notes)


def _layers(first: Any, config: Mapping[str, Any], needed: bool) -> LayerNames:
  """Finds the reference's layers; none is an error only if they are needed."""
  wanted = (config.get("text_config") or config).get("num_hidden_layers")
  try:
    return find_layers(first.spec, wanted)
  except ValueError:
    if needed:
      raise
    return LayerNames("", 0)


def _has_gradients(recipe: Recipe) -> bool:
  """Returns whether any setting is more than a number."""
  levels = [recipe.settings, *(part.settings for part in recipe.slices)]
  levels += [one.settings for part in recipe.slices for one in part.inputs]
  return any(
    isinstance(value, Sequence) for level in levels for value in level.values()
  )


def _catalogue(
  model: str, reference: Any, spec: Any, vocabulary: Vocabulary
) -> Catalogue:
  """Maps the reference's names, and a model's further ones, to its tensors."""
  pairing = pair_up(reference, spec, vocabulary=vocabulary)
  parts = [p.path for p in pairing.pairs if p.base.index or p.base.swap]
  if parts:
    raise ValueError(
      f"{model} holds apart what the reference holds fused: "
      f"{name_some(parts)}. Save both in one form first."
    )
  found = {pair.path: pair for pair in pairing.pairs}
  for name in pairing.only_finetuned:
    shape = tuple(spec[name].shape)
    found[name] = Pair(name, shape, TensorPart(name), TensorPart(name))
  for side, name, why in pairing.buffers:
    if side == "base":  # copied from the reference, whoever has it
      shape, own = tuple(reference[name].shape), TensorPart(name)
      found[name] = Pair(name, shape, own, own, f"{why}, copied", True)
  return found


_HEAD = "lm_head.weight"


def _add_heads(catalogues: Mapping[str, Catalogue]) -> None:
  """Gives tied models a head of their own if any model has one."""
  if not any(_HEAD in catalogue for catalogue in catalogues.values()):
    return
  for catalogue in catalogues.values():
    tables = [
      name for name in catalogue if name.endswith("embed_tokens.weight")
    ]
    if _HEAD not in catalogue and len(tables) == 1:
      note = f"tied: {tables[0]} stands for it"
      catalogue[_HEAD] = catalogue[tables[0]]._replace(path=_HEAD, note=note)


def _left_out(catalogues, jobs, layers: LayerNames) -> list[str]:
  """Describes tensors that only one model has; raises if they are layers."""
  names, notes = {job.name for job in jobs}, []
  for model, catalogue in catalogues.items():
    rest = sorted(catalogue.keys() - names)
    if deeper := [name for name in rest if layers.place_of(name)]:
      raise ValueError(
        f"Only {model} has {name_some(deeper)}: say by slices which layers "
        "are merged."
      )
    if rest:
      notes.append(f"{name_some(rest)}: only in {model}, left out")
  return notes


def _other_buffers(models: Mapping[str, Any]) -> list[str]:
  """Describes tensors beside the reference's that are no parameters."""
  reference, *others = models
  notes = []
  for name in others:
    lone = [
      one
      for one, spec in models[name].spec.items()
      if one not in models[reference].spec and why_no_parameter(one, spec.shape)
    ]
    if lone:
      notes.append(f"{name_some(lone)}: no parameters, of {name}, left out")
  return notes


def _other_tokens(recipe: Recipe, models, jobs: list[Job]) -> list[str]:
  """Describes rows of embeddings that stand for other tokens, or raises."""
  reference, rows = recipe.models[0], {}
  for job in jobs:
    if is_table(job.name) and job.settings is not None:
      for source in (*job.sources, *([job.base] if job.base else [])):
        own = models[source.model].spec[names_of(source.side)[0]].shape[0]
        rows[source.model] = min(own, job.shape[0])
  rows.pop(reference, None)
  known = read_tokens(models[reference].path) if rows else None
  notes = []
  for name, count in rows.items():
    tokens = read_tokens(models[name].path)
    wrong = differing_rows(known, tokens, count) if known and tokens else []
    said = (
      f"{name}: {len(wrong)} rows are other tokens than in {reference}: "
      f"{name_some(wrong)}"
    )
    if wrong and recipe.vocabulary is common_rows:
      raise ValueError(
        f"{said}. Give models of one tokenizer; without `tokenizer_source` "
        "(vocabulary=refuse) rows are added up by number all the same."
      )
    if wrong:
      notes.append(f"{said}; added up by number")
  return notes


_EMBEDDING = re.compile(r"(.*\.)?(embed\w*|wte|wpe|tok_embeddings)(\..*)?")


class Planner:
  """The jobs of a recipe, listed slice by slice.

  Args:
    recipe: what to merge.
    models: name -> open checkpoint.
    catalogues: model -> where it has what the reference names.
    layers: the reference's.
  """

  def __init__(self, recipe, models, catalogues, layers: LayerNames):
    self._recipe, self._models = recipe, models
    self._catalogues, self._layers = catalogues, layers
    self._reference = recipe.models[0]
    inputs = [one for part in recipe.slices for one in part.inputs]
    self._own = {"weight"}.union(*(one.settings for one in inputs))

  def plan(self) -> tuple[list[Job], list[int]]:
    """Lists all jobs, and the source layer of each layer of the result."""
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
    """Returns the model that names a slice's tensors."""
    inputs = part.inputs
    is_whole = all(one.layers is None for one in inputs)
    return self._reference if is_whole else inputs[0].model

  def _outside(self, part: Slice) -> list[str]:
    """Lists a slice's tensors that are in no layer."""
    place_of = self._layers.place_of
    own = self._catalogues[self._lead(part)]
    return [name for name in own if place_of(name) is None]

  def _range(self, part: Slice) -> tuple[list[int], int]:
    """Returns each input's first layer, and the number of layers."""
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
    """Lists the jobs of one layer of the result."""
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
    """Makes the job of a tensor; `rest` is its name without the layer."""
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
      sources = (InputTensor(self._reference, own.finetuned),)
      settings = None
    else:
      sources = tuple(InputTensor(one.model, p.finetuned) for one, p in merged)
      settings = self._settings(part, [one for one, _ in merged], name, place)
    return Job(
      name=name,
      shape=shape,
      dtype=self._dtype(names[0], sources[0], shape),
      sources=sources,
      base=None if settings is None else base,
      settings=settings,
      note="; ".join(notes),
    )

  def _dtype(
    self, name: str, source: InputTensor, shape: tuple[int, ...]
  ) -> np.dtype:
    """Returns the recipe's dtype, or that of the reference's tensor."""
    own = self._catalogues[self._reference].get(name)
    if own is not None:
      source = InputTensor(self._reference, own.finetuned)
    model = self._models[source.model]
    stored = getattr(model, "base", model).spec[names_of(source.side)[0]].dtype
    if why_no_parameter(name, shape):
      return merged_dtype(stored, None)
    return merged_dtype(stored, self._recipe.dtype)

  def _find(self, model: str, name: str) -> Pair:
    """Returns where a model has a tensor; raises if it lacks it."""
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
    """Returns the common shape of the inputs; raises if they differ."""
    shapes = {pair.shape for pair in pairs}
    if len(shapes) > 1:
      said = [
        f"{o.model} {p.shape}" for o, p in zip(part.inputs, pairs, strict=True)
      ]
      raise ValueError(f"{name} differs in shape: {name_some(said)}.")
    return pairs[0].shape

  def _base(self, part: Slice, names: list[str]) -> InputTensor | None:
    """Finds the base's tensor: of its own layer if listed, else the first's."""
    base = self._recipe.base
    if base is None:
      return None
    listed = [
      own
      for one, own in zip(part.inputs, names, strict=True)
      if one.model == base
    ]
    return InputTensor(base, self._find(base, (listed or names)[0]).finetuned)

  def _settings(self, part, inputs, name, place):
    """Lists the method's numbers, one per input where any input has its own."""
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
    """Returns one number for a tensor; a weight is 1 if nothing sets it."""
    value = first_setting(levels, key, name, place)
    if value is None:
      if any(key in level for level in levels) or key != "weight":
        raise ValueError(
          f"{key} says nothing of {name}: none of its conditions holds. Add "
          "one without filter."
        )
      return 1.0
    return float(value)
