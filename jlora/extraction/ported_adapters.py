# SPDX-License-Identifier: Apache-2.0
"""Carries a whole adapter to another base, and says what weights can say of it.

kept = |Δ_t| / |Δ_s|,   drift = |w_t - w_s| / |w_s|
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.extraction.porting import Port, add, find_spaces, port
from jlora.factoring.factorisers import Factoriser, svd
from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some
from jlora.paths import arrays_of, flatten
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, as_matrix, views_of

_OTHER_LENGTH = 1.5  # a weight that grew by this is said


class Ported(NamedTuple):
  """An adapter on another base.

  Attributes:
    loras: path in the target -> Lora.
    rows: path in the target -> figures: `source` (its path there), `kept`,
      `drift`, `read_alike` and `write_alike` (mean squared cosines of the
      principal angles between the leading spaces of both weights), `length`
      (|w_t| / |w_s|), `k` and `is_kept`.
    left_out: paths in the source whose Loras are not in `loras`.
  """

  loras: Loras
  rows: dict[str, dict[str, Any]]
  left_out: list[str]


class _Side(NamedTuple):
  """The weights of one base, and how they are read as matrices."""

  leaves: Mapping[str, Any]
  views: Mapping[str, MatrixView]

  def matrix(self, path: str) -> Any:
    """Reads one weight as (..., in, out)."""
    return as_matrix(self.leaves[path], self.views[path])


def port_adapter(
  loras: Mapping[str, Lora],
  source: Any,
  target: Any,
  *,
  method: Port = add,
  k: int | None = None,
  keep: float = 0.0,
  paths: Mapping[str, str | None] | None = None,
  factor: Factoriser = svd,
  views: Iterable[ViewRule] | None = None,
) -> Ported:
  """Carries an adapter from the base it was made on to another base.

      loras_t[path] = method(loras_s[path], source[path], target[path])

  Args:
    loras: path -> Lora, with paths as in `source`.
    source: a pytree of arrays or an open checkpoint.
    target: likewise.
    method: `add`, `project`, `both_parts` or `rotate`.
    k: how many leading singular vectors a space has; None is min(in, out) for
      the method, and a quarter of it, at least 1, for the figures.
    keep: modules of which less is kept are left out.
    paths: path in the source -> path in the target, for those that are named
      otherwise there; None leaves a module out. The layers of a model that has
      others are mapped so.
    factor: finds spaces: `svd`, or `krylov` where k is small.
    views: how parameters are read as matrices; by default by their names.

  Returns:
    Ported. Figures of stacks of layers are those of the whole stack. One module
    of both bases is in memory at a time; of the checkpoints nothing else.

  Raises:
    ValueError: a Lora that no parameter of the source or of the target belongs
      to, several for one of the target, other shapes, or as `port`. Names up to
      three and counts the rest. A weight of another shape (a grown vocabulary,
      another width) has no port by weights.

  Warns:
    UserWarning: weights whose lengths differ by more than half: a norm's scale
      may have been folded into one of them.

  Example:
    >>> old, new = {"w": jnp.eye(2)}, {"w": 1.1 * jnp.eye(2)}
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> found = port_adapter({"w": lora}, old, new)
    >>> round(found.rows["w"]["drift"], 4), found.rows["w"]["kept"]
    (0.1, 1.0)
  """
  check_loras(loras)
  places = _places(loras, paths or {})
  left_out = [path for path in loras if path not in places]
  given = {
    path: (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    for path, lora in loras.items()
    if path in places
  }
  old = _side("source", source, given, views)
  moved = {places[path]: shape for path, shape in given.items()}
  new = _side("target", target, moved, views)
  _check_shapes(given, places, old, new)
  found, rows = {}, {}
  for path, to in places.items():
    lora, once = loras[path], _remembered(factor)
    before = jnp.asarray(old.matrix(path), jnp.float32)
    after = jnp.asarray(new.matrix(to), jnp.float32)
    ported = port(lora, before, after, method=method, k=k, factor=once)
    figures = _figures(lora, ported, before, after, k, once)
    row: dict[str, Any] = {"source": path, **figures}
    row["is_kept"] = not row["kept"] < keep
    rows[to] = row
    if row["is_kept"]:
      found[to] = ported
    else:
      left_out.append(path)
  _warn_of_lengths(rows)
  return Ported(found, rows, left_out)


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


def _side(name: str, tree: Any, known, views) -> _Side:
  """Finds the parameters of one base that Loras belong to."""
  if isinstance(tree, Checkpoint):
    leaves: Mapping[str, Any] = tree
    shapes = {path: one.shape for path, one in tree.spec.items()}
    table = table_for(shapes, tree.config.get("model_type"))
  else:
    leaves = arrays_of(flatten(tree))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    table = table_for(leaves, tree=tree)
  lacking = [path for path in known if path not in shapes]
  if lacking:
    raise ValueError(
      f"The {name} lacks {len(lacking)} parameters that Loras are for: "
      f"{name_some(lacking)}; map them by paths=, to None to leave them out."
    )
  wanted = {path: shapes[path] for path in known}
  found = views_of(wanted, table if views is None else tuple(views), known)
  return _Side(leaves, found)


def _check_shapes(given, places, old: _Side, new: _Side) -> None:
  """Raises unless every weight has its Lora's shape on both sides."""
  wrong = []
  for path, shape in given.items():
    for name, side, own in (
      ("source", old, path),
      ("target", new, places[path]),
    ):
      view, leaf = side.views.get(own), _shape_of(side.leaves, own)
      if view is None or view.shape(leaf) != shape:
        read = leaf if view is None else view.shape(leaf)
        wrong.append(f"{own}: Lora {shape}, {name} {read}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} weights have no Lora's shape: {name_some(wrong)}. Weights "
      "alone say nothing of other shapes; leave these out by paths={...: None}."
    )


