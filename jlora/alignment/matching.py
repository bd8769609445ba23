# SPDX-License-Identifier: Apache-2.0
"""Git Re-Basin: reorders one network's hidden units to match another's.

Networks trained from different starts can be averaged only after their hidden
units are put in the same order. Finetunes of one base have the same order
already.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.alignment.descents import (
  agreement_of,
  check_alike,
  descend,
  layout_of_pair,
)
from jlora.alignment.layouts import Factor, Place, UnitLayout, lay_out_units
from jlora.alignment.permutations import (
  Permutations,
  check_permutations,
  compose,
  identity,
  is_identity,
  permuted,
)
from jlora.alignment.symmetries import FIXED, Symmetry
from jlora.messages import name_some
from jlora.numerics.backends import words_of
from jlora.paths import flatten, unflatten
from jlora.views import view_of

# Cosine of the weights above which two networks count as finetunes of one base.
# It is about 0 for networks from different starts and about 1 for finetunes.
_RELATED = 0.8


class Alignment(NamedTuple):
  """The permutations that matching found, and the scores along the way.

  Attributes:
    permutations: to be passed to `permute`.
    scores: inner products `<a, permuted b>`. For weights, before the first
      sweep and after each, never falling; for activations, before and after.
  """

  permutations: Permutations
  scores: tuple[float, ...]


def match_weights(
  a: Any,
  b: Any,
  symmetry: Symmetry,
  *,
  start: Permutations | None = None,
  key: jax.Array | None = None,
  sweeps: int = 100,
  tol: float = 1e-6,
) -> Alignment:
  """Finds the order of b's hidden units that brings its weights closest to a's.

      max_π <a, π(b)> = min_π ‖a - π(b)‖,   one permutation at a time:
      C = Σ unfold(a) unfold(π b)ᵀ,   max_p Σ_i C[i, p(i)]

  with C summed over all arrays that the permutation acts on, the other
  permutations held. A permutation with others inside it (heads, experts) is
  matched together with them: a pair's score is that of its best inner order.

  Args:
    a: a pytree of arrays; NumPy arrays are processed on the host.
    b: the network whose units are reordered, the same shapes.
    symmetry: of both networks.
    start: permutations of b to begin with; None moves nothing.
    key: PRNG key of the order in which a sweep visits the permutations; None
      is `key(0)`.
    sweeps: maximal number of sweeps.
    tol: a permutation changes only if that gains more than this share of the
      best conceivable score, so that rounding and ties move nothing.

  Returns:
    Alignment. The score never falls; the optimum reached is a local one. A
    sweep costs `2 n` operations per entry on every axis of n units, in float32,
    and O(n³) on the host per assignment; for heads and experts, as much for
    every pair of them. Upcasts one array of each network at a time. From
    sharded arrays only (n, n) scores reach the host.

  Raises:
    ValueError: paths or shapes differ, NaN or infinity, or as `lay_out_units`.

  Warns:
    UserWarning: the networks are aligned already, or are finetunes of one base.

  Example:
    >>> from jlora.alignment import chain
    >>> a = {"in/kernel": np.float32([[1, -2, 3]]),
    ...      "out/kernel": np.float32([[4], [-5], [0]])}
    >>> b = {"in/kernel": np.float32([[3, 1, -2]]),
    ...      "out/kernel": np.float32([[0], [4], [-5]])}
    >>> match_weights(a, b, chain(["in", "out"])).permutations
    {'unit.0': array([1, 2, 0])}

  References:
    Ainsworth, Hayase and Srinivasa (2022), algorithm 1; heads and what is
    inside them as in issue 6 of its repository. The first sweep starts with the
    permutations that alone permute the most numbers; the paper's order is
    random.
  """
  left, right = flatten(a), flatten(b)
  layout = layout_of_pair(left, right, symmetry)
  found = start or {}
  check_permutations(found, layout)
  found = {**identity(layout), **found}
  right = permuted(right, found, layout)
  relation = _cosine(left, right)
  found, scores = descend(left, right, layout, found, key, sweeps, tol)
  if start is None:
    _warn_of_relation(is_identity(found), relation)
  return Alignment(found, scores)


def match_activations(
  a: Mapping[str, Any],
  b: Mapping[str, Any],
  symmetry: Symmetry,
  like: Any,
) -> Alignment:
  """Finds the order of b's hidden units whose activations are closest to a's.

      C = E[x yᵀ],   max_p Σ_i C[i, p(i)]

  Args:
    a: path of a kernel (or norm, or embedding) -> its module's outputs,
      (..., out), on some data; before or after the nonlinearity, whichever the
      units are to be compared by. Any number of modules.
    b: the same for the other network, on the same data in the same order.
    symmetry: of both networks.
    like: the parameters, or anything of their shapes.

  Returns:
    Alignment. Permutations that act on none of the given outputs move nothing.
    Each permutation is found independently, by one assignment. Costs `2 n²`
    operations per sample and O(n³) on the host.

  Raises:
    ValueError: paths or shapes differ, a path is not a parameter, NaN.

  Example:
    >>> from jlora.alignment import chain
    >>> w = {"in/kernel": np.ones((1, 2)), "out/kernel": np.ones((2, 1))}
    >>> x = np.float32([[1, 0], [0, 2]])
    >>> match_activations({"in/kernel": x}, {"in/kernel": x[:, ::-1]},
    ...                   chain(["in", "out"]), w).permutations
    {'unit.0': array([1, 0])}

  References:
    Ainsworth et al. (2022), section 3.1; Li et al. (2015).
  """
  shapes = flatten(like)
  layout = lay_out_units(symmetry, shapes)
  check_alike(a, b)
  wrong = [
    path
    for path in a
    if path not in layout.places
    or any(peer not in a for peer in layout.places[path].peers)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} paths are no parameters, or of some experts alone: "
      f"{name_some(wrong)}. Name outputs by the kernel they come from."
    )
  places = {
    path: Place(
      (
        ((Factor(FIXED, x.size // x.shape[-1]),),),
        layout.places[path].axes[_output(path, shapes[path].shape, symmetry)],
      ),
      *layout.places[path][1:],
    )
    for path, x in a.items()
  }
  left, right = (
    {path: x.reshape(-1, x.shape[-1]) for path, x in each.items()}
    for each in (a, b)
  )
  own = UnitLayout(places, layout.sizes, layout.outer)
  found, _ = descend(left, right, own, identity(layout), None, 1, 1e-6)
  scores = (
    agreement_of(left, right),
    agreement_of(left, permuted(right, found, own)),
  )
  return Alignment(found, scores)


def merge_many(
  models: Sequence[Any],
  symmetry: Symmetry,
  *,
  key: jax.Array | None = None,
  sweeps: int = 100,
  tol: float = 1e-6,
) -> tuple[Any, list[Permutations]]:
  """Averages networks after putting their hidden units in one order.

      model_i ← match(mean of the others, model_i),  in turn, until none moves

  Args:
    models: pytrees of one structure, two or more.
    symmetry: of all networks.
    key: PRNG key of the orders in which models and permutations are visited;
      None is `key(0)`.
    sweeps: maximal number of sweeps over the models.
    tol: as for `match_weights`.

  Returns:
    The mean, computed in float32 and rounded once to each leaf's dtype, and the
    permutations of each model. Costs one matching per model and sweep; holds
    all models and one mean in float32.

  Raises:
    ValueError: fewer than two models, or as `match_weights`.

  Approximation: all models are first aligned with the first one. The paper
  starts from the models as they are, but the mean of networks in different
  orders is a poor target.

  Example:
    >>> from jlora.alignment import chain
    >>> w = {"in/kernel": np.float32([[1, 2]]),
    ...      "out/kernel": np.float32([[3], [4]])}
    >>> v = {path: x.reshape(-1)[::-1].reshape(x.shape)
    ...      for path, x in w.items()}
    >>> merge_many([w, v], chain(["in", "out"]))[0]["in/kernel"]
    array([[1., 2.]], dtype=float32)

  References:
    Ainsworth et al. (2022), algorithm 2 (MergeMany).
  """
  if len(models) < 2:
    raise ValueError(f"{len(models)} models: merging takes two or more.")
  flats = [flatten(model) for model in models]
  layout = layout_of_pair(flats[0], flats[0], symmetry)
  for flat in flats[1:]:
    layout_of_pair(flats[0], flat, symmetry)
  found = [identity(layout) for _ in models]
  current = list(flats)

  def align(i: int, target) -> bool:
    """Aligns model i with a target; returns whether anything moved."""
    own, _ = descend(target, current[i], layout, identity(layout), key, sweeps,
                    tol)  # fmt: skip
    current[i] = permuted(current[i], own, layout)
    found[i] = compose(own, found[i], layout)
    return not is_identity(own)

  for i in range(1, len(models)):
    align(i, current[0])
  rng = np.random.default_rng(words_of(key))
  for _ in range(sweeps if len(models) > 2 else 0):
    moved = [
      align(int(i), _mean([x for j, x in enumerate(current) if j != i]))
      for i in rng.permutation(len(models))
    ]
    if not any(moved):
      break
  return unflatten(_mean(current, rounded=True), models[0]), found


def _output(path: str, shape: tuple[int, ...], symmetry: Symmetry) -> int:
  """Returns the axis of a kernel that indexes its module's outputs."""
  view = view_of(path, shape, symmetry.views)
  return -1 if view is None else view.outputs[-1]


