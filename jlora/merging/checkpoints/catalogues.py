# SPDX-License-Identifier: Apache-2.0
"""Where each model of a merge has what the reference names."""

from collections.abc import Mapping
from typing import Any

from jlora.merging.checkpoints.tokens import TokenPlan
from jlora.messages import name_some
from jlora.pairing.buffers import why_no_parameter
from jlora.pairing.layers import LayerNames
from jlora.pairing.match import Vocabulary, common_rows, pair_up
from jlora.pairing.pairs import Pair, TensorPart

Catalogue = dict[str, Pair]  # a name as the reference has it -> where it lies

HEAD = "lm_head.weight"


def list_catalogues(
  models: Mapping[str, Any], vocabulary: Vocabulary, tokens: TokenPlan | None
) -> dict[str, Catalogue]:
  """Lists the tensors of all models by the reference's names.

  Args:
    models: name -> checkpoint, the reference first.
    vocabulary: what happens to tables of another number of rows.
    tokens: the result's tokens, if rows are merged by token: all tables then
      have the result's shape.

  Returns:
    model -> Catalogue; with a head of its own for tied models if any has one.

  Raises:
    ValueError: models that do not belong together.

  Example:
    >>> import types
    >>> import numpy as np
    >>> model = types.SimpleNamespace(spec={"w": np.ones(2)})
    >>> found = list_catalogues({"a": model, "b": model}, common_rows, None)
    >>> found["b"]["w"].finetuned.name
    'w'
  """
  specs = {
    name: model.spec if tokens is None else tokens.reshaped(model.spec)
    for name, model in models.items()
  }
  reference = next(iter(specs.values()))
  policy = vocabulary if tokens is None else common_rows
  found = {
    name: _catalogue(name, reference, spec, policy)
    for name, spec in specs.items()
  }
  _add_heads(found)
  return found


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


def _add_heads(catalogues: Mapping[str, Catalogue]) -> None:
  """Gives tied models a head of their own if any model has one."""
  if not any(HEAD in catalogue for catalogue in catalogues.values()):
    return
  for catalogue in catalogues.values():
    tables = [
      name for name in catalogue if name.endswith("embed_tokens.weight")
    ]
    if HEAD not in catalogue and len(tables) == 1:
      note = f"tied: {tables[0]} stands for it"
      catalogue[HEAD] = catalogue[tables[0]]._replace(path=HEAD, note=note)


def tensors_left_out(
  catalogues: Mapping[str, Catalogue], names: set[str], layers: LayerNames
) -> list[str]:
  """Describes tensors that only one model has; raises if they are layers.

  Args:
    catalogues: model -> its tensors.
    names: of the result's tensors.
    layers: the reference's.

  Example:
    >>> tensors_left_out({"a": {"w": 0, "v": 0}}, {"w"}, LayerNames("", 0))
    ['v: only in a, left out']
  """
  notes = []
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


def buffers_left_out(models: Mapping[str, Any]) -> list[str]:
  """Describes tensors beside the reference's that are no parameters.

  Args:
    models: name -> checkpoint, the reference first.

  Example:
    >>> import types
    >>> import numpy as np
    >>> plain = types.SimpleNamespace(spec={})
    >>> old = types.SimpleNamespace(spec={"inv_freq": np.ones(2)})
    >>> buffers_left_out({"a": plain, "b": old})
    ['inv_freq: no parameters, of b, left out']
  """
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
