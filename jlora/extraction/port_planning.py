# SPDX-License-Identifier: Apache-2.0
"""What a port carries where: paths, views of both bases, rows of vocabularies.

Loras, map ─► places ─► weights of both bases, and how they are read ─► PortPlan
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.pairing.match import is_table
from jlora.pairing.vocabularies import (
  read_both_tokens,
  read_tokens,
  rows_by_token,
)
from jlora.paths import arrays_of, flatten
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, as_matrix, views_of


class Side(NamedTuple):
  """The weights of one base, and how they are read as matrices.

  Attributes:
    leaves: path -> parameter.
    shapes: path -> its shape, of those that are looked at.
    views: path -> how it is read.
  """

  leaves: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  views: Mapping[str, MatrixView]

  def matrix(self, path: str, leaf: Any) -> Any:
    """Reads a parameter as (..., in, out)."""
    return as_matrix(leaf, self.views[path])


class PortPlan(NamedTuple):
  """Which Lora goes where.

  Attributes:
    places: path in the source -> path in the target.
    unmapped: paths in the source that the map leaves out.
    old: the source.
    new: the target.
    rows: path in the source -> for each row of the target's parameter the row
      of the source's, -1: there is none. Where it is missing rows are the same.
    axes: path in `rows` -> the axis of the matrix, -2 (in) or -1 (out), that
      the rows lie along.
  """

  places: dict[str, str]
  unmapped: list[str]
  old: Side
  new: Side
  rows: Mapping[str, np.ndarray]
  axes: Mapping[str, int]


def plan_port(
  loras: Mapping[str, Lora],
  source: Any,
  target: Any,
  *,
  paths: Mapping[str, str | None] | None = None,
  rows: Mapping[str, Sequence[int]] | None = None,
  views: Iterable[ViewRule] | None = None,
) -> PortPlan:
  """Plans a port, from shapes alone.

  Args:
    loras: path -> Lora, with paths as in `source`.
    source: a pytree of arrays or an open checkpoint.
    target: likewise.
    paths: as for `port_adapter`.
    rows: as for `port_adapter`.
    views: as for `port_adapter`.

  Returns:
    PortPlan; of checkpoints no tensor is read.

  Raises:
    ValueError: as `port_adapter`.

  Example:
    >>> lora = Lora(*map(np.ones, ((1, 2), (1, 2), ())))
    >>> tree = {"w": np.eye(2)}
    >>> plan_port({"w": lora}, tree, tree).places
    {'w': 'w'}
  """
  check_loras(loras)
  places = _places(loras, paths or {})
  given = {
    path: (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    for path, lora in loras.items()
    if path in places
  }
  old = _side("source", source, given, views)
  if rows is None:
    are_stored = isinstance(source, Checkpoint) and isinstance(
      target, Checkpoint
    )
    rows = match_rows(places, source, target) if are_stored else {}
  found = {path: np.asarray(rows[path], int) for path in places if path in rows}
  axes = _axes(found, old)
  wanted: dict[str, tuple[int, ...]] = dict(given)
  for path, axis in axes.items():
    shape = [*given[path]]
    shape[axis] = len(found[path])
    wanted[path] = tuple(shape)
  moved = {places[path]: shape for path, shape in wanted.items()}
  new = _side("target", target, moved, views)
  _check_shapes(given, wanted, places, old, new)
  _check_rows(found, axes, given)
  unmapped = [path for path in loras if path not in places]
  return PortPlan(places, unmapped, old, new, found, axes)


def match_rows(
  places: Mapping[str, str], source: Checkpoint, target: Checkpoint
) -> dict[str, tuple[int, ...]]:
  """Finds for each row of the target's tables the source's of the same token.

  Args:
    places: path in the source -> path in the target; embeddings and heads are
      known by their names in the source.
    source: a checkpoint, with its tokenizer beside it.
    target: likewise.

  Returns:
    As `rows` of `port_adapter`, of tables whose rows are not the same ones: by
    token, and by number where both tokenizers are the same.

  Raises:
    ValueError: tables of different lengths, and no tokenizer to tell why, or
      tokenizers without a token in common.

  Example:
    >>> match_rows({}, None, None)
    {}
  """
  tables = {
    path: to
    for path, to in places.items()
    if is_table(path) and path in source.spec and to in target.spec
  }
  if not tables:
    return {}
  tokens = read_both_tokens(target.path, source.path)
  if tokens is not None and not {*tokens[0].values()} & {*tokens[1].values()}:
    raise ValueError(
      f"The tokenizers at {source.path} and {target.path} have no token in "
      f"common, so that no row of {name_some(tables)} has a place; leave them "
      "out by paths={...: None}."
    )
  found = {}
  for path, to in tables.items():
    there, here = source.spec[path].shape[0], target.spec[to].shape[0]
    rows = None
    if tokens is not None:
      rows = rows_by_token(*tokens, (here, there))
    elif here != there:
      _check_tokens(path, (there, here), source, target)
    if rows is None and here != there:
      rows = tuple(n if n < there else -1 for n in range(here))
    if rows is not None:
      found[path] = rows
  return found


def expand_map(
  given: Mapping[str, str | None], paths: Iterable[str]
) -> dict[str, str | None]:
  """Turns a map of parts of a model into one of its parameters.

  Args:
    given: name in the source -> name in the target, or None. A name that ends
      in "." or "/" stands for all paths that begin with it; the longest counts.
    paths: of the adapter.

  Returns:
    {path: path or None}, of those that the map is about.

  Raises:
    ValueError: a part that no path is in, or one that is sent to a parameter.

  Example:
    >>> expand_map({"h.1.": "h.2.", "h.2.": None}, ["h.1.q", "h.2.q", "head"])
    {'h.1.q': 'h.2.q', 'h.2.q': None}
  """
  paths, found, used = list(paths), {}, set()
  parts = [name for name in given if name.endswith((".", "/"))]
  wrong = [
    f"{name} -> {given[name]}"
    for name in given
    if (to := given[name]) is not None
    and (name in parts) != to.endswith((".", "/"))
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} entries of the map send a part to a parameter or the "
      f"reverse: {name_some(wrong)}; end both names in '.', or neither."
    )
  for path in paths:
    fitting = [name for name in parts if path.startswith(name)]
    name = path if path in given else max(fitting, key=len, default=None)
    if name is not None:
      used.add(name)
      to = given[name]
      found[path] = None if to is None else to + path[len(name) :]
  unused = [name for name in given if name not in used]
  if unused:
    raise ValueError(
      f"{len(unused)} names are mapped that the adapter does not have: "
      f"{name_some(unused)}; it has {name_some(paths)}."
    )
  return found


def _places(loras, paths) -> dict[str, str]:
  """Returns {path in the source: path in the target}, of what is ported."""
  unknown = [path for path in paths if path not in loras]
  if unknown:
    raise ValueError(
      f"{len(unknown)} paths are mapped that the adapter does not have: "
      f"{name_some(unknown)}; it has {name_some(loras)}."
    )
  found = {path: paths.get(path, path) for path in loras}
  places = {path: to for path, to in found.items() if to is not None}
  ends = list(places.values())
  twice = sorted({to for to in ends if ends.count(to) > 1})
  if twice:
    raise ValueError(
      f"{len(twice)} parameters of the target would have several Loras: "
      f"{name_some(twice)}; map one to each."
    )
  return places


def _side(name: str, tree: Any, known, views) -> Side:
  """Finds the parameters of one base that Loras belong to."""
  if isinstance(tree, Checkpoint):
    leaves: Mapping[str, Any] = tree
    shapes = {path: one.shape for path, one in tree.spec.items()}
    table = table_for(shapes, tree.config.get("model_type"))
  else:
    leaves = arrays_of(flatten(tree))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    table = table_for(leaves, tree=tree)
  lacking = [path for path in known if path not in shapes]
  if lacking:
    raise ValueError(
      f"The {name} lacks {len(lacking)} parameters that Loras are for: "
      f"{name_some(lacking)}; map them by paths=, to None to leave them out."
    )
  wanted = {path: shapes[path] for path in known}
  found = views_of(wanted, table if views is None else tuple(views), known)
  return Side(leaves, wanted, found)


def _check_shapes(given, wanted, places, old: Side, new: Side) -> None:
  """Raises unless every weight has its Lora's shape on both sides."""
  wrong = []
  for path in given:
    for name, side, own, shape in (
      ("source", old, path, given[path]),
      ("target", new, places[path], wanted[path]),
    ):
      view, leaf = side.views.get(own), side.shapes[own]
      if view is None or view.shape(leaf) != shape:
        read = leaf if view is None else view.shape(leaf)
        wrong.append(f"{own}: Lora {shape}, {name} {read}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} weights have no Lora's shape: {name_some(wrong)}. Weights "
      "alone say nothing of other shapes, but for vocabularies, whose rows are "
      "matched by rows=; leave these out by paths={...: None}."
    )


