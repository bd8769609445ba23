# SPDX-License-Identifier: Apache-2.0
"""Matrices with prescribed spectra, for every test that factors something."""

import numpy as np


def flat(count: int) -> np.ndarray:
  """The spectrum of pure noise: no gap anywhere, a soft upper edge."""
  rng = np.random.default_rng(count)
  return np.linalg.svd(rng.standard_normal((count, count)), compute_uv=False)


def spiked(count: int) -> np.ndarray:
  """Eight values over noise, from 4 times its edge down to just above it."""
  sigma = flat(count)
  spikes = np.linspace(4.0, 1.1, 8)[:count] * sigma[0]
  return np.concatenate([spikes, sigma])[:count]


def power_law(count: int) -> np.ndarray:
  """i^-1/2, the slow decay that weight changes of finetunes show."""
  return np.arange(1, count + 1) ** -0.5


def steep(count: int) -> np.ndarray:
  """Halved from one to the next: most values are lost in float32."""
  return 0.5 ** np.arange(count)


def dominated(count: int) -> np.ndarray:
  """One value 1e4 times the rest, which decays as a power law."""
  return np.concatenate([[1e4], power_law(count)])[:count]


def low_rank(count: int) -> np.ndarray:
  """Five equal or decaying values, the rest exactly zero."""
  sigma = np.zeros(count)
  sigma[:5] = [3.0, 2.0, 2.0, 1.0, 0.5][:count]
  return sigma


def zero(count: int) -> np.ndarray:
  """No change at all."""
  return np.zeros(count)


SPECTRA = {
  f.__name__: f
  for f in (flat, spiked, power_law, steep, dominated, low_rank, zero)
}


def matrix(sigma: np.ndarray, m: int, n: int, seed: int = 0) -> np.ndarray:
  """An m x n float32 matrix with these singular values in random bases.

  Exactly low rank in float64; rounding to float32 adds noise of its own.
  """
  rng = np.random.default_rng(seed)
  left = np.linalg.qr(rng.standard_normal((m, len(sigma))))[0]
  right = np.linalg.qr(rng.standard_normal((n, len(sigma))))[0]
  return ((left * sigma) @ right.T).astype(np.float32)


def best_errors(sigma: np.ndarray) -> np.ndarray:
  """(len(sigma) + 1,) smallest Frobenius error at every rank from 0."""
  tails = np.cumsum(sigma[::-1] ** 2)[::-1]
  return np.sqrt(np.append(tails, 0.0))
