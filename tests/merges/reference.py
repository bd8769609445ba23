# SPDX-License-Identifier: Apache-2.0
"""Merges in float64 by their definitions, in NumPy alone.

Each takes the models (n, ...), their weights, the base and the method's
settings. Nothing of the library is used.
"""

import numpy as np


def linear(models, weights, base, normalize=True):
  total = weights.sum() if normalize else 1.0
  return np.tensordot(weights, models, 1) / total


def passthrough(models, weights, base):
  return weights[0] * models[0]


def _arc(left, right, t, cosine, colinear):
  if abs(cosine) > colinear:
    return (1 - t) * left + t * right
  angle = np.arccos(cosine)
  parts = np.sin((1 - t) * angle) * left + np.sin(t * angle) * right
  return parts / np.sin(angle)


def _cosine(left, right):
  size = np.linalg.norm(left) * np.linalg.norm(right)
  return float(np.clip(left.ravel() @ right.ravel() / size, -1, 1))


def slerp(models, weights, base, t):
  return _arc(*models, t, _cosine(*models), 0.9995)


def nuslerp(models, weights, base, axis=None):
  under = 0 if base is None else base
  left, right = models - under
  t = weights[1] / weights.sum()
  if axis is None or left.ndim == 1:
    return under + _arc(left, right, t, _cosine(left, right), 1 - 1e-6)
  found = [
    _arc(x, y, t, _cosine(x, y), 1 - 1e-6)
    for x, y in zip(
      np.moveaxis(left, axis, -1), np.moveaxis(right, axis, -1), strict=True
    )
  ]
  return under + np.moveaxis(np.stack(found), -1, axis)


def _polar(models, under, weights):
  changes = models - under
  norms = np.array([np.linalg.norm(x) for x in changes])
  shape = (-1, *(1,) * (changes.ndim - 1))
  return changes / norms.reshape(shape), weights / weights.sum(), norms


def multislerp(models, weights, base):
  under = 0 if base is None else base
  units, shares, norms = _polar(models, under, weights)
  mean = np.tensordot(shares, units, 1)
  return under + shares @ norms * mean / np.linalg.norm(mean)


def karcher(models, weights, base):
  units, shares, norms = _polar(models, 0, weights)
  mean = np.tensordot(shares, units, 1)
  mean /= np.linalg.norm(mean)
  for _ in range(100):  # until nothing moves
    logs = []
    for unit in units:
      cosine = np.clip((unit * mean).sum(), -1, 1)
      angle = np.arccos(cosine)
      logs.append((unit - cosine * mean) * (angle / np.sin(angle)))
    tangent = np.tensordot(shares, np.stack(logs), 1)
    size = np.linalg.norm(tangent)
    if size < 1e-14:
      break
    mean = np.cos(size) * mean + np.sin(size) * tangent / size
  return shares @ norms * mean


def model_stock(models, weights, base):
  left, right = models - base
  cosine = np.clip(_cosine(left, right), 0, 1)
  share = 2 * cosine / (1 + cosine)
  return base + share * (models - base).mean(0)


def nearswap(models, weights, base, t):
  change = models[0] - base
  share = np.clip(t / np.maximum(np.abs(change), 1e-6), 0, 1)
  return base + share * change


def arcee_fusion(models, weights, base):
  def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

  p, q = softmax(models[0]), softmax(base)
  apart = (p * np.log(p / q)).sum(-1, keepdims=True)
  score = np.abs(models[0] - base) * apart
  ordered = np.sort(score, axis=None)
  low, middle, high = (ordered[(score.size - 1) * k // 4] for k in (1, 2, 3))
  return np.where(score > middle + 1.5 * (high - low), models[0], base)


def ram(models, weights, base, strength=0.0, bound=0.2):
  changes = models - base
  acts = np.abs(changes) > 1e-5
  counts = acts.sum(0)
  shared, alone = acts & (counts > 1), acts & (counts == 1)
  axes = tuple(range(1, acts.ndim))
  ratio = shared.sum(axes) / np.maximum(alone.sum(axes), 1)
  lift = 1 + strength * np.clip(ratio, 0, bound)
  lift = lift.reshape(-1, *(1,) * (acts.ndim - 1))
  mean = (shared * changes).sum(0) / np.maximum(counts, 1)
  return base + (lift * alone * changes).sum(0) + mean


def _count(density, size):
  return max(int(density * size + 1e-3), 1)


def _trimmed(change, density):
  ordered = np.sort(np.abs(change), axis=None)[::-1]
  return np.where(
    np.abs(change) >= ordered[_count(density, change.size) - 1], change, 0
  )


def _middle(change, density, gamma):
  ordered = np.sort(np.abs(change), axis=None)[::-1]
  count = _count(density, change.size)
  first = min(int(gamma * change.size + 1e-3), change.size - count)
  size = np.abs(change)
  kept = (size <= ordered[first]) & (size >= ordered[first + count - 1])
  return np.where(kept, change, 0)


def _combined(changes, weights, elects, normalize):
  weighted = weights.reshape(-1, *(1,) * (changes.ndim - 1)) * changes
  sizes = np.broadcast_to(
    weights.reshape(-1, *(1,) * (changes.ndim - 1)), changes.shape
  )
  if elects:
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agrees = np.sign(weighted) == sign
    weighted, sizes = weighted * agrees, np.abs(sizes) * agrees
  total = weighted.sum(0)
  count = sizes.sum(0)
  return total / np.where(count == 0, 1, count) if normalize else total


def added(
  models, weights, base, keep=None, elects=False, normalize=False, scale=1.0
):
  """Task arithmetic and all that thins changes out before adding them."""
  changes = models - base
  if keep is not None:
    changes = np.stack([keep(x) for x in changes])
  return base + scale * _combined(changes, weights, elects, normalize)


def ties(models, weights, base, density=1.0, normalize=True, scale=1.0):
  keep = lambda x: _trimmed(x, density)  # noqa: E731
  return added(models, weights, base, keep, True, normalize, scale)


def breadcrumbs(models, weights, base, density, gamma, elects=False):
  keep = lambda x: _middle(x, density, gamma)  # noqa: E731
  return added(models, weights, base, keep, elects)


def sce(models, weights, base, density):
  changes = models - base
  spread = changes.var(0)
  ordered = np.sort(spread, axis=None)[::-1]
  taken = changes * (spread >= ordered[_count(density, spread.size) - 1])
  strength = (taken**2).mean(tuple(range(1, taken.ndim)))
  agrees = np.sign(taken) == np.where(taken.sum(0) >= 0, 1, -1)
  shape = (-1, *(1,) * (taken.ndim - 1))
  sizes = agrees * strength.reshape(shape)
  count = sizes.sum(0)
  return base + (sizes * taken).sum(0) / np.where(count == 0, 1, count)
