# SPDX-License-Identifier: Apache-2.0
"""The modules that an adapter can be for: a model's, by component and name.

A pipeline of diffusers has components (`unet`, `text_encoder`, ...), each a
model of its own. Names of modules are `component.module` wherever there is more
than one; here both forms are known, and CLIP with and without `text_model`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jlora.formats.components import APART, Components, open_components
from jlora.formats.names import covering, find_ours
from jlora.messages import name_some

COMPONENTS = (
  "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2",
  "text_encoder_3", *APART,
)  # fmt: skip
CLIP = "text_model."
_TEXT = re.compile(
  r"(text_model\.)?(encoder\.layers\.\d+\.(self_attn|mlp)|embeddings)\..*"
  r"|(text_model\.)?final_layer_norm|encoder\.block\.\d+\.layer\..*"
)

Split = tuple[str, str]  # component and module


@dataclasses.dataclass(frozen=True)
class Base:
  """A model by its modules.

  Attributes:
    shapes: (component, module) -> shape of its weight.
    names: (component, module) -> the module's name as the model gives it.
    configs: component -> its config.json.
    read: (component, module) -> its weight.
    biased: (component, module) of those that have a bias.
    parameters: parameter -> its value, of a model of one component.
    has_weights: whether it can be read; else shapes alone are known.
  """

  shapes: Mapping[Split, tuple[int, ...]]
  names: Mapping[Split, str]
  configs: Mapping[str, Mapping[str, Any]]
  read: Callable[[Split], np.ndarray]
  biased: frozenset[Split]
  parameters: Mapping[str, Any]
  has_weights: bool

  def find(self, at: Split) -> Split | None:
    """Returns the key of a module, whichever way CLIP is named; or None."""
    component, module = at
    other = module.removeprefix(CLIP)
    for name in (module, other, CLIP + other):
      if (component, name) in self.shapes:
        return component, name
    return None

  def in_component(self, component: str) -> dict[str, tuple[int, ...]]:
    """Returns the modules of one component with their shapes."""
    return {
      module: shape
      for (own, module), shape in self.shapes.items()
      if own == component
    }


def split_names(names: Iterable[str]) -> dict[str, Split]:
  """Splits modules' names into component and module.

  Args:
    names: with the component in front, or all of one component without it.

  Returns:
    {name: (component, module)}; the component is "" where no name tells, as in
    a language model.

  Raises:
    ValueError: some have a component in front, and others of a pipeline not.
  """
  names = list(names)
  first = {name: name.partition(".")[0] for name in names}
  # `transformer.h.0` of a language model is no component.
  own = [n for n in names if first[n] not in COMPONENTS]
  is_split = bool(names) and not own and not _is_language_model(names)
  if is_split:
    return {n: (first[n], n.partition(".")[2]) for n in names}
  component = _component_of(names)
  mixed = [n for n in names if first[n] in COMPONENTS] if component else []
  if mixed:
    raise ValueError(
      f"{len(mixed)} of {len(names)} names have a pipeline's component in "
      f"front, {name_some(mixed)}, others not, {name_some(own)}; give a base, "
      "whose names all have."
    )
  return {n: (component, n) for n in names}


def _is_language_model(names: Iterable[str]) -> bool:
  """Returns whether `transformer.` begins the names of GPT-2 or its like."""
  return any(re.match(r"transformer\.(h|blocks|wte)\b", n) for n in names) and (
    not any(re.match(r"transformer\.blocks\.\d+\.attn[12]\.", n) for n in names)
  )


def _component_of(names: list[str]) -> str:
  """Returns the component whose modules have such names, or ""."""
  if any(re.match(r"(down|up|mid)_blocks?\.", name) for name in names):
    return "unet"
  if names and all(_TEXT.fullmatch(name) for name in names):
    return "text_encoder"
  if covering(names, lambda name, family: find_ours(name, family.rows)):
    return "transformer"
  return ""


def base_of(model: Any) -> Base:
  """Describes a model by its modules.

  Args:
    model: a path that `open_components` takes, whose names become those of
      diffusers where a table has them; an open checkpoint, or parameter ->
      anything with `.shape`, or the shape itself. A Base is returned as it is.

  Returns:
    Base; only headers are read.

  Raises:
    ValueError: as `open_components`.
  """
  if isinstance(model, Base):
    return model
  if isinstance(model, str | os.PathLike):
    model = open_components(model, names="diffusers")
  spec = getattr(model, "spec", model)
  shapes = {
    name.removesuffix(".weight"): shape_of(x)
    for name, x in spec.items()
    if not name.endswith(".bias")
  }
  at, configs = _places(model, shapes)
  return Base(
    {at[name]: shape for name, shape in shapes.items()},
    {at[name]: name for name in shapes},
    configs,
    _reader(model, {at[name]: name for name in shapes}),
    frozenset(at[name] for name in at if f"{name}.bias" in spec),
    model,
    _has_weights(model),
  )


def _places(
  model: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Split], dict[str, Mapping[str, Any]]]:
  """Returns (component, module) of all names, and each component's config."""
  if isinstance(model, Components) and not model.is_bare:
    firsts = {name: name.partition(".") for name in shapes}
    own = {part.component for part in model.parts}
    at = {
      name: (first, rest) if first in own else ("", name)
      for name, (first, _, rest) in firsts.items()
    }
    return at, dict(model.configs)
  splits = split_names(_matrices(shapes))
  component = next(iter(splits.values()), ("", ""))[0]
  at = {name: splits.get(name) or (component, name) for name in shapes}
  return at, {component: getattr(model, "config", {})}


def shape_of(x: Any) -> tuple[int, ...]:
  """Returns the shape of an array or a spec, or the shape itself.

  Args:
    x: any of them.
  """
  return tuple(getattr(x, "shape", x))


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Lists the modules whose weights have two axes or more."""
  return [name for name, shape in shapes.items() if len(shape) > 1]


def _reader(model: Any, names: Mapping[Split, str]):
  """Returns what reads a module's weight."""
  stored = set(model)

  def read(at: Split) -> np.ndarray:
    name = names[at]
    return np.asarray(model[name if name in stored else f"{name}.weight"])

  return read


def _has_weights(model: Any) -> bool:
  """Returns whether a model has arrays, and not shapes alone."""
  if hasattr(model, "spec"):
    return True
  return any(isinstance(x, np.ndarray | jax.Array) for x in model.values())
