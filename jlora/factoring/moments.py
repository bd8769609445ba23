# SPDX-License-Identifier: Apache-2.0
"""Second moments of what layers read, and errors weighted by them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.backends import library_of
from jlora.paths import flatten

with epy.lazy_imports():  # needed only for linen models
  import flax.linen as nn

Apply = Callable[[Any, jax.Array], Any]


class Moment(NamedTuple):
  """The second moment of the inputs of one matrix.

  Attributes:
    total: (in, in) float32, the sum of x xᵀ over all inputs x.
    count: how many inputs there were.
  """

  total: jax.Array
  count: int


def second_moments(
  apply: Apply, params: Any, batches: Iterable[Any]
) -> dict[str, Moment]:
  """Measures the second moment of what every `nn.Dense` of a linen model reads.

      total = Σ_x x xᵀ

  Inputs are captured at each call of a Flax linen `nn.Dense`. The model needs
  no change, and `apply` may wrap it in any way. In `jlora.models` this covers
  all kernels of every family. Embeddings have no moment: they are looked up,
  and as a tied head multiply from their other side. In a Mixtral every expert
  computes every token, so its moments are those of all tokens, not only of
  those that the router sends to it. A Dense within `nn.scan`, `nn.remat` or
  `nn.vmap` is traced apart and cannot be captured. Models that are not linen's
  have no moments.

  Args:
    apply: `(params, tokens) -> anything`, calls a linen model. Compiled once
      for each function and shape.
    params: the first argument of `apply`.
    batches: second arguments of `apply`; any iterable, read once.

  Returns:
    {path: Moment}, keyed by the kernel's path as in `flatten(params)`, such as
    `layers/0/attn/q/kernel`. Several calls of a layer add up, and every
    position counts. Memory holds one batch's forward pass and twice `in²`
    float32 for every layer.

  Raises:
    ValueError: no batches, no Dense was called, one was called where it cannot
      be captured, or kernels that are not in params.

  Example:
    >>> import flax.linen
    >>> model = flax.linen.Dense(3)
    >>> x = jnp.array([[1.0, 2.0]])
    >>> found = second_moments(model.apply, model.init(jax.random.key(0), x),
    ...                        [x, x])
    >>> found["params/kernel"].total.tolist(), found["params/kernel"].count
    ([[2.0, 4.0], [4.0, 8.0]], 2)
  """
  totals: dict[str, jax.Array] = {}
  counts: dict[str, int] = {}
  for batch in batches:
    try:
      found = _capture(apply, params, jax.device_put(batch))
    except jax.errors.UnexpectedTracerError as error:
      raise ValueError(
        "A Dense within nn.scan, nn.remat or nn.vmap cannot be captured; give "
        "an apply that calls the layers one by one."
      ) from error
    for path, (total, count) in found.items():
      totals[path] = totals[path] + total if path in totals else total
      counts[path] = counts.get(path, 0) + int(jax.device_get(count))
  if not totals:
    raise ValueError(
      "No input of an nn.Dense was seen: give at least one batch, and an apply "
      "that calls a Flax linen model."
    )
  names = _names_in(params, totals)
  return {names[path]: Moment(totals[path], counts[path]) for path in totals}


def dense_inputs(
  apply: Apply, params: Any, batch: Any, paths: Iterable[str]
) -> dict[str, jax.Array]:
  """Captures what some `nn.Dense` of a linen model read, path -> (..., in).

  Captured as by `second_moments`, but whole: for example the inputs of a
  router's layers, to see where prompts lie.

  Args:
    apply: `(params, tokens) -> anything`, calls a linen model.
    params: the first argument of `apply`.
    batch: the second argument of `apply`.
    paths: kernels, as in `flatten(params)`.

  Returns:
    {path: (..., in)}, from the last call of each.

  Raises:
    ValueError: a path that no Dense was called for.

  Example:
    >>> import flax.linen
    >>> model = flax.linen.Dense(3)
    >>> x = jnp.array([[1.0, 2.0]])
    >>> params = model.init(jax.random.key(0), x)
    >>> dense_inputs(model.apply, params, x, ["params/kernel"])
    {'params/kernel': Array([[1., 2.]], dtype=float32)}
  """
  found: dict[str, jax.Array] = {}

  def note(call, arguments, options, context):
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
      x = options["inputs"] if "inputs" in options else arguments[0]
      found["/".join((*module.path, "kernel"))] = x
    return call(*arguments, **options)

  with nn.intercept_methods(note):
    apply(params, batch)
  names = _names_in(params, found)
  inputs = {names[path]: x for path, x in found.items()}
  missing = [path for path in paths if path not in inputs]
  if missing:
    raise ValueError(
      f"No nn.Dense was called for {name_some(missing)}; there are "
      f"{name_some(sorted(inputs))}."
    )
  return {path: inputs[path] for path in paths}


def weighted_error(delta: Any, lora: Lora, moment: Any) -> float:
  """Computes the relative error of a Lora in what a layer writes.

      ‖(D - D_r)ᵀ X‖_F / ‖Dᵀ X‖_F,   ‖Eᵀ X‖² = ⟨C E, E⟩,   C = X Xᵀ

  The second moment stands for the layer's inputs X.

  Args:
    delta: (in, out), read as float32: finetune less base.
    lora: a (r, in), b (r, out), scale ().
    moment: Moment of the inputs, or C itself, (in, in), up to a factor.

  Returns:
    The relative error: 0 if the change is exact for these inputs, 1 for no
    change at all; also 0 if the delta does nothing to them. Costs two products
    of `2 in² out` operations, and the memory of the error matrix.

  Raises:
    ValueError: shapes that do not fit.

  Example:
    >>> delta = jnp.diag(jnp.array([3.0, 4.0]))
    >>> first = Lora(jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 0.0]]),
    ...              jnp.float32(1))
    >>> round(weighted_error(delta, first, jnp.eye(2)), 6)
    0.8
    >>> weighted_error(delta, first, jnp.diag(jnp.array([1.0, 0.0])))
    0.0
  """
  weight = moment.total if isinstance(moment, Moment) else moment
  needed = lora.a.shape[-1], lora.b.shape[-1]
  if (
    delta.shape != needed
    or lora.a.ndim != 2
    or weight.shape != (needed[0], needed[0])
  ):
    raise ValueError(
      f"delta {delta.shape}, a {lora.a.shape}, b {lora.b.shape} and moment "
      f"{weight.shape} do not fit: needed are (in, out), (r, in), (r, out) and "
      "(in, in)."
    )
  xp = library_of(delta)
  delta, a, b, weight = (
    xp.asarray(x).astype(np.float32) for x in (delta, lora.a, lora.b, weight)
  )
  scale = xp.asarray(lora.scale).astype(np.float32)
  with jax.default_matmul_precision("highest"):
    error = delta - scale * (a.T @ b)
    lost, whole = (
      float(xp.sum(xp.sum((weight @ e) * e, axis=0))) for e in (error, delta)
    )
  return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0


@functools.partial(jax.jit, static_argnums=0)
def _capture(apply, params, batch):
  """Sums x xᵀ over a batch: {module path: ((in, in) sum, count of inputs)}."""
  found: dict[str, tuple[jax.Array, jax.Array]] = {}

  def note(call, arguments, options, context):
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
      x = options["inputs"] if "inputs" in options else arguments[0]
      path = "/".join((*module.path, "kernel"))
      seen = _moment(x.reshape(-1, x.shape[-1]))
      # A layer may be called more than once.
      before = found.get(path, jax.tree.map(jnp.zeros_like, seen))
      found[path] = jax.tree.map(jnp.add, before, seen)
    return call(*arguments, **options)

  with nn.intercept_methods(note):
    apply(params, batch)
  return found


def _moment(rows):
  """Returns Σ x xᵀ over rows, and how many rows there are."""
  total = jnp.matmul(
    rows.T,
    rows,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return total, jnp.int32(rows.shape[0])


def _names_in(params: Any, paths: Iterable[str]) -> dict[str, str]:
  """Maps module paths to kernels' paths in params, `params/` first or not."""
  there, paths = set(flatten(params)), list(paths)
  names = {
    path: name
    for path in paths
    for name in (path, f"params/{path}")
    if name in there
  }
  missing = [path for path in paths if path not in names]
  if missing:
    raise ValueError(
      f"{len(missing)} kernels are not in params: {name_some(missing)}; there "
      f"are {name_some(sorted(there))}. Pass the tree that the model reads."
    )
  return names
