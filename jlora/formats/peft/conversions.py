# SPDX-License-Identifier: Apache-2.0
"""Gives Loras to the parameters that transformers makes of a file's tensors.

transformers 5 stacks separate experts, cuts fused projections and joins parts
when it loads a checkpoint. Where PEFT does not do the same with a LoRA, the
Loras of a file's tensors are put together here as those of the parameters:

    stacked        a = [a_1; a_2; ...] by expert,       b the same
    joined rows    a = [a_1; a_2],                      b = diag(b_1, b_2)
    cut rows       a for each part,                     b's own columns

All are exact; those of what is joined have the sum of the ranks.

References:
  huggingface/transformers 5, `core_model_loading.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.formats.lazy import Lazy
from jlora.formats.peft.cuts import uneven_heights
from jlora.formats.peft.families import KNOWN_CONVERSIONS, Origin
from jlora.formats.peft.parts import Base, kind_of, module_of, with_names
from jlora.loras import Lora
from jlora.messages import name_some

_MIXED = "transformers makes one parameter of it and of others that have Loras"
_PARTIAL = "transformers makes one parameter of it and of others; give them all"


class Conversion(NamedTuple):
  """Tensors of a file, and the parameters that transformers makes of them.

  Attributes:
    parameters: names of the parameters.
    sources: the tensors' paths, by source of the converter, each in order.
    operations: (name, axes ...) of what is done.
  """

  parameters: tuple[str, ...]
  sources: tuple[tuple[str, ...], ...]
  operations: tuple[tuple[Any, ...], ...]

  @property
  def paths(self) -> list[str]:
    """Returns all tensors' paths."""
    return [path for row in self.sources for path in row]

  @property
  def is_cut(self) -> bool:
    """Returns whether it cuts a tensor."""
    return self.operations[0][0] in ("Chunk", "Split")

  @property
  def is_stack(self) -> bool:
    """Returns whether it stacks tensors along a new axis."""
    return self.operations[0][0] == "MergeModulelist"


def find_conversions(base: Base) -> list[Conversion]:
  """Lists what transformers makes of a file's tensors, and PEFT does not.

  Args:
    base: the base model; only one with a family has any.

  Returns:
    Those that can be done with Loras: all tensors are there, of one shape for
    each source of a stack, and it is known where to cut.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> config = {"model_type": "phimoe",
    ...           "architectures": ["PhimoeForCausalLM"]}
    >>> names = [f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"
    ...          for e in range(2)]
    >>> base = describe_base(dict.fromkeys(names, np.ones((3, 2))), None, None,
    ...                      None, config)
    >>> [each.parameters for each in find_conversions(base)]
    [('model.layers.0.mlp.experts.down_proj',)]
  """
  if base.family is None:
    return []
  found: dict[Origin, dict[int, list[str]]] = {}
  for path in sorted(base.shapes, key=_in_order):
    name = base.rename(path)
    origin = base.family.origin_of(name) if isinstance(name, str) else None
    if origin is not None:
      rows = found.setdefault(origin._replace(place=0), {})
      rows.setdefault(origin.place, []).append(path)
  conversions = [
    Conversion(
      origin.parameters,
      tuple(tuple(rows[place]) for place in sorted(rows)),
      origin.operations,
    )
    for origin, rows in found.items()
  ]
  return [each for each in conversions if _is_possible(each, base)]


def convert_base(base: Base, conversions: Iterable[Conversion]) -> Base:
  """Returns a base with parameters in the place of what they are made of.

  Args:
    base: the base model.
    conversions: from `find_conversions`.

  Returns:
    Base. A parameter's path is its name.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> base = describe_base({"qkv": np.ones((6, 2))}, None, None, None)
    >>> cut = Conversion(("q", "k", "v"), (("qkv",),), (("Chunk", 0),))
    >>> convert_base(base, [cut]).shapes
    {'q': (2, 2), 'k': (2, 2), 'v': (2, 2)}
  """
  conversions = list(conversions)
  gone = {path for each in conversions for path in each.paths}
  shapes = {p: shape for p, shape in base.shapes.items() if p not in gone}
  new = {
    name: shape
    for each in conversions
    for name, shape in _shapes_of(each, base).items()
  }
  rename = base.rename

  def named(path):
    return path if path in new else rename(path)

  converted = with_names(base, shapes | new, named if new else rename)
  return converted._replace(modules=converted.modules | _others(shapes, base))


