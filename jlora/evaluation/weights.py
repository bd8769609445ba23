# SPDX-License-Identifier: Apache-2.0
"""Measures how much of a finetune's weight change given Loras miss.

Works for any Loras, extracted or trained; the change itself is not factored.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jlora.factoring.certificates import certificate
from jlora.factoring.deltas import survey
from jlora.factoring.figures import Measured, row_of, summarise
from jlora.factoring.rounding import ulp_histogram
from jlora.loras import Lora, check_loras, exchange
from jlora.messages import name_some
from jlora.numerics.backends import library_of, normal, over_leading
from jlora.numerics.meshes import run_automatic
from jlora.pairing.match import pair_up
from jlora.pairing.pairs import names_of, read_side
from jlora.paths import flatten
from jlora.tree_views import table_for
from jlora.views import (
  MatrixView,
  ViewRule,
  in_stored_order,
  views_of,
)

_PROBES = 8
_TURNS = 8


def compare(
  base: Any,
  finetuned: Any,
  loras: Mapping[str, Lora],
  *,
  views: Iterable[ViewRule] | None = None,
) -> dict[str, dict[str, Any]]:
  """Measures given Loras against a finetune's change of the weights, by path.

      delta = finetuned - base,   change = scale aᵀ b,   error = delta - change

  Args:
    base: a pytree of arrays, or an open checkpoint.
    finetuned: the finetune, as for `extract`.
    loras: path -> Lora, extracted or trained; paths of the base.
    views: rules for reading a parameter as a matrix; by default those for the
      names found.

  Returns:
    {path: row}, in the order of loras. A row can be written as JSON and has the
    fields of a row of `report.json` (`row_of`): among others rank (nominal),
    mse, cosine_distance, mean_abs_delta, relative_error, energy, effective_rank
    (the entropy rank), stable_rank, rank_90, rank_95, rank_99,
    noise_floor_rank, relative_change, learnt_norm and rounding_share (None
    where what was learnt cannot be told from rounding, see
    `jlora.factoring.rounding`) and unchanged. In addition: `spectral_error`,
    the largest singular value of the error (of the worst member of a batch),
    estimated from below by power iteration; and `bytes` of the factors.

    `singular_values`, and the ranks and the bound computed from them, are those
    of the delta within the row space of b. Figures by rank take the units in
    their stored order. A trained Lora's units are not sorted by strength, so
    sort them first (`recompress`) if ranks below the nominal one matter. One
    module is in memory at a time. It costs four to five products of
    `2 in out rank` operations and 32 reads of the delta. NumPy arrays are
    processed on the host, JAX arrays on their devices.

  Raises:
    ValueError: a Lora without a pair of parameters, or that does not fit it.

  Example:
    >>> base = {"w": np.zeros((2, 2), np.float32)}
    >>> finetuned = {"w": np.array([[3, 0], [4, 5]], np.float32)}
    >>> a, b = np.float32([[1.5, 4.5]]), np.ones((1, 2), np.float32)
    >>> row = compare(base, finetuned, {"w": Lora(a, b, np.float32(1))})["w"]
    >>> row["rank"], round(row["relative_error"], 6), round(row["mse"], 6)
    (1, 0.316228, 1.25)

  References:
    Eckart and Young (1936); effective rank: Roy and Vetterli (2007), of the
    energies.
  """
  check_loras(loras)
  left, right = _leaves(base), _leaves(finetuned)
  sides = [getattr(side, "spec", side) for side in (left, right)]
  pairs = {pair.path: pair for pair in pair_up(*sides).pairs if not pair.whole}
  table = table_for(sides[0], getattr(left, "model_type", None))
  table = table if views is None else tuple(views)
  found = _views_of(loras, pairs, table)
  rows = {}
  for path, lora in loras.items():
    pair = pairs[path]
    _check_finite(path, lora)
    view = found[path]
    stored = np.dtype(sides[1][names_of(pair.finetuned)[0]].dtype)
    one, two = read_side(left, pair.base), read_side(right, pair.finetuned)
    on_host = all(isinstance(x, np.ndarray) for x in (one, two))
    own = jax.tree.map(np.asarray, lora) if on_host else lora
    measure = _measure if on_host else _measure_compiled
    measured, spectral = measure(one, two, own, view, stored)
    figures = _figures(path, measured, view.shape(pair.shape))
    rows[path] = {
      **row_of(figures, lora.rank),
      "spectral_error": float(np.max(spectral)),
      "bytes": lora.nbytes,
    }
  return rows


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
    raise ValueError(
      f"{path}: NaN or infinity in the change; a checkpoint is damaged or "
      "training diverged."
    )
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


def _views_of(loras, pairs, table) -> dict[str, MatrixView]:
  """Returns how each Lora's parameter is read; raises if one does not fit."""
  missing = [path for path in loras if path not in pairs]
  if missing or not loras:
    raise ValueError(
      f"{len(missing)} of {len(loras)} Loras have no pair of parameters: "
      f"{name_some(missing) or 'give at least one'}; there are "
      f"{name_some(pairs)}."
    )
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
  """Flattens a tree to {path: leaf}; an open checkpoint stays lazy."""
  return tree if hasattr(tree, "spec") else flatten(tree)
