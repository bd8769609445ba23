# SPDX-License-Identifier: Apache-2.0
"""What a merge of checkpoints is to do, from headers alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jlora.adapted_checkpoints import open_model
from jlora.layer_slices import Layers, find_layers
from jlora.merge_jobs import Catalogue, Job, Planner
from jlora.merged_checkpoints import read_config
from jlora.messages import name_some
from jlora.pairing import Vocabulary, common_rows, is_table, pair_up
from jlora.pairs import Pair, Part, names_of
from jlora.recipes import Recipe
from jlora.vocabularies import differing_rows, read_tokens

_HEAD = "lm_head.weight"


class MergePlan(NamedTuple):
  """All models, open, and all tensors of the result.

  Attributes:
    models: name -> checkpoint.
    reference: the name of the one whose configuration and tokenizer are taken.
    jobs: in the order of the result's files.
    config: the reference's config.json.
    taken: of the result's layers, which of its model each one is.
    notes: what was found only in one model and is left out, and tokens that
      differ.
  """

  models: dict[str, Any]
  reference: str
  jobs: list[Job]
  config: dict[str, Any]
  taken: list[int]
  notes: list[str]


def plan_merge(recipe: Recipe) -> MergePlan:
  """The plan of a merge; headers are read, tensors are not.

  Tensors outside of all layers are the first slice's if they are embeddings,
  else the last's.

  Args:
    recipe: what to merge.

  Returns:
    MergePlan.

  Raises:
    ValueError: models that cannot be read or do not belong together, layers
      that are not there, a setting none of whose conditions holds, or with
      `common_rows` tokenizers that name rows otherwise than the reference's.
      Under another policy these are a note: rows are added up by number.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> from jlora.merging.averages import linear
    >>> import numpy as np
    >>> from jlora.recipes import Input, Slice
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/m.safetensors"
    ...   write_safetensors(file, {"w": np.ones(3)})
    ...   plan = plan_merge(Recipe(linear, (Slice((Input(file),)),)))
    >>> plan.jobs[0].name, plan.jobs[0].settings
    ('w', (('weights', (1.0,)),))
  """
  models = {name: open_model(name) for name in recipe.models}
  reference = recipe.models[0]
  first = models[reference]
  config = read_config(first.path)
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
  return MergePlan(models, reference, jobs, config, taken, notes)


def _left_out(catalogues, jobs, layers: Layers) -> list[str]:
  """What only one model has, said; a layer of that kind is an error."""
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


def _other_tokens(recipe: Recipe, models, jobs: list[Job]) -> list[str]:
  """What rows are other tokens than the reference's, said; or an error."""
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


def _layers(first: Any, config: Mapping[str, Any], needed: bool) -> Layers:
  wanted = config.get("text_config", config).get("num_hidden_layers")
  try:
    return find_layers(first.spec, wanted)
  except ValueError:
    if needed:
      raise
    return Layers("", 0)


def _has_gradients(recipe: Recipe) -> bool:
  """Whether any setting is more than a number."""
  levels = [recipe.settings, *(part.settings for part in recipe.slices)]
  levels += [one.settings for part in recipe.slices for one in part.inputs]
  return any(
    isinstance(value, Sequence) for level in levels for value in level.values()
  )


def _catalogue(
  model: str, reference: Any, spec: Any, vocabulary: Vocabulary
) -> Catalogue:
  """Where a model has what the reference names, and what it has besides."""
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
    found[name] = Pair(name, shape, Part(name), Part(name))
  return found


def _add_heads(catalogues: Mapping[str, Catalogue]) -> None:
  """A head of its own for all models, where one has it and others are tied."""
  if not any(_HEAD in catalogue for catalogue in catalogues.values()):
    return
  for catalogue in catalogues.values():
    tables = [
      name for name in catalogue if name.endswith("embed_tokens.weight")
    ]
    if _HEAD not in catalogue and len(tables) == 1:
      note = f"tied: {tables[0]} stands for it"
      catalogue[_HEAD] = catalogue[tables[0]]._replace(path=_HEAD, note=note)
