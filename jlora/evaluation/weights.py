# SPDX-License-Identifier: Apache-2.0
"""Measures how much of a finetune's weight change given programs miss.

Works for any Loras, extracted or trained; the change itself is not factored.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.adapting.programs import Shift
from jlora.factoring.certificates import certificate
from jlora.factoring.deltas import difference, survey
from jlora.factoring.figures import Measured, row_of, summarise
from jlora.factoring.rounding import ulp_histogram
from jlora.loras import Lora, check_loras, exchange
from jlora.messages import name_some
from jlora.numerics.backends import library_of, normal, over_leading
from jlora.numerics.meshes import run_automatic
from jlora.numerics.sums import norm_of, sum_of_squares
from jlora.pairing.match import pair_up
from jlora.pairing.pairs import names_of, read_side
from jlora.paths import arrays_of, flatten
from jlora.tree_views import table_for
from jlora.views import (
  MatrixView,
  ViewRule,
  in_stored_order,
  views_of,
)

_PROBES = 8
_TURNS = 8


class Comparison(NamedTuple):
  """What given programs miss of a finetune's change.

  Attributes:
    rows: path -> figures of each program, which can be written as JSON.
    totals: figures of the whole change.

  Example:
    >>> Comparison({}, {"relative_error": 0.5}).totals["relative_error"]
    0.5
  """

  rows: dict[str, dict[str, Any]]
  totals: dict[str, Any]


def compare(
  base: Any,
  finetuned: Any,
  programs: Mapping[str, Lora | Shift],
  *,
  views: Iterable[ViewRule] | None = None,
) -> Comparison:
  """Measures given programs against a finetune's change of the weights.

      delta = finetuned - base,   change = scale aᵀ b,   error = delta - change
      total error² = Σ ‖error‖² + Σ ‖delta‖² of what has no program

  Args:
    base: a pytree of arrays, or an open checkpoint. Leaves that are no arrays
      are passed over.
    finetuned: the finetune, as for `extract`.
    programs: path -> Lora, extracted or trained, or Shift; paths of the base.
    views: rules for reading a parameter as a matrix; by default those for the
      names found.

  Returns:
    Comparison. `rows` is in the order of the programs. The row of a Lora has
    the fields of a row of `report.json` (`row_of`): among others rank
    (nominal), mse, cosine_distance, mean_abs_delta, relative_error, energy,
    effective_rank (the entropy rank), stable_rank, rank_90, rank_95, rank_99,
    noise_floor_rank, relative_change, learnt_norm and rounding_share (None
    where what was learnt cannot be told from rounding, see
    `jlora.factoring.rounding`) and unchanged. In addition: `spectral_error`,
    the largest singular value of the error (of the worst member of a batch),
    estimated from below by power iteration; and `bytes` of the factors. The row
    of a Shift has shape, norm, error, relative_error, energy, mse,
    mean_abs_delta, relative_change, unchanged and bytes.

    `totals` counts every floating parameter that both sides have, norms and
    biases included, and complex ones, which no program can change: `norm` and
    `error` (Frobenius, of all as one vector), `relative_error`, `energy`,
    `programs` (their number), `bytes` of them, `left_out` (changed parameters
    without a program) and `left_out_share` (the norm of their changes over that
    of all).

    `singular_values`, and the ranks and the bound computed from them, are those
    of the delta within the row space of b. Figures by rank take the units in
    their stored order. A trained Lora's units are not sorted by strength, so
    sort them first (`recompress`) if ranks below the nominal one matter.
    Changes of float64 are formed in float64 and rounded once to float32. Every
    parameter is read once, one at a time. A Lora costs four to five products of
    `2 in out rank` operations and 32 reads of the delta. NumPy arrays are
    processed on the host, JAX arrays on their devices.

  Raises:
    ValueError: a program without a pair of parameters, of complex ones, or that
      does not fit, or a change that is not finite.

  Example:
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> finetuned = {"w": np.array([[3, 0], [4, 5]], np.float32)}
    >>> a, b = np.float32([[1.5, 4.5]]), np.ones((1, 2), np.float32)
    >>> found = compare(base, finetuned, {"w": Lora(a, b, np.float32(1))})
    >>> row = found.rows["w"]
    >>> row["rank"], round(row["relative_error"], 6), round(row["mse"], 6)
    (1, 0.316228, 1.25)
    >>> round(found.totals["energy"], 6)
    0.9

  References:
    Eckart and Young (1936); effective rank: Roy and Vetterli (2007), of the
    energies.
  """
  loras = {p: x for p, x in programs.items() if isinstance(x, Lora)}
  check_loras(loras)
  left, right = _leaves(base), _leaves(finetuned)
  sides = [getattr(side, "spec", side) for side in (left, right)]
  pairs = {pair.path: pair for pair in pair_up(*sides).pairs if not pair.whole}
  _check_pairs(programs, pairs)
  _check_real(programs, sides, pairs)
  table = table_for(sides[0], getattr(left, "model_type", None), tree=base)
  table = table if views is None else tuple(views)
  found = _views_of(loras, pairs, table)
  rows, rest = {}, {}
  for path in (*programs, *(path for path in pairs if path not in programs)):
    pair, program = pairs[path], programs.get(path)
    stored = sides[1][names_of(pair.finetuned)[0]].dtype
    is_counted = 0 not in pair.shape and _are_inexact(sides, pair)
    if program is None and not is_counted:
      continue
    one, two = read_side(left, pair.base), read_side(right, pair.finetuned)
    if isinstance(program, Lora):
      rows[path] = _row_of_lora(path, one, two, program, found[path], stored)
    elif program is None:
      rest[path] = _row_of_shift(path, *_as_reals(one, two), None)
    else:
      rows[path] = _row_of_shift(path, one, two, program)
  return Comparison(rows, _totals(rows, rest))


def _are_inexact(sides, pair) -> bool:
  """Returns whether both sides of a pair are floating or complex."""
  names = pair.base.name, names_of(pair.finetuned)[0]
  return all(
    jnp.issubdtype(side[name].dtype, jnp.inexact)
    for side, name in zip(sides, names, strict=True)
  )


def _as_reals(base, finetuned) -> tuple[Any, Any]:
  """Returns two arrays, as real and imaginary parts if either is complex."""
  arrays = base, finetuned
  if not any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in arrays):
    return arrays
  one, two = (library_of(x).stack([x.real, x.imag]) for x in arrays)
  return one, two


def _row_of_lora(path, base, finetuned, lora, view, stored) -> dict[str, Any]:
  """Measures a Lora; returns its row."""
  _check_finite(path, lora)
  on_host = all(isinstance(x, np.ndarray) for x in (base, finetuned))
  own = jax.tree.map(np.asarray, lora) if on_host else lora
  measure = _measure if on_host else _measure_compiled
  measured, spectral = measure(base, finetuned, own, view, np.dtype(stored))
  figures = _figures(path, measured, view.shape(base.shape))
  return {
    **row_of(figures, lora.rank),
    "spectral_error": float(np.max(spectral)),
    "bytes": lora.nbytes,
  }


def _row_of_shift(path, base, finetuned, shift) -> dict[str, Any]:
  """Measures a Shift, or None as one of zeros; returns its row."""
  on_host = all(isinstance(x, np.ndarray) for x in (base, finetuned))
  weigh = _weigh if on_host else _weigh_compiled
  change = None if shift is None else shift.delta
  if on_host and change is not None:
    change = np.asarray(change)
  found = {name: float(x) for name, x in weigh(base, finetuned, change).items()}
  if not math.isfinite(found["norm"]) or not math.isfinite(found["error"]):
    raise _not_finite(path)
  norm, error, below = found["norm"], found["error"], found.pop("base_norm")
  share = error / norm if norm else 0.0
  return {
    "shape": list(base.shape),
    **found,
    "relative_error": share,
    "energy": 1 - share**2,
    "mse": error**2 / max(base.size, 1),
    "relative_change": norm / below if below else None,
    "bytes": 0 if change is None else change.nbytes,
  }


def _weigh(base, finetuned, change) -> dict[str, Any]:
  """Computes the sums of a change and of what a dense program misses of it."""
  delta = difference(base, finetuned)
  xp = library_of(delta)
  on_device = lambda x: jnp.sqrt(sum_of_squares(x))  # noqa: E731
  norm = norm_of if xp is np else on_device
  error = delta if change is None else delta - change.astype(np.float32)
  return {
    "norm": norm(delta),
    "error": norm(error),
    "mean_abs_delta": xp.mean(xp.abs(delta)),
    "unchanged": xp.mean(xp.asarray(delta == 0, np.float32)),
    "base_norm": norm(base.astype(np.float32)),
  }


_weigh_compiled = jax.jit(_weigh)


def _totals(rows, rest) -> dict[str, Any]:
  """Sums rows up; of `rest`, which has no programs, everything is missing."""
  every = [*rows.values(), *rest.values()]
  norm = math.hypot(*(row["norm"] for row in every))
  error = math.hypot(*(row["error"] for row in every))
  left = [row["norm"] for row in rest.values() if row["norm"]]
  share = error / norm if norm else 0.0
  return {
    "norm": norm,
    "error": error,
    "relative_error": share,
    "energy": 1 - share**2,
    "programs": len(rows),
    "bytes": sum(row["bytes"] for row in rows.values()),
    "left_out": len(left),
    "left_out_share": math.hypot(*left) / norm if norm else 0.0,
  }


def spectral_norm(delta: Any, lora: Lora, key: Any = None) -> Any:
  """Estimates the largest singular value of a Lora's error, from below.

      error = delta - scale aᵀ b,   q ← orth(error errorᵀ q), eight times

  Args:
    delta: (..., m, n), read as float32; NumPy or JAX, like the Lora.
    lora: a (..., r, m), b (..., r, n), scale (...).
    key: PRNG key of the start block; None is `key(0)`.

  Returns:
    (...) float32. Never above the true value up to rounding, and within 2% of
    it even for a flat spectrum. Costs 17 products of the delta with 8 columns;
    the error is not formed. A sharded delta is not gathered.

  Example:
    >>> nothing = Lora(np.zeros((1, 2)), np.zeros((1, 2)), np.float32(1))
    >>> spectral_norm(np.diag(np.float32([3, 4])), nothing).round(4)
    np.float32(4.0)
  """

  def one(delta, a, b, scale):
    """Estimates the norm for one matrix."""
    delta, a, b = (x.astype(np.float32) for x in (delta, a, b))
    a, xp = a * scale.astype(np.float32), library_of(delta)
    q = normal(key, (delta.shape[1], min(_PROBES, *delta.shape)), delta)
    for _ in range(_TURNS):
      image = delta @ q - a.T @ (b @ q)
      back = delta.T @ image - b.T @ (a @ image)
      q = xp.linalg.qr(back)[0]
    image = delta @ q - a.T @ (b @ q)
    return (xp.sqrt(xp.maximum(xp.linalg.eigvalsh(image.T @ image)[-1], 0.0)),)

  with jax.default_matmul_precision("highest"):
    arrays = delta, lora.a, lora.b, lora.scale
    return over_leading(one, delta.ndim - 2, *arrays)[0]


def _measure(base, finetuned, lora, view, stored):
  """Measures a Lora; returns Measured and the error's spectral norm."""

  def step(base, finetuned, *leaves):
    """Computes the figures of one parameter."""
    delta, found = survey(base, finetuned, stored)
    delta, is_exchanged = in_stored_order(delta, view)
    mine = exchange(Lora(*leaves)) if is_exchanged else Lora(*leaves)
    certified = certificate(delta, mine)
    nan = np.float32(np.nan)
    norm = library_of(delta).where(found.is_finite, certified.norm, nan)
    figures = {
      "sigma": _values_within(delta, mine.b),
      "certificate": certified._replace(norm=norm),
      "base_norm": found.base_norm,
      "noise_std": found.noise_std,
      "unchanged": found.unchanged,
      "ulps": ulp_histogram(base, finetuned, stored),
    }
    return figures, spectral_norm(delta, mine)

  arrays = base, finetuned, lora.a, lora.b, lora.scale
  if library_of(base) is np:
    figures, spectral = step(*arrays)
  else:
    figures, spectral = run_automatic(step, arrays, lambda *_: PartitionSpec())
  return Measured(lora, **figures), spectral


