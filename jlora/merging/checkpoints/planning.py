# SPDX-License-Identifier: Apache-2.0
"""Plans a merge of checkpoints from headers alone.

`plan_merge` opens the models and pairs their tensors; `Planner` lists what each
tensor of the result is made of, slice by slice.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.merged import merged_dtype
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.formats.adapted import open_model
from jlora.merging.checkpoints.catalogues import (
  HEAD,
  buffers_left_out,
  list_catalogues,
  tensors_left_out,
)
from jlora.merging.checkpoints.companions import (
  Companions,
  plan_companions,
  stem_of,
)
from jlora.merging.checkpoints.recipes import (
  Recipe,
  Slice,
  all_settings,
  check_recipe,
  filters_of,
  is_gradient,
  number_at,
)
from jlora.merging.checkpoints.tokens import has_tokens, plan_tokens
from jlora.messages import name_some
from jlora.pairing.buffers import why_no_parameter
from jlora.pairing.layers import (
  LayerNames,
  count_stacks,
  find_layers,
  place_in_stack,
)
from jlora.pairing.match import common_rows, is_table
from jlora.pairing.pairs import Pair, Rows, Side, names_of
from jlora.pairing.vocabularies import differing_rows, read_tokens


class InputTensor(NamedTuple):
  """The place of one input of a tensor: its model and where it lies there.

  Attributes:
    model: the model's name in the recipe.
    side: which tensors of the model; `Rows` of a table merged by token.
    fills: (row, (model, tensor's name, row there) ...) of rows that the model
      lacks: the mean of those stands there.
  """

  model: str
  side: Side
  fills: tuple[tuple[int, tuple[tuple[str, str, int], ...]], ...] = ()


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
    notes: the recipe's, tensors that only one model has and are left out, and
      tokens that differ.
    companions: the small files beside the result.
  """

  models: dict[str, Any]
  reference: str
  jobs: list[Job]
  config: dict[str, Any]
  taken: list[int]
  notes: list[str]
  companions: Companions = Companions()

  @property
  def stem(self) -> str:
    """What the names of the result's files begin with: as the reference's."""
    return stem_of(self.models[self.reference])


def open_models(recipe: Recipe) -> dict[str, Any]:
  """Opens the models of a recipe; no array is read, but adapters are.

  Args:
    recipe: what to merge.

  Returns:
    name -> checkpoint, the reference first.

  Raises:
    ValueError: as `check_recipe`; models that cannot be read, or weights that
      are packed in a way that jlora does not read.

  Example:
    >>> from jlora.merging import Input, Slice, linear
    >>> open_models(Recipe(linear, (Slice((Input("/nowhere"),)),)))
    Traceback (most recent call last):
    ...
    ValueError: /nowhere does not exist
  """
  check_recipe(recipe)
  models = {name: open_model(name) for name in recipe.models}
  for model in models.values():
    check_dequantised(getattr(model, "base", model))
  return models


def plan_merge(
  recipe: Recipe, models: dict[str, Any] | None = None
) -> MergePlan:
  """Plans a merge: lists the tensors of the result, and what they are made of.

  Tensors outside all layers come from the first slice if they are embeddings,
  else from the last. Only headers are read.

  Args:
    recipe: what to merge.
    models: from `open_models`; None opens them.

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
  models = open_models(recipe) if models is None else models
  reference = recipe.models[0]
  first = models[reference]
  config = first.config
  tokens = plan_tokens(recipe, models)
  catalogues = list_catalogues(models, recipe.vocabulary, tokens)
  is_sliced = any(one.layers for part in recipe.slices for one in part.inputs)
  layers = _layers(first, config, is_sliced)
  planner = Planner(recipe, models, catalogues, layers, tokens)
  jobs, taken = planner.plan()
  names = {job.name for job in jobs}
  notes = [*recipe.notes, *planner.notes]
  if not is_sliced:
    notes += tensors_left_out(catalogues, names, layers)
  notes += (
    _other_tokens(recipe, models, jobs) if tokens is None else tokens.notes
  )
  notes += buffers_left_out(models)
  small = plan_companions(
    recipe, models, taken, layers.count, HEAD in names, tokens
  )
  notes += small.notes
  return MergePlan(models, reference, jobs, config, taken, notes, small)


def _layers(first: Any, config: Mapping[str, Any], needed: bool) -> LayerNames:
  """Finds the reference's layers; none is an error only if they are needed."""
  wanted = (config.get("text_config") or config).get("num_hidden_layers")
  try:
    if needed and config.get("is_encoder_decoder"):
      raise ValueError("Of an encoder and a decoder no slices can be made.")
    return find_layers(first.spec, wanted)
  except ValueError as error:
    if needed:
      raise ValueError(
        f"{first.path}: {error} Without slices models are merged whole, with "
        "all their layers: list them as `models`."
      ) from error
    return LayerNames("", 0)


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
        f"{said}. Merge rows by token, by the recipe's `tokenizer: {{source: "
        "base}}`; with vocabulary=error they are added up by number all the "
        "same."
      )
    if wrong:
      notes.append(f"{said}; added up by number")
  return notes


_EMBEDDING = re.compile(r"(.*\.)?(embed\w*|wte|wpe|tok_embeddings)(\..*)?")


def _notes_of_settings(recipe: Recipe) -> Iterator[str]:
  """Yields how settings are read where that may surprise."""
  for part in recipe.slices:
    levels = [recipe.settings, part.settings]
    levels += [one.settings for one in part.inputs]
    varies = any(is_gradient(value) for own in levels for value in own.values())
    for layers in sorted({tuple(one.layers or ()) for one in part.inputs}):
      if varies and layers and layers[1] - layers[0] == 1:
        yield (
          f"layers {list(layers)}: a gradient over one layer is at its end, as "
          "in mergekit"
        )
  if any(one.layers for part in recipe.slices for one in part.inputs):
    rules = [
      (key, rule)
      for level in all_settings(recipe)
      for key, value in level.items()
      if key in recipe.of_inputs
      for rule in filters_of(value)
      if re.search(r"\d", rule)
    ]
    for key, rule in dict.fromkeys(rules):
      yield (
        f"{key}, filter {rule}: layers are counted as in the model that they "
        "come from, as in mergekit"
      )


class Planner:
  """The jobs of a recipe, listed slice by slice.

  Args:
    recipe: what to merge.
    models: name -> open checkpoint.
    catalogues: model -> where it has what the reference names.
    layers: the reference's.
    tokens: the result's, if rows are merged by token.

  Attributes:
    notes: how settings were read where that may surprise.
  """

  def __init__(self, recipe, models, catalogues, layers, tokens=None):
    self._recipe, self._models = recipe, models
    self._catalogues, self._layers = catalogues, layers
    self._tokens = tokens
    self._reference = recipe.models[0]
    inputs = [one for part in recipe.slices for one in part.inputs]
    self._own = {"weight"}.union(*(one.settings for one in inputs))
    self._stacks = count_stacks(self._catalogues[self._reference])
    self.notes = list(dict.fromkeys(_notes_of_settings(recipe)))

  def plan(self) -> tuple[list[Job], list[int]]:
    """Lists all jobs, and the source layer of each layer of the result."""
    slices = self._recipe.slices
    before, after = self._outside(slices[0]), self._outside(slices[-1])
    jobs = [
      self._outer_job(slices[0], name)
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
      self._outer_job(slices[-1], name)
      for name in after
      if not _EMBEDDING.fullmatch(name)
    ]
    return jobs, taken

  def _outer_job(self, part: Slice, name: str) -> Job:
    """Makes the job of a tensor outside of the layers that slices count.

    Layers of another stack, such as a vision tower, are places of a gradient.
    """
    place = place_in_stack(name, self._stacks)
    return self._job(part, name, name, place, [0] * len(part.inputs))

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
    place = step / (count - 1) if count > 1 else 1.0
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
    own_base = part.base or self._recipe.base
    base = self._base(part, names)
    merged = [
      (one, pair)
      for one, pair in zip(part.inputs, pairs, strict=True)
      if one.model != own_base
    ]
    if not merged:
      raise ValueError(f"{name}: there is nothing to merge beside the base.")
    notes = dict.fromkeys(
      f"{one.model}: {pair.note}" for one, pair in merged if pair.note
    )
    sources, settings = self._copied(names[0], pairs)
    if not sources:
      sources = tuple(
        self._by_token(InputTensor(one.model, p.finetuned), name)
        for one, p in merged
      )
      inputs = [
        (own, one)
        for own, one in zip(names, part.inputs, strict=True)
        if one.model != own_base
      ]
      settings = self._settings(part, inputs, name, place)
    return Job(
      name=name,
      shape=shape,
      dtype=self._dtype(names[0], sources[0], shape),
      sources=sources,
      base=None if settings is None else base,
      settings=settings,
      note="; ".join(notes),
    )

  def _copied(self, name: str, pairs: list[Pair]):
    """Returns the reference's tensor if it is to be copied, and no settings."""
    if not any(pair.whole for pair in pairs):
      return (), None
    own = self._catalogues[self._reference].get(name, pairs[0])
    return (InputTensor(self._reference, own.finetuned),), None

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
    base = part.base or self._recipe.base
    if base is None:
      return None
    listed = [
      own
      for one, own in zip(part.inputs, names, strict=True)
      if one.model == base
    ]
    name = (listed or names)[0]
    found = self._find(base, name).finetuned
    return self._by_token(InputTensor(base, found), name)

  def _by_token(self, source: InputTensor, name: str) -> InputTensor:
    """Returns an input whose rows are in the order of the result's tokens."""
    plan, model = self._tokens, source.model
    table = names_of(source.side)[0]
    if plan is None or not has_tokens(table):
      return source
    if plan.is_plain(model, self._models[model].spec[table].shape[0]):
      return source
    fills = tuple(
      (
        row,
        tuple(
          (m, names_of(self._find(m, name).finetuned)[0], n) for m, n in given
        ),
      )
      for row, given in plan.fills[model].items()
    )
    return InputTensor(model, Rows(table, plan.own[model]), fills)

  def _settings(self, part, inputs, name, place):
    """Lists the method's numbers, one per input where any input has its own.

    Args:
      part: the slice.
      inputs: (name of the tensor in that input, input) of each.
      name: the tensor's name in the result.
      place: of its layer.
    """
    levels = [part.settings, self._recipe.settings]
    keys = {key for level in levels for key in level}
    keys |= {key for _, one in inputs for key in one.settings}
    found = {}
    for key in sorted(keys | {"weight"}):
      if key in self._own or key in self._recipe.of_inputs:
        values = tuple(
          number_at([one.settings, *levels], key, own, place)
          for own, one in inputs
        )
        is_one = key not in self._own and len(set(values)) == 1
        value = values[0] if is_one else values
      else:
        value = number_at(levels, key, name, place)
      found["weights" if key == "weight" else key] = value
    return tuple(sorted(found.items()))
