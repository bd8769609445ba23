# SPDX-License-Identifier: Apache-2.0
"""Products to test with, what they are in float64, and how far off one is."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_dot import (
  Nf4,
  Scaled,
  reference_dot,
  tpu_dot,
  xla_dot,
)
from pallas_kernels.lora_dot.tpu.tilings import MIB, Tiling
from pallas_kernels.lora_dot.weights import dense_weight

STREAMED = Tiling(128, 128, 128, 16 * MIB)
RESIDENT = Tiling(128, 128, 512, 16 * MIB, resident=True)

IMPLEMENTATIONS = {
  "xla": xla_dot,
  "reference": reference_dot,
  "tpu": functools.partial(tpu_dot, interpret=True),
  "tpu-blocks": functools.partial(tpu_dot, interpret=True, tiling=STREAMED),
}
QUANTITIES = ("value", "dx", "dw", "da", "db", "dgate")


class Case(NamedTuple):
  """Shapes of a product; gate is the shape of the gate or None."""

  lead: tuple
  k: int
  n: int
  r: int
  gate: tuple | None = None
  transpose_w: bool = False


def operands(case, dtype, seed=0):
  """x, w, a, b, gate and dy, as random numbers of a dtype."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32), dtype)

  w = draw(case.k, case.n)
  gate = None if case.gate is None else draw(*case.gate)
  return (
    draw(*case.lead, case.k),
    w.T if case.transpose_w else w,
    draw(case.r, case.k),
    draw(case.r, case.n),
    gate,
  ), draw(*case.lead, case.n)


def exact(t):
  """The array, its codes scaled, in float64."""
  if isinstance(t, Scaled):
    return exact(t.codes) * exact(t.scale)
  if isinstance(t, Nf4):
    return exact(dense_weight(t, jnp.float32))
  return None if t is None else np.asarray(t.astype(jnp.float32), np.float64)


def truth(arrays, dy, transpose_w):
  """Value and gradients in float64, by name."""
  x, w, a, b, gate = map(exact, arrays)
  w = w.T if transpose_w else w
  u = x @ a.T
  g = np.ones(1) if gate is None else gate
  found = {"value": x @ w + (u * g) @ b}
  if dy is None:
    return found
  dy = exact(dy)
  v = dy @ b.T
  rows = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
  dw = rows(x).T @ rows(dy)
  found |= {
    "dx": dy @ w.T + (v * g) @ a,
    "dw": dw.T if transpose_w else dw,
    "da": rows(v * g).T @ rows(x),
    "db": rows(u * g).T @ rows(dy),
  }
  if gate is not None:
    found["dgate"] = _sum_to(u * v, gate.shape)
  return found


def _sum_to(value, shape):
  padded = (1,) * (value.ndim - len(shape)) + shape
  axes = tuple(i for i, size in enumerate(padded) if size == 1)
  return value.sum(axes, keepdims=True).reshape(shape)


def measure(implementation, arrays, dy, transpose_w):
  """Value and gradients by an implementation, by name."""

  @jax.jit
  def run(arrays, dy):
    f = functools.partial(implementation, transpose_w=transpose_w)
    y, pullback = jax.vjp(f, *arrays)
    return y, *pullback(dy)

  found = zip(QUANTITIES, run(arrays, dy), strict=True)
  return {name: t for name, t in found if t is not None}


def error(found, wanted):
  """The relative error in the Frobenius norm."""
  found = exact(found)
  return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-300)


def bound(of_xla, dtype):
  """Three times what XLA errs by, and at least two roundings of the result.

  Both products are rounded, and so is their sum; long sums have other orders.
  """
  return max(3 * of_xla, float(jnp.finfo(dtype).eps))
