# SPDX-License-Identifier: Apache-2.0
"""Gradients of the product, whichever implementation computes it forward.

    v  = dy bᵀ                    dx = dy wᵀ + (v g) a
    da = (v g)ᵀ x                 db = (u g)ᵀ dy
    dg = u v                      dw = xᵀ dy

dx is the product itself with a and b exchanged and w transposed, and the u of
that call is v. A gradient nobody asked for is not computed: that of a frozen w
in particular, the only one as large as w.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from pallas_kernels.lora_dot.weights import Nf4, Scaled


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(forward: Callable, transpose_w: bool, x, w, a, b, gate):
  """Computes y by `forward`, and gives it the gradients above.

  Args:
    forward: (x, w, a, b, gate, transpose_w, return_u) -> y or (y, u), for x
      (..., K), gate None, (r,) or (..., r), u (..., r) float32.
      Hashable: a function or a partial kept by the caller.
    transpose_w: w is stored (N, K).
    x: (..., K).
    w: (K, N), or (N, K) with `transpose_w`, `Scaled` or `Nf4`.
    a: (r, K).
    b: (r, N).
    gate: as `forward` takes it.

  Returns:
    (..., N) in x's dtype. Gradients have the dtypes of what they belong to.
  """
  return forward(x, w, a, b, gate, transpose_w, False)


def _forward(forward, transpose_w, x, w, a, b, gate):
  """Computes y; keeps u, the operands and which gradients are wanted."""
  operands = (x, w, a, b, gate)
  is_primal = lambda t: isinstance(t, CustomVJPPrimal)  # noqa: E731
  x, w, a, b, gate = jax.tree.map(
    lambda t: t.value, operands, is_leaf=is_primal
  )
  wanted = [
    any(t.perturbed for t in jax.tree.leaves(o, is_leaf=is_primal))
    for o in operands
  ]
  if isinstance(w, Scaled | Nf4) and wanted[1]:
    raise ValueError(
      "a quantised w has no gradient here: take xla_dot or reference_dot, or "
      "jax.lax.stop_gradient(w)"
    )
  y, u = forward(x, w, a, b, gate, transpose_w, True)
  return y, (_Flags(tuple(wanted)), x, w, a, b, gate, u)


@functools.partial(jax.tree_util.register_static)
class _Flags(tuple):
  """Which of x, w, a, b and gate are differentiated; static."""


def _weighed(u, gate):
  """Multiplies u by g in float32; g is (r,) or (..., r)."""
  if gate is None:
    return u
  return u * jnp.broadcast_to(gate.astype(jnp.float32), u.shape)


def _sum_to(value, like):
  """Sums a gradient over the leading axes that `like` lacks."""
  lead = tuple(range(value.ndim - like.ndim))
  return jnp.sum(value, axis=lead).astype(like.dtype)


def _over_rows(left, right, dtype):
  """Computes leftᵀ right over all leading axes, summed in float32."""
  rows = tuple(range(left.ndim - 1))
  return lax.dot_general(
    left, right, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
  ).astype(dtype)


def _backward(forward, transpose_w, kept, dy):
  """Computes the gradients that are wanted; the others are None."""
  (wants_x, wants_w, wants_a, wants_b, wants_gate), x, w, a, b, gate, u = kept
  dx = dw = da = db = dgate = None
  dy = dy.astype(x.dtype)
  if wants_x:
    dx, v = forward(dy, w, b, a, gate, not transpose_w, True)
  elif wants_a or wants_gate:
    v = shrink(dy, b)
  if wants_a:
    da = _over_rows(_weighed(v, gate).astype(x.dtype), x, a.dtype)
  if wants_b:
    db = _over_rows(_weighed(u, gate).astype(x.dtype), dy, b.dtype)
  if wants_gate:
    dgate = _sum_to(u * v, gate)
  if wants_w:
    dw = _over_rows(*((dy, x) if transpose_w else (x, dy)), w.dtype)
  return dx, dw, da, db, dgate


def shrink(x, a):
  """Computes x aᵀ in float32, (..., r)."""
  axis = x.ndim - 1
  return lax.dot_general(
    x,
    a.astype(x.dtype),
    (((axis,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


differentiable.defvjp(_forward, _backward, symbolic_zeros=True)