def convert_loras(
  loras: Mapping[str, Lora],
  conversions: Sequence[Conversion],
  base: Base,
  left: dict[str, str],
) -> Mapping[str, Lora]:
  """Returns Loras of parameters in the place of those they are made of.

  Args:
    loras: path -> Lora, may be lazy.
    conversions: from `find_conversions`.
    base: the base, as it is in the file.
    left: receives path -> reason, of those whose parameter cannot be made.

  Returns:
    A lazy mapping: of a conversion, all Loras are in memory at once. The same
    where nothing is converted.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> base = describe_base({"qk": np.ones((4, 3))}, None, None, None)
    >>> cut = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
    >>> whole = Lora(np.ones((1, 3)), np.arange(4.)[None], np.float32(1))
    >>> convert_loras({"qk": whole}, [cut], base, {})["k"].b
    array([[2., 3.]])
  """
  makers = _unchanged(loras, conversions, base, left)
  if len(makers) == len(loras):
    return loras
  for each in conversions:
    if any(path in loras for path in each.paths):
      for at, name in enumerate(each.parameters):
        makers[name] = lambda at=at, each=each: _lora(at, each, loras, base)
  return Lazy(makers)


def convert_full(
  full: Mapping[str, Any],
  loras: Mapping[str, Any],
  conversions: Sequence[Conversion],
  base: Base,
  left: dict[str, str],
) -> Mapping[str, Any]:
  """Returns whole parameters in the place of the tensors they are made of.

  Args:
    full: path -> whole tensor, may be lazy.
    loras: path -> Lora, as they are in the file.
    conversions: from `find_conversions`.
    base: the base, as it is in the file.
    left: receives path -> reason, of those whose parameter cannot be made.

  Returns:
    A lazy mapping. The same where nothing is converted.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> base = describe_base({"qk": np.ones(4)}, None, None, None)
    >>> cut = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
    >>> convert_full({"qk": np.arange(4.)}, {}, [cut], base, {})["k"]
    array([2., 3.])
  """
  makers = _unchanged(full, conversions, base, left)
  if len(makers) == len(full):
    return full
  for each in conversions:
    given = [path for path in each.paths if path in full]
    if any(path in loras for path in each.paths):
      left.update(dict.fromkeys(given, _MIXED))
    elif 0 < len(given) < len(each.paths):
      left.update(dict.fromkeys(given, _PARTIAL))
    elif given:
      for at, name in enumerate(each.parameters):
        makers[name] = lambda at=at, each=each: _array(at, each, full, base)
  return Lazy(makers)


def revert_loras(
  loras: Mapping[str, Lora], conversions: Iterable[Conversion], base: Base
) -> dict[str, Lora]:
  """Returns Loras of a file's tensors in the place of the parameters'.

  Args:
    loras: path or parameter -> Lora.
    conversions: from `find_conversions`.
    base: the base, as it is in the file.

  Returns:
    {path: Lora}, without units that change nothing.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> base = describe_base({"qk": np.ones((4, 3))}, None, None, None)
    >>> cut = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
    >>> k = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))
    >>> revert_loras({"k": k}, [cut], base)["qk"].b
    array([[0., 0., 1., 1.]])
  """
  found = dict(loras)
  for each in conversions:
    given = {n: found.pop(n) for n in each.parameters if n in found}
    if given:
      found.update(_parted(each, given, base))
  return found


def revert_full(
  full: Mapping[str, Any], conversions: Iterable[Conversion], base: Base
) -> dict[str, Any]:
  """Returns whole tensors of a file in the place of the parameters'.

  Args:
    full: path or parameter -> value.
    conversions: from `find_conversions`.
    base: the base, as it is in the file.

  Returns:
    {path: value}.

  Raises:
    ValueError: a part of what a tensor of the file holds is not there.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> base = describe_base({"qk": np.ones(4)}, None, None, None)
    >>> cut = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
    >>> revert_full({"q": np.zeros(2), "k": np.ones(2)}, [cut], base)["qk"]
    array([0., 0., 1., 1.])
  """
  found = dict(full)
  for each in conversions:
    given = {n: found.pop(n) for n in each.parameters if n in found}
    if not given:
      continue
    missing = [name for name in each.parameters if name not in given]
    if missing:
      raise ValueError(
        f"{each.paths[0]} is not whole in the adapter: {name_some(missing)} are"
        " missing."
      )
    if each.is_cut:
      found[each.paths[0]] = np.concatenate([*given.values()])
      continue
    whole = given[each.parameters[0]]
    for path, part, rows in _slices(each, base.shapes):
      found[path] = (whole if part is None else whole[part])[rows]
  return found


def spread_reasons(
  left: dict[str, str],
  conversions: Iterable[Conversion],
  given: Iterable[str],
) -> None:
  """Moves the reasons of parameters to the tensors that they are made of.

  Args:
    left: path or parameter -> reason; changed in place.
    conversions: from `find_conversions`.
    given: paths of all changes.

  Example:
    >>> cut = Conversion(("q", "k"), (("qk",),), (("Chunk", 0),))
    >>> left = {"k": "a reason"}
    >>> spread_reasons(left, [cut], ["qk"]); left
    {'qk': 'k: a reason'}
  """
  given = set(given)
  for each in conversions:
    for name in each.parameters:
      if name in left:
        reason = f"{name}: {left.pop(name)}"
        left.update({path: reason for path in each.paths if path in given})


