# SPDX-License-Identifier: Apache-2.0
"""Products with a bank to test with, and what they are in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_dot import tpu_dot, xla_dot
from pallas_kernels.lora_dot.banks.gathered import gathered_dot
from pallas_kernels.lora_dot.banks.grouped import grouped_dot
from pallas_kernels.lora_dot.banks.laned import laned_dot
from tests.pallas_kernels.lora_dot.products import STREAMED, exact

KERNEL = functools.partial(tpu_dot, interpret=True, tiling=STREAMED)
ROUTES = {
  "laned": functools.partial(laned_dot, implementation=xla_dot),
  "laned-tpu": functools.partial(laned_dot, implementation=KERNEL),
  "grouped": grouped_dot,
  "gathered": gathered_dot,
}
QUANTITIES = ("value", "dx", "dw", "da", "db", "dgate")


class Case(NamedTuple):
  """Shapes; several is the adapters a row, 0 for ids without that axis."""

  lead: tuple
  k: int
  n: int
  adapters: int
  r: int
  several: int = 0
  gate: tuple | None = None
  transpose_w: bool = False


def operands(case, dtype, seed=0):
  """(x, w, a, b, gate), ids of which some are -1, and dy."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32), dtype)

  w = draw(case.k, case.n)
  gate = None if case.gate is None else draw(*case.gate)
  shape = (*case.lead, case.several) if case.several else case.lead
  ids = rng.integers(-1, case.adapters, shape).astype(np.int32)
  arrays = (
    draw(*case.lead, case.k),
    w.T if case.transpose_w else w,
    draw(case.adapters, case.r, case.k),
    draw(case.adapters, case.r, case.n),
    gate,
  )
  return arrays, jnp.asarray(ids), draw(*case.lead, case.n)


def truth(arrays, ids, dy, transpose_w):
  """Value and gradients in float64, row by row."""
  x, w, a, b, gate = map(exact, arrays)
  w = w.T if transpose_w else w
  lead, r = x.shape[:-1], a.shape[1]
  rows, dys = x.reshape(-1, x.shape[-1]), exact(dy).reshape(-1, w.shape[1])
  ids = np.asarray(ids).reshape(len(rows), -1)
  several = np.zeros(0 if ids.shape[1] == 1 else ids.shape[1])
  full = (*lead, *((len(several),) if len(several) else ()), r)
  g = np.ones(()) if gate is None else gate
  g = np.broadcast_to(g, full).reshape(*ids.shape, r)
  y, dx = rows @ w, dys @ w.T
  da, db, dg = np.zeros_like(a), np.zeros_like(b), np.zeros(g.shape)
  for i, s in np.argwhere(ids >= 0):
    c, gate_s = ids[i, s], g[i, s]
    u, v = a[c] @ rows[i], b[c] @ dys[i]
    y[i] += (u * gate_s) @ b[c]
    dx[i] += (v * gate_s) @ a[c]
    da[c] += np.outer(v * gate_s, rows[i])
    db[c] += np.outer(u * gate_s, dys[i])
    dg[i, s] += u * v
  dw = rows.T @ dys
  found = {"value": y.reshape(*lead, -1), "dx": dx.reshape(x.shape)}
  found |= {"dw": dw.T if transpose_w else dw, "da": da, "db": db}
  if gate is not None:
    found["dgate"] = sum_to(dg.reshape(full), gate.shape)
  return found


def sum_to(value, shape):
  """The sum over what was broadcast."""
  padded = (1,) * (value.ndim - len(shape)) + shape
  axes = tuple(i for i, size in enumerate(padded) if size == 1)
  return value.sum(axes, keepdims=True).reshape(shape)


def measure(route, arrays, ids, dy, transpose_w=False):
  """Value and gradients by a route, by name."""

  def run(x, w, a, b, gate):
    return route(x, w, a, b, ids, gate, transpose_w=transpose_w)

  y, pullback = jax.vjp(run, *arrays)
  found = zip(QUANTITIES, (y, *pullback(dy)), strict=True)
  return {name: t for name, t in found if t is not None}