_measure_compiled = functools.partial(
  jax.jit, static_argnames=("view", "stored")
)(_measure)


def _values_within(delta, b):
  """Computes singular values (..., r) of a delta in b's row space."""

  def one(delta, b):
    """Computes the values for one matrix."""
    xp = library_of(delta)
    rows = xp.linalg.qr(b.astype(np.float32).T)[0].T @ delta.T
    values = xp.linalg.svd(rows @ rows.T, compute_uv=False, hermitian=True)
    values = xp.sqrt(xp.maximum(values, 0.0))
    return (xp.pad(values, (0, b.shape[0] - len(values))),)

  with jax.default_matmul_precision("highest"):
    return over_leading(one, delta.ndim - 2, delta, b)[0]


def _figures(path, measured, shape) -> dict[str, Any]:
  """Converts measurements to a row of figures; raises if not finite."""
  found = jax.tree.map(np.asarray, measured.certificate)
  if not np.isfinite(found.norm).all():
    raise _not_finite(path)
  figures = summarise(
    found,
    np.asarray(measured.sigma),
    shape,
    base_norm=float(measured.base_norm),
    noise_std=float(measured.noise_std),
    unchanged=float(measured.unchanged),
    ulps=np.asarray(measured.ulps),
  )
  return {"shape": list(shape), **figures}