def together(base: Base | None) -> dict[str, list[str]]:
  """Returns path -> paths of all that one parameter is made of with it.

  Args:
    base: the base model, or None.

  Example:
    >>> together(None)
    {}
  """
  found = find_conversions(base) if base is not None else []
  return {path: each.paths for each in found for path in each.paths}


def _others(paths: Iterable[str], base: Base) -> set[str]:
  """Returns modules that transformers makes of tensors otherwise than here."""
  modules = set()
  for path in paths:
    name = base.rename(path)
    if base.family is not None and isinstance(name, str):
      origin = base.family.origin_of(name)
      modules |= (
        {module_of(to) for to in origin.parameters} if origin else set()
      )
  return modules


def _unchanged(
  given: Mapping[str, Any],
  conversions: Iterable[Conversion],
  base: Base,
  left: dict[str, str],
) -> dict[str, Callable[[], Any]]:
  """Returns makers of what is itself a parameter; gives reasons for the lost.

  Lost are tensors that transformers converts otherwise than here.
  """
  converted = {path for each in conversions for path in each.paths}
  makers: dict[str, Callable[[], Any]] = {}
  for path in given:
    if path in converted:
      continue
    name, origin = base.rename(path), None
    if base.family is not None and isinstance(name, str):
      origin = base.family.origin_of(name)
    if origin is None:
      makers[path] = lambda path=path: given[path]
    else:
      to = ", ".join(origin.parameters)
      left[path] = f"transformers turns it into {to}, and PEFT not its LoRA"
  return makers


def _in_order(path: str) -> list[Any]:
  """Sorts names by their numbers."""
  parts = re.split(r"(\d+)", path)
  return [int(part) if part.isdigit() else part for part in parts]


def _is_possible(each: Conversion, base: Base) -> bool:
  """Returns whether a conversion is known, its tensors there, and fit."""
  if each.operations not in KNOWN_CONVERSIONS:
    return False
  shapes = [[base.shapes[path] for path in row] for row in each.sources]
  if any(not kind_of(p, base.shapes[p], base).in_model for p in each.paths):
    return False
  if each.is_cut:
    return bool(_heights(each, base))
  if not each.is_stack:
    return all(len(row) == 1 for row in shapes)
  return (
    all(len(set(row)) == 1 for row in shapes)
    and len({len(row) for row in shapes}) == 1
    and (len(shapes) == 1 or len(each.operations) > 1)
  )


def _shapes_of(each: Conversion, base: Base) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter of a conversion."""
  rows = [base.shapes[row[0]] for row in each.sources]
  if each.is_cut:
    heights = zip(each.parameters, _heights(each, base), strict=True)
    return {name: (height, *rows[0][1:]) for name, height in heights}
  shape = (sum(row[0] for row in rows), *rows[0][1:])
  if each.is_stack:
    shape = (len(each.sources[0]), *shape)
  return dict.fromkeys(each.parameters, shape)


def _heights(each: Conversion, base: Base) -> list[int]:
  """Returns how many rows each part of a cut has; none if that is not known."""
  height = base.shapes[each.paths[0]][0]
  if each.operations[0][0] == "Split":
    return uneven_heights(height, each.parameters, base)
  count = len(each.parameters)
  return [] if height % count else [height // count] * count


def _cut(
  whole: Any, each: Conversion, base: Base, axis: int
) -> list[np.ndarray]:
  """Cuts an array into the parts of a conversion."""
  ends = np.cumsum(_heights(each, base))[:-1]
  return np.split(np.asarray(whole), ends, axis=axis)


def _array(
  at: int, each: Conversion, full: Mapping[str, Any], base: Base
) -> np.ndarray:
  """Returns a parameter, as transformers makes it."""
  if each.is_cut:
    return _cut(full[each.sources[0][0]], each, base, axis=0)[at]
  parts = [[np.asarray(full[path]) for path in row] for row in each.sources]
  if not each.is_stack:
    return np.concatenate([row[0] for row in parts])
  return np.concatenate([np.stack(row) for row in parts], axis=1)


def _lora(
  at: int, each: Conversion, loras: Mapping[str, Lora], base: Base
) -> Lora:
  """Returns the Lora of a conversion's parameter."""
  if each.is_cut:
    whole = loras[each.sources[0][0]]
    rows = _cut(whole.b, each, base, axis=-1)[at]
    return _made(whole.a, rows, whole.scale)
  given = {path: _folded(loras[path]) for path in each.paths if path in loras}
  dtype = next(iter(given.values()))[0].dtype

  def factors(path: str) -> tuple[np.ndarray, np.ndarray]:
    view = kind_of(path, base.shapes[path], base).view
    sizes = view.shape(base.shapes[path]) if view else (0, 0)
    none = np.zeros((0, sizes[0]), dtype), np.zeros((0, sizes[1]), dtype)
    return given.get(path, none)

  columns = [[*map(factors, row)] for row in zip(*each.sources, strict=True)]
  if not each.is_stack:
    a, b = _join(columns[0], _rows_are_inputs(each, base))
    return _made(a, b, np.float32(1))
  ranks = [
    max(len(column[row][0]) for column in columns)
    for row in range(len(each.sources))
  ]
  joined = [
    _join([_pad(*f, rank) for f, rank in zip(column, ranks, strict=True)])
    for column in columns
  ]
  a, b = (np.stack(found) for found in zip(*joined, strict=True))
  return _made(a, b, np.ones(len(a), np.float32))


