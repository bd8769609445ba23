# SPDX-License-Identifier: Apache-2.0
"""Models of several components, opened as one checkpoint.

    pipeline's folder | single file | anything else  ->  {component.name: array}

A pipeline of diffusers has a folder for each component, a single file a prefix.
Either way a tensor's name begins with its component (`unet.`, `text_encoder.`),
and names can be those of diffusers. What is left out is told with a reason.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import (
  Checkpoint,
  open_checkpoint,
  region_of,
)
from jlora.checkpoints.documents import read_json
from jlora.checkpoints.hub import locate
from jlora.checkpoints.safetensors import TensorSpec
from jlora.formats.joining import halves_exchanged
from jlora.formats.names import FAMILIES
from jlora.formats.originals import (
  AVERAGES,
  DIFFUSERS,
  MAIN,
  ORIGINAL,
  Cut,
  Table,
  cuts_of,
  split_prefixes,
  table_of,
)
from jlora.messages import name_some

#: Components whose changes an adapter does not carry.
APART = ("vae", "image_encoder", "safety_checker")
_INDEX = "model_index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class Source(NamedTuple):
  """Where a parameter of a model lies.

  Attributes:
    file: an open checkpoint.
    name: of the tensor there.
    cut: what the parameter is of it.
  """

  file: Checkpoint
  name: str
  cut: Cut

  @property
  def is_plain(self) -> bool:
    """Returns whether it is the tensor as it lies."""
    cut = self.cut
    return len(cut.shares) == 1 and not cut.exchanged and not cut.transposed

  def spec(self) -> TensorSpec:
    """Returns the parameter's spec; that of a cut one has no place."""
    whole = self.file.spec[self.name]
    if self.is_plain:
      return whole
    shape = whole.shape
    if self.cut.transposed:
      shape = shape[::-1]
    elif len(self.cut.shares) > 1:
      start, stop = self.cut.rows(shape[0])
      shape = (stop - start, *shape[1:])
    nbytes = whole.dtype.itemsize * int(np.prod(shape))
    return TensorSpec(shape, whole.dtype, nbytes)

  def read(self, index: Any) -> np.ndarray:
    """Reads a region; of parts no more than their rows.

    Args:
      index: as for `Checkpoint.read`.
    """
    if self.is_plain:
      return self.file.read(self.name, index)
    if self.cut.transposed:
      return self.file.read(self.name).T[index]
    if self.cut.exchanged:
      return halves_exchanged(self.file.read(self.name))[index]
    whole = self.file.spec[self.name].shape
    start, stop = self.cut.rows(whole[0])
    part = (stop - start, *whole[1:])
    (rows, *rest), shape = region_of(self.name, part, index)
    moved = range(rows.start + start, rows.stop + start, rows.step)
    slices = [slice(r.start, r.stop, r.step) for r in (moved, *rest)]
    return self.file.read(self.name, tuple(slices)).reshape(shape)


class Part(NamedTuple):
  """One component of a model.

  Attributes:
    component: its name; "" if no name tells.
    file: where it lies.
    names: its tensors, without prefix -> names in the file.
    table: of its names.
    config: its config.json.
  """

  component: str
  file: Checkpoint
  names: Mapping[str, str]
  table: Table
  config: Mapping[str, Any]