def _not_finite(path: str) -> ValueError:
  """Returns the error for a change that is not finite."""
  return ValueError(
    f"{path}: NaN or infinity in the change; a checkpoint is damaged or "
    "training diverged."
  )


def _check_pairs(programs, pairs) -> None:
  """Raises unless every program is a Lora or Shift of a pair that it fits."""
  missing = [path for path in programs if path not in pairs]
  if missing or not programs:
    raise ValueError(
      f"{len(missing)} of {len(programs)} programs have no pair of parameters: "
      f"{name_some(missing) or 'give at least one'}; there are "
      f"{name_some(pairs)}."
    )
  wrong = [
    f"{path} {pairs[path].shape} for {type(program).__name__} "
    f"{np.shape(getattr(program, 'delta', ()))}"
    for path, program in programs.items()
    if not isinstance(program, Lora)
    and not (
      isinstance(program, Shift) and program.delta.shape == pairs[path].shape
    )
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} programs cannot be compared: {name_some(wrong)}. Needed "
      "is a Lora, or a Shift of the parameter's shape."
    )


def _check_real(programs, sides, pairs) -> None:
  """Raises if a program is of a complex parameter, which it cannot change."""
  wrong = []
  for path in programs:
    pair = pairs[path]
    names = pair.base.name, names_of(pair.finetuned)[0]
    dtypes = [s[name].dtype for s, name in zip(sides, names, strict=True)]
    if any(jnp.issubdtype(x, jnp.complexfloating) for x in dtypes):
      wrong.append(f"{path} {pair.shape} {dtypes[0]} and {dtypes[1]}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} programs are of complex parameters: {name_some(wrong)}. "
      "Programs are real; leave these out, and their change counts as missing."
    )