def _parted(
  each: Conversion, given: Mapping[str, Lora], base: Base
) -> dict[str, Lora]:
  """Returns the Loras of a conversion's tensors from those of parameters."""
  if each.is_cut:
    return {each.paths[0]: _rejoined(each, given, base)}
  a, b = _folded(given[each.parameters[0]])
  if each.is_stack and a.ndim == 2:  # of one expert
    a, b = a[None], b[None]
  rows_are_inputs = _rows_are_inputs(each, base)
  found = {}
  for path, part, rows in _slices(each, base.shapes):
    one, other = (a, b) if part is None else (a[part], b[part])
    if rows_are_inputs:
      one = one[:, rows]
    else:
      other = other[:, rows]
    used = one.any(axis=1) & other.any(axis=1)
    if used.any():
      found[path] = _made(one[used], other[used], np.float32(1))
  return found


def _rows_are_inputs(each: Conversion, base: Base) -> bool:
  """Returns whether its tensors are tables, whose rows a Lora reads."""
  path = each.paths[0]
  view = kind_of(path, base.shapes[path], base).view
  return view is not None and view.inputs == (0,)


def _rejoined(each: Conversion, given: Mapping[str, Lora], base: Base) -> Lora:
  """Returns the Lora of a tensor from those of the parts it is cut into."""
  parts = [_folded(given[n]) if n in given else None for n in each.parameters]
  known = next(part for part in parts if part is not None)
  width, dtype = known[0].shape[1], known[0].dtype
  parts = [
    (np.zeros((0, width), dtype), np.zeros((0, height), dtype))
    if part is None
    else part
    for part, height in zip(parts, _heights(each, base), strict=True)
  ]
  if all(np.array_equal(part[0], known[0]) for part in parts):
    b = np.concatenate([part[1] for part in parts], axis=1)
    return _made(known[0], b, np.float32(1))
  return _made(*_join(parts), np.float32(1))


def _slices(
  each: Conversion, shapes: Mapping[str, tuple]
) -> Iterator[tuple[str, int | None, slice]]:
  """Yields where in a parameter each tensor is: path, index, rows."""
  start = 0
  for row in each.sources:
    end = start + shapes[row[0]][0]
    for index, path in enumerate(row):
      yield path, index if each.is_stack else None, slice(start, end)
    start = end


def _made(a: Any, b: Any, scale: Any) -> Lora:
  """Makes a Lora of NumPy arrays."""
  return Lora(a, b, scale)


def _folded(lora: Lora) -> tuple[np.ndarray, np.ndarray]:
  """Returns a Lora's factors, with its scale in the second."""
  a, b = np.asarray(lora.a), np.asarray(lora.b)
  scale = np.asarray(lora.scale, np.float32)[..., None, None]
  return a, b if (scale == 1).all() else b.astype(np.float32) * scale


def _pad(a: np.ndarray, b: np.ndarray, rank: int):
  """Adds units of zeros."""
  more = ((0, rank - len(a)), (0, 0))
  return np.pad(a, more), np.pad(b, more)


def _join(
  factors: Sequence[tuple[np.ndarray, np.ndarray]],
  rows_are_inputs: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Joins Loras of parts along their outputs, or along their inputs."""
  first, second = zip(*factors, strict=True)
  if rows_are_inputs:
    return _diagonal(first), np.concatenate(second)
  return np.concatenate(first), _diagonal(second)


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
  """Returns a block-diagonal matrix."""
  sizes = np.sum([block.shape for block in blocks], axis=0)
  whole = np.zeros(sizes, np.result_type(*blocks))
  row = column = 0
  for block in blocks:
    height, width = block.shape
    whole[row : row + height, column : column + width] = block
    row, column = row + height, column + width
  return whole