def _cosine(left, right) -> float:
  """Computes the cosine of two networks' matrices, leaving out norms."""
  left = {path: x for path, x in left.items() if x.ndim > 1}
  right = {path: right[path] for path in left}
  norms = agreement_of(left, left) * agreement_of(right, right)
  return agreement_of(left, right) / norms**0.5 if norms > 0 else 0.0


def _mean(flats, *, rounded: bool = False) -> dict[str, Any]:
  """Averages networks in float32, optionally rounded to each leaf's dtype."""
  found = {}
  for path, leaf in flats[0].items():
    total = sum(flat[path].astype(np.float32) for flat in flats)
    mean = total / np.float32(len(flats))
    found[path] = mean.astype(leaf.dtype) if rounded else mean
  return found


def _warn_of_relation(is_same: bool, cosine: float) -> None:
  """Warns if matching was of no use: aligned already, or one base."""
  if is_same:
    warnings.warn(
      "The networks are aligned as they are: no permutation brings them "
      "closer. Alignment buys nothing here; merge them directly.",
      stacklevel=3,
    )
  elif cosine > _RELATED:
    warnings.warn(
      f"The networks' weights have a cosine of {cosine:.2f} as they are, so "
      "they have one base and their units correspond. Alignment buys nothing "
      "there; what was moved are units that hardly differ.",
      stacklevel=3,
    )