def _views_of(loras, pairs, table) -> dict[str, MatrixView]:
  """Returns how each Lora's parameter is read; raises if one does not fit."""
  shapes = {path: pairs[path].shape for path in loras}
  given = {
    path: (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    for path, lora in loras.items()
  }
  found = views_of(shapes, table, given)
  wrong = [
    f"{path} {shapes[path]} for a {lora.a.shape}, b {lora.b.shape}"
    for path, lora in loras.items()
    if path not in found or found[path].shape(shapes[path]) != given[path]
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras do not fit: {name_some(wrong)}. Needed is a matrix "
      "(..., in, out) for a (..., r, in), b (..., r, out)."
    )
  return found


def _check_finite(path: str, lora: Lora) -> None:
  """Raises unless a Lora is finite."""
  leaves = {"a": lora.a, "b": lora.b, "scale": lora.scale}
  bad = [
    name
    for name, leaf in leaves.items()
    if not np.isfinite(np.asarray(leaf, np.float32)).all()
  ]
  if bad:
    raise ValueError(
      f"{path}: NaN or infinity in {name_some(bad)} of the Lora; what made it "
      "diverged."
    )


def _leaves(tree: Any) -> Mapping[str, Any]:
  """Flattens a tree to {path: array}; an open checkpoint stays lazy."""
  return tree if hasattr(tree, "spec") else arrays_of(flatten(tree))