class Components(Checkpoint):
  """A model's components as one checkpoint: a mapping read on demand.

  Attributes:
    parts: the components, of which there is one at least.
    configs: component -> its config.json.
    sources: name -> where the parameter lies.
    is_bare: whether names begin without the one component.
    left_out: name of a tensor, or of a component's folder -> why it is not
      among the names.
  """

  def __init__(
    self,
    path: Path,
    parts: Sequence[Part],
    others: Mapping[str, str],
    left_out: Mapping[str, str],
    *,
    is_bare: bool,
    names: str | None,
  ):
    files = list({id(part.file): part.file for part in parts}.values())
    super().__init__(
      path,
      files[0].format,
      {},
      _unread,
      places=[place for file in files for place in file.places],
      metadata=files[0].metadata,
    )
    self.parts, self.is_bare = tuple(parts), is_bare
    self.configs = {part.component: dict(part.config) for part in parts}
    self.left_out = dict(left_out)
    self._files = files
    self.sources: dict[str, Source] = {}
    for part in parts:
      prefix = "" if is_bare else f"{part.component}."
      self._add(prefix, part, names)
    for name, stored in others.items():
      self.sources[name] = Source(files[0], stored, Cut(stored))
    self.spec = {name: one.spec() for name, one in self.sources.items()}
    self.casts = {n for n, s in self.sources.items() if s.name in s.file.casts}

  def _add(self, prefix: str, part: Part, names: str | None) -> None:
    """Adds the parameters of one component."""
    shapes = {name: part.file.spec[at] for name, at in part.names.items()}
    table = part.table if names == DIFFUSERS else Table("")
    for name, cut in cuts_of(shapes, table).items():
      own = Source(part.file, part.names[cut.name], cut)
      if prefix + name in self.sources:
        raise ValueError(
          f"{self.path}: {own.name} and {self.sources[prefix + name].name} are "
          f"both {prefix}{name}; the file holds two models."
        )
      self.sources[prefix + name] = own
    stored = set(part.names.values())
    apart = prefix if len(self._files) > 1 else ""
    for companion, weight in part.file.companions.items():
      if weight in stored:
        self.companions[apart + companion] = apart + weight

  @property
  def config(self) -> dict[str, Any]:
    """Returns the config.json of the one component; {} if there are several."""
    return dict(self.parts[0].config) if len(self.parts) == 1 else {}

  @property
  def bytes_read(self) -> int:
    """Returns the bytes read so far, headers included."""
    return sum(file.bytes_read for file in self._files)

  def read(self, name: str, index: Any = ()) -> np.ndarray:
    """Reads `self[name][index]`, as `Checkpoint.read`.

    Args:
      name: a key.
      index: integers, slices with positive step, and one `...`.

    Returns:
      The array. Of a tensor whose halves are exchanged, or that is transposed,
      all is read.
    """
    return self.sources[name].read(index)


def _unread(name: str, region: Any) -> tuple[np.ndarray, int]:
  """Raises: the tensors are read from the components' files."""
  raise KeyError(name)


def open_components(
  path: str | os.PathLike,
  *,
  components: Sequence[str] | None = None,
  variant: str | None = None,
  names: str | None = None,
  float8: str | None = None,
) -> Checkpoint:
  """Opens a model with all its components as one checkpoint.

  Args:
    path: a folder of diffusers with `model_index.json`; a single file with the
      components' prefixes; or whatever `open_checkpoint` opens, of which the
      names stay as they are.
    components: those to open, by diffusers' names (`unet`, `transformer`,
      `text_encoder`, ...); None: all but `vae`, `image_encoder` and
      `safety_checker`.
    variant: as for `open_checkpoint`, in each component's folder.
    names: "diffusers" turns the names of the original's authors into those of
      diffusers and transformers, which keep some tensors in parts; None leaves
      them.
    float8: as for `open_checkpoint`.

  Returns:
    Checkpoint. Names begin with the component, unless there is no more than one
    and nothing in the file or folder says which. `left_out` has what is not
    among the names: other components, of folders as `vae/`, and moving averages
    (`model_ema.`).

  Raises:
    ValueError: as `open_checkpoint`; a component that is not there; a tensor
      that is no family's.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> tensors = {"model.diffusion_model.input_blocks.0.0.bias": np.ones(4),
    ...            "model.diffusion_model.out.2.weight": np.ones((4, 8, 3, 3)),
    ...            "first_stage_model.decoder.conv_in.bias": np.ones(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", tensors)
    ...   model = open_components(f"{folder}/x.safetensors", names="diffusers")
    >>> list(model), list(model.left_out)
    (['unet.conv_in.bias', 'unet.conv_out.weight'],
     ['first_stage_model.decoder.conv_in.bias'])
  """
  if names not in (None, DIFFUSERS):
    raise ValueError(f"names must be 'diffusers' or None, got {names!r}.")
  place = locate(path)
  if (place / _INDEX).is_file():
    return _open_pipeline(place, components, variant, names, float8)
  file = open_checkpoint(path, variant=variant, float8=float8)
  split = split_prefixes(file.spec)
  if split:
    return _open_single(file, split, components, names)
  shapes = {name: spec.shape for name, spec in file.spec.items()}
  table = table_of(shapes)
  if not table.spelling:
    _check_asked(components, [], file.path)
    return file
  part = Part(
    table.component, file, {n: n for n in file.spec}, table, file.config
  )
  if components and table.component not in components:
    # A text encoder's folder does not say which of several it is.
    text = [c for c in components if c.startswith(table.component)]
    _check_asked(None if text else components, [table.component], file.path)
    part = part._replace(component=text[0])
  return Components(file.path, [part], {}, {}, is_bare=True, names=names)