def _axes(rows: Mapping[str, np.ndarray], old: Side) -> dict[str, int]:
  """Returns the axis of each matrix that a parameter's rows lie along."""
  found = {}
  for path in rows:
    view = old.views.get(path)
    sides = {-2: view.inputs, -1: view.outputs} if view else {}
    axis = next((at for at, own in sides.items() if own == (0,)), None)
    if axis is None:
      raise ValueError(
        f"{path} has no first axis of its own to match rows along; leave it "
        "out of rows=."
      )
    found[path] = axis
  return found


def _check_rows(rows, axes, given) -> None:
  """Raises unless rows are numbers of the source's rows, some of them there."""
  wrong = [
    f"{path}: {row.min()} to {row.max()} of {given[path][axes[path]]}"
    if row.size and row.max() >= 0
    else f"{path}: none"
    for path, row in rows.items()
    if row.ndim != 1
    or not row.size
    or row.min() < -1
    or not 0 <= row.max() < given[path][axes[path]]
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} tables have no rows in common: {name_some(wrong)}; give "
      "for each row of the target one of the source, or -1."
    )


def _check_tokens(path: str, rows: tuple[int, int], source, target) -> None:
  """Raises unless the tokens of both sides are known."""
  unread = [
    str(one.path) for one in (source, target) if read_tokens(one.path) is None
  ]
  if unread:
    raise ValueError(
      f"{path} has {rows[0]} rows in the source and {rows[1]} in the target, "
      f"and no tokenizer that can be read lies at {name_some(unread)} to tell "
      "which are the same: put tokenizer.json there, or leave it out by "
      "paths={...: None}."
    )