def _shape_of(leaves: Mapping[str, Any], path: str) -> tuple[int, ...]:
  """Returns a parameter's shape, without reading a checkpoint's array."""
  if isinstance(leaves, Checkpoint):
    return leaves.spec[path].shape
  return leaves[path].shape


def _figures(lora, ported, w_source, w_target, k, factor) -> dict[str, Any]:
  """Computes what a module's weights say of its port."""
  most = min(w_source.shape[-2:])
  k = max(1, most // 4) if k is None else k
  source, target = (find_spaces(w, k, factor) for w in (w_source, w_target))
  size, length = (float(jnp.linalg.norm(w)) for w in (w_source, w_target))
  moved = float(jnp.linalg.norm(w_target - w_source))
  before, after = _length(lora), _length(ported)
  return {
    "kept": after / before if before else float("nan"),
    "drift": moved / size if size else float("nan"),
    "read_alike": _alike(source.reads, target.reads),
    "write_alike": _alike(source.writes, target.writes),
    "length": length / size if size else float("nan"),
    "k": k,
  }


def _remembered(factor: Factoriser) -> Factoriser:
  """Returns a factoriser that factors each of two weights once for each k."""
  found: dict[tuple[int, int], Any] = {}

  def run(w, k, key=None):
    """Factors a weight, or returns what was found."""
    at = id(w), k
    if at not in found:
      found[at] = w, factor(w, k, key)  # w: so that its id stays its own
    return found[at][1]

  return run


def _length(lora: Lora) -> float:
  """Returns |scale aᵀ b|, over all layers of a stack, from the factors."""
  grams = [
    jnp.einsum("...rn,...sn->...rs", x, x, precision=jax.lax.Precision.HIGHEST)
    for x in (lora.a.astype(jnp.float32), lora.b.astype(jnp.float32))
  ]
  squares = jnp.sum(grams[0] * grams[1], axis=(-1, -2))
  return float(jnp.sqrt(jnp.maximum(jnp.sum(lora.scale**2 * squares), 0.0)))


def _alike(one: jax.Array, two: jax.Array) -> float:
  """Returns the mean squared cosine of the angles between spaces."""
  both = jnp.einsum(
    "...nk,...nl->...kl", one, two, precision=jax.lax.Precision.HIGHEST
  )
  count = jnp.sum(jnp.square(one), axis=(-1, -2))
  share = jnp.sum(jnp.square(both), axis=(-1, -2)) / jnp.maximum(count, 1.0)
  return float(jnp.mean(share))


def _warn_of_lengths(rows) -> None:
  """Warns of weights that are much longer or shorter than the source's."""
  far = [
    f"{path} ({row['length']:.2f} x)"
    for path, row in rows.items()
    if not 1 / _OTHER_LENGTH < row["length"] < _OTHER_LENGTH
    and not np.isnan(row["length"])
  ]
  if far:
    warnings.warn(
      f"{len(far)} weights differ much in length from the source's: "
      f"{name_some(far)}; if a norm's scale was folded into one of the bases, "
      "their directions do not compare.",
      stacklevel=3,
    )