def _open_pipeline(
  folder: Path,
  components: Sequence[str] | None,
  variant: str | None,
  names: str | None,
  float8: str | None,
) -> Components:
  """Opens the components of a pipeline's folder that have weights."""
  index = read_json(folder / _INDEX)
  there = [
    name
    for name in (index if isinstance(index, dict) else ())
    if (folder / name).is_dir()
    and any(f.suffix in _WEIGHTS for f in (folder / name).iterdir())
  ]
  taken = _taken(there, components, folder)
  parts = []
  for name in taken:
    file = open_checkpoint(folder / name, variant=variant, float8=float8)
    shapes = {n: spec.shape for n, spec in file.spec.items()}
    own = {n: n for n in file.spec}
    parts.append(Part(name, file, own, table_of(shapes), file.config))
  left = {f"{name}/": _why_left(name) for name in there if name not in taken}
  return Components(folder, parts, {}, left, is_bare=False, names=names)


def _open_single(
  file: Checkpoint,
  split: Mapping[str, tuple[str, str]],
  components: Sequence[str] | None,
  names: str | None,
) -> Components:
  """Opens a file that has its components under prefixes."""
  groups: dict[str, dict[str, str]] = {}
  for name, (component, rest) in split.items():
    own = groups.setdefault(component, {})
    if rest in own:
      raise ValueError(
        f"{file.path}: {own[rest]} and {name} are both {rest} of one component;"
        " the file holds two models."
      )
    own[rest] = name
  others = groups.pop("", {})
  tables = {
    component: table_of({n: file.spec[at].shape for n, at in own.items()})
    for component, own in groups.items()
  }
  main = tables[MAIN].component or "transformer" if MAIN in tables else ""
  called = {component: main if component == MAIN else component
            for component in groups}  # fmt: skip
  taken = _taken(called.values(), components, file.path)
  left = {name: "moving averages of the weights" for name in others
          if name.startswith(AVERAGES)}  # fmt: skip
  for component, own in groups.items():
    if called[component] not in taken:
      left |= dict.fromkeys(own.values(), _why_left(called[component]))
  parts = [
    Part(called[component], file, own, tables[component], {})
    for component, own in groups.items()
    if called[component] in taken
  ]
  rest = {name: name for name in others if name not in left}
  return Components(file.path, parts, rest, left, is_bare=False, names=names)


def _why_left(component: str) -> str:
  """Returns why a component is not among the names."""
  return f"the component {component} was not asked for (--components)"


def _taken(
  there: Iterable[str], asked: Sequence[str] | None, place: Path
) -> list[str]:
  """Returns the components that are opened, of those that are there."""
  there = list(dict.fromkeys(there))
  _check_asked(asked, there, place)
  taken = [
    c for c in there if (c in asked if asked is not None else c not in APART)
  ]
  if not taken:
    raise ValueError(
      f"{place} has no component with weights but {name_some(there) or 'none'}"
      "; say which to open: --components (components=[...])."
    )
  return taken


