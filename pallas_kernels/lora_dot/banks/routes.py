# SPDX-License-Identifier: Apache-2.0
"""`lora_dot_many`, the door to many adapters, and what each route costs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from pallas_kernels.lora_dot.banks.bank import check_ids, check_many
from pallas_kernels.lora_dot.banks.gathered import gathered_dot
from pallas_kernels.lora_dot.banks.grouped import grouped_dot
from pallas_kernels.lora_dot.banks.laned import laned_dot
from pallas_kernels.lora_dot.partitioning import is_local
from pallas_kernels.lora_dot.tpu.call import chip_here
from pallas_kernels.lora_dot.weights import Weight

Route = Callable[..., jax.Array]

# Operations that a chip does in the time it moves a byte, in bfloat16: v5e's,
# by its data sheet. v5p does 166, v6e 560, an H100 295.
RIDGE = 240


class Work(NamedTuple):
  """What a route moves and computes beside the product x w.

  bytes_moved: between HBM and the chip.
  operations: multiplications and additions.
  """

  bytes_moved: int
  operations: int


class Many(NamedTuple):
  """The sizes of a product with a bank.

  rows, k, n: of x, and of its product with w.
  adapters, r: of the bank.
  several: adapters that a row takes.
  itemsize: bytes of a number of x, a, b and y.
  """

  rows: int
  k: int
  n: int
  adapters: int
  r: int
  several: int
  itemsize: int


def lora_dot_many(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  ids: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  route: Route | None = None,
) -> jax.Array:
  """Multiplies each row by a matrix that the row's own adapters change.

      y_i = x_i w + Σ_s ((x_i a_cᵀ) g_is) b_c,    c = ids_is

  Args:
    x: (..., K), floating. Products take their operands in x's dtype.
    w: (K, N), or (N, K) with `transpose_w`; an array, or `Scaled` codes.
    a: (n, r, K), a bank's; all finite.
    b: (n, r, N), likewise.
    ids: (...) integers, one adapter a row; or (..., s), their sum. Sizes may be
      1. -1 is no adapter: such a row is x_i w, bit by bit. An id outside -1 to
      n - 1 is an error where ids are known; inside jit its row of y is NaN, and
      so are the gradients that it enters.
    gate: broadcastable to the shape of all ids and (r,); None is one. A mixture
      of all adapters: ids arange(n) of shape (1, n), gate (rows, n, 1).
    transpose_w: w is stored (N, K).
    route: `laned_dot`, `grouped_dot`, `gathered_dot` or a partial of one; None
      is what `choose_route` says.

  Returns:
    (..., N) in x's dtype, differentiable in x, a, b, gate. Other ids and other
    adapters of the same shapes run the same program. On a mesh rows may lie on
    any device; the bank is wanted on all.

  Raises:
    ValueError: shapes that do not fit; ids out of range, named.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones
    >>> lora_dot_many(one((2, 2)), one((2, 1)), one((3, 1, 2)), one((3, 1, 1)),
    ...               jnp.array([2, -1]))
    Array([[4.], [2.]], dtype=float32)

  References:
    Punica (Chen et al. 2023): segments of one adapter; S-LoRA (Sheng et al.
    2023). vLLM's TPU kernels lane adapters along one axis.
  """
  check_many(x, w, a, b, ids, gate, transpose_w)
  if not isinstance(ids, Tracer):
    ids = check_ids(ids, a.shape[0])
  if route is None:
    route = choose_route(sizes_of(x, a, b, ids)).route
  return route(x, w, a, b, ids, gate, transpose_w=transpose_w)


class Choice(NamedTuple):
  """The route that was chosen, and the work of all routes by name."""

  route: Route
  work: dict[str, Work]


def choose_route(
  many: Many,
  *,
  ragged: bool | None = None,
  local: bool | None = None,
  ridge: float = RIDGE,
) -> Choice:
  """Chooses the route that adds the least work, by counts, not a clock.

      argmin max(bytes, operations / ridge)

  Args:
    many: the sizes.
    ragged: the device has a ragged product; by default, whether it is a TPU.
    local: the rows are those of one device, so they can be sorted; by default
      what can be seen here: one device, or inside shard_map.
    ridge: operations a byte of the chip.

  Returns:
    Choice: the route and the counts of every route, whether it was eligible or
    not.

  Approximation: what is not counted costs nothing: the sort of the ids, the
  start of a kernel. On one H100 (pallas_kernels/README.md) the route chosen was
  the fastest of 4096 rows, and within 9% of it for 64.

  Example:
    >>> decode = Many(64, 4096, 4096, 8, 16, 1, 2)
    >>> choose_route(decode, ragged=True, local=True).route.__name__
    'laned_dot'
  """
  ragged = chip_here() is not None if ragged is None else ragged
  local = is_local() if local is None else local
  work = count_work(many, ragged=ragged)
  routes = (laned_dot, gathered_dot, *((grouped_dot,) if local else ()))

  def cost(route):
    moved, operations = work[route.__name__]
    return max(moved, operations / ridge)

  return Choice(min(routes, key=cost), work)


def count_work(many: Many, *, ragged: bool) -> dict[str, Work]:
  """Counts bytes and operations that each route adds: {name: Work}.

  Of the forward pass. Each array counts where a program of XLA writes it out
  and reads it again: x for the change, the sum with x w, the sorted rows, the
  copies of gathered adapters, u of all lanes. Without a ragged product the rows
  are masked once for every adapter.

  Args:
    many: the sizes.
    ragged: the device has a ragged product.

  Example:
    >>> one = Many(1, 2, 3, 1, 1, 1, 1)
    >>> count_work(one, ragged=True)["laned_dot"]
    Work(bytes_moved=15, operations=10)
  """
  m, k, n, adapters, r, several, item = many
  taken = m * several
  wide = r * (k + n)
  shared = m * k + 2 * m * n
  masks = 1 if ragged else adapters
  masked = 0 if ragged else 2 * masks * taken * (k + r)
  moved = {
    "laned_dot": adapters * wide + 2 * m * adapters * r,
    "grouped_dot": taken * (2 * k + 3 * n + 4 * r)
    + min(adapters, taken) * wide
    + masked,
    "gathered_dot": taken * (3 * wide + 2 * r),
  }
  products = {
    "laned_dot": m * adapters,
    "grouped_dot": taken * masks,
    "gathered_dot": taken,
  }
  return {
    name: Work((shared + moved[name]) * item, 2 * products[name] * wide)
    for name in moved
  }


def sizes_of(x: Any, a: Any, b: Any, ids: Any) -> Many:
  """Reads the sizes of a call; the arrays may be ShapeDtypeStructs.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones
    >>> x, a, b = one((2, 8)), one((3, 1, 8)), one((3, 1, 4))
    >>> sizes_of(x, a, b, one((2,), int)).itemsize
    4
  """
  return Many(
    rows=math.prod(x.shape[:-1]),
    k=x.shape[-1],
    n=b.shape[2],
    adapters=a.shape[0],
    r=a.shape[1],
    several=ids.shape[-1] if ids.ndim == x.ndim else 1,
    itemsize=x.dtype.itemsize,
  )