def _check_asked(
  asked: Sequence[str] | None, there: Sequence[str], place: Path
) -> None:
  """Raises if a component that is asked for is not there."""
  if lost := [one for one in asked or () if one not in there]:
    raise ValueError(
      f"{place} has no component {name_some(lost)}; there are "
      f"{name_some(there, 9) or 'none with a name'}."
    )


def open_pair(
  base: str | os.PathLike,
  finetuned: str | os.PathLike,
  *,
  components: Sequence[str] | None = None,
  variant: str | None = None,
  names: str | None = None,
  float8: str | None = None,
) -> tuple[Checkpoint, Checkpoint]:
  """Opens two checkpoints of one model, so that their names agree.

  Args:
    base: as for `open_components`.
    finetuned: as for `open_components`.
    components: as for `open_components`; of each side.
    variant: as for `open_components`.
    names: as for `open_components`.
    float8: as for `open_components`.

  Returns:
    Both. Where one side begins its names with components, and the other is one
    component alone, that one's begin with it too.

  Raises:
    ValueError: as `open_components`; one side has the original's names and the
      other diffusers', and `names` does not say what to do; or no table has
      names of either side, and `names` is given.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   one, two = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
    ...   write_safetensors(one, {"txt_in.weight": np.ones((8, 4)),
    ...                           "final_layer.linear.weight": np.ones((8, 4))})
    ...   write_safetensors(two, {"x_embedder.weight": np.ones((8, 4))})
    ...   open_pair(one, two)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... has the original's names (final_layer.linear.weight), ...
    those of diffusers (x_embedder.weight): say --names=diffusers
    (names='diffusers').
  """
  paths = [locate(path) for path in (base, finetuned)]
  has_folder = any(path.is_dir() for path in paths)
  left, right = sides = [
    open_components(
      path,
      components=components,
      variant=variant if path.is_dir() or not has_folder else None,
      names=names,
      float8=float8,
    )
    for path in paths
  ]
  if names is None:
    _check_spelling(left, right)
  elif not any(_spellings(side) for side in sides):
    raise ValueError(
      f"--names={names}: no table has the names of {left.path}, "
      f"{name_some(left)}; known are {', '.join(FAMILIES)}."
    )
  if any(_is_split(side) for side in sides):
    left, right = (_with_component(side, names) for side in sides)
  return left, right


def _is_split(side: Checkpoint) -> bool:
  """Returns whether names begin with components."""
  return isinstance(side, Components) and not side.is_bare


def _with_component(side: Checkpoint, names: str | None) -> Checkpoint:
  """Returns a component's checkpoint with the component in its names."""
  if not isinstance(side, Components) or not side.is_bare:
    return side
  return Components(side.path, side.parts, {}, {}, is_bare=False, names=names)


def _spellings(side: Checkpoint) -> dict[str, tuple[str, str]]:
  """Returns component -> (spelling, a name of it) of what tables have."""
  if not isinstance(side, Components):
    return {}
  return {
    part.component: (part.table.spelling, next(iter(part.names.values())))
    for part in side.parts
    if part.table.spelling
  }


def _check_spelling(base: Checkpoint, finetuned: Checkpoint) -> None:
  """Raises if one side has the original's names and the other diffusers'."""
  one, two = _spellings(base), _spellings(finetuned)
  for component in (name for name in one if name in two):
    told = {one[component][0]: (base.path, one[component][1]),
            two[component][0]: (finetuned.path, two[component][1])}  # fmt: skip
    if len(told) > 1:
      (place, name), (other, twin) = told[ORIGINAL], told[DIFFUSERS]
      raise ValueError(
        f"{place} has the original's names ({name}), {other} those of "
        f"diffusers ({twin}): say --names=diffusers (names='diffusers')."
      )


def has_original_names(model: Checkpoint) -> bool:
  """Returns whether a component of a model has the original's names.

  Args:
    model: open, with `names=None`.

  Example:
    >>> from types import SimpleNamespace
    >>> has_original_names(SimpleNamespace())
    False
  """
  return any(s == ORIGINAL for s, _ in _spellings(model).values())
