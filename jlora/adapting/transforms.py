# SPDX-License-Identifier: Apache-2.0
"""Runs models with programs, summed into the weights or beside them.

y = x w + Σ_i weight_i f_i(x)
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from jlora.adapting.adapted import Adapted, dense_sum, is_adapted
from jlora.adapting.binding import Programs, attach
from jlora.adapting.interpreter import evaluate
from jlora.adapting.notes import Notes, Said
from jlora.adapting.programs import Shift
from jlora.adapting.roles import Roles
from jlora.loras import Lora, dense
from jlora.messages import name_some
from jlora.paths import unflatten
from jlora.views import ViewRule, as_parameter

with epy.lazy_imports():  # a quarter of a second
  from pallas_kernels import lora_dot as kernels


def apply(
  params: Any,
  loras: Programs | Sequence[Programs],
  weights: Sequence[Any] | None = None,
  *,
  views: Iterable[ViewRule] | None = None,
) -> Any:
  """Adds the changes of adapters to parameters.

      w  ←  round(float32(w) + Σ_i weight_i scale_i a_iᵀ b_i)

  Args:
    params: a pytree of arrays.
    loras: path -> Lora or Shift, paths as `flatten` returns them; or several
      such mappings.
    weights: one number per adapter; None is 1 for each. A negative one
      subtracts an adapter, as task arithmetic does to forget a task.
    views: rules for reading a parameter as a matrix; by default those for the
      names found.

  Returns:
    The pytree, summed in float32 and rounded once to each leaf's own dtype;
    leaves without a program are the same arrays. Pure, works under jit; forms
    each change densely. Keep the base: the sum cannot be undone exactly.

  Raises:
    ValueError: a path without a parameter or whose parameter is not a floating
      matrix, or a shape that does not fit; names up to three with both shapes.
      A parameter that can be read in several ways with that shape. Not one
      weight per adapter. A program without a dense form (Rows, Branch, Gated).

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> params = {"w": jnp.zeros((3, 2), jnp.bfloat16)}
    >>> apply(params, {"w": lora})["w"].sum()
    Array(3, dtype=bfloat16)
    >>> apply(params, [{"w": lora}, {"w": lora}], [1.0, -1.0])["w"].sum()
    Array(0, dtype=bfloat16)
  """
  flat, found, views_of = attach(params, loras, weights, views)

  def summed(path, own):
    """Returns one parameter with its programs added."""
    leaf = flat[path]
    total = leaf.astype(jnp.float32)
    for program, weight in own:
      if isinstance(program, Lora):
        change = as_parameter(dense(program), views_of[path], leaf.shape)
      elif isinstance(program, Shift):
        change = program.delta.astype(jnp.float32)
      else:
        raise ValueError(
          f"{path}: a {type(program).__name__} has no dense form; use bind and "
          "adapt."
        )
      total = total + jnp.asarray(weight, jnp.float32) * change
    return total.astype(leaf.dtype)

  sums = {path: summed(path, own) for path, own in found.items()}
  return unflatten({**flat, **sums}, params)


def adapt(
  fn: Callable[..., Any], *, strict: bool = False, has_notes: bool = False
) -> Callable[..., Any]:
  """Wraps a function so that it computes with parameters from `bind`.

      y = x w + ((x aᵀ) g) b        wherever an adapted w is multiplied

  The sum of w and its changes is not formed. The function is traced as by `jit`
  and run equation by equation where an adapted w is in it. Products in any
  order of operands, with batches, in groups of rows (`ragged_dot`) and of
  features, convolutions, look-ups, moves, slices, paddings, casts, scales of
  rows or columns and sums of adapted weights have rules. scan, while, cond,
  remat, nested jit and shard_map (with `all_gather`) are rebuilt, with the
  rules applied inside; so are functions with custom_vjp, forward and backward.

  A parameter that joins an activation entry by entry, as a table of positions
  does, or of which single rows are taken, has no product to go beside: there
  its own sum is formed, and what comes of it is an array. What is an activation
  is read from the program: it depends on an argument that has no Adapted in it,
  and is not the weight in all its uses.

  Any other operation on an adapted weight is given the dense sum: the result is
  correct, and a warning names each such operation once. So is a kernel that
  takes the weight itself (`pallas_call`), and a function with custom_jvp.

  Args:
    fn: a pure function of pytrees. It must not look at the values of arrays;
      other arguments (numbers, strings) are passed on as they are.
    strict: raise an error where a rule is missing.
    has_notes: return (result, notes): what the functions of `Gated`s returned
      beside their gates, {path: one for each product, in the program's order}.
      Notes made in a scan are stacked. Without it they are left out.

  Returns:
    A function of the same arguments, any array of which may be Adapted; its
    results never are. Differentiable in all parts; works under jit, vmap,
    shard_map. Traces fn at every call: jit what you call often. Adapters of the
    same shapes share a compiled program.

  Raises:
    ValueError: from the returned function, with `strict`, where a rule is
      missing; where a `Gated`'s gate would not see all of the layer's input, or
      its notes could not leave a cond, while, shard_map or custom_vjp.

  Warns:
    UserWarning: from the returned function, without `strict`, where a rule is
      missing.

  Example:
    >>> from jlora.adapting.binding import bind
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> params = bind({"w": jnp.zeros((3, 2))}, {"w": lora})
    >>> adapt(lambda params, x: x @ params["w"])(params, jnp.ones((1, 3)))
    Array([[1.5, 1.5]], dtype=float32)

  References:
    The idea of array-like values under any function: quax (Kidger 2023).
  """

  @functools.wraps(fn)
  def run(*args, **kwargs):
    """Runs fn on the arguments by the rules."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_adapted)
    at = [i for i, leaf in enumerate(leaves) if is_dynamic(leaf)]
    given = [leaves[i] for i in at]

    def on_arrays(*arrays):
      """Calls fn with its arrays replaced."""
      whole = list(leaves)
      for i, array in zip(at, arrays, strict=True):
        whole[i] = array
      own_args, own_kwargs = jax.tree.unflatten(tree, whole)
      return fn(*own_args, **own_kwargs)

    arrays = [leaf.w if is_adapted(leaf) else leaf for leaf in given]
    closed, shape = jax.make_jaxpr(on_arrays, return_shape=True)(*arrays)
    inputs = _of_inputs(args, kwargs, at)
    weights = [False] * len(closed.jaxpr.outvars)
    roles = Roles(closed.jaxpr, inputs, weights, consts=True)
    missing: dict[str, str] = {}

    def said(name: str, value: Adapted) -> None:
      """Notes an operation without a rule; raises if strict."""
      missing.setdefault(name, value.path)
      if strict:
        raise ValueError(_no_rule(missing))

    notes: Notes = {}
    told = Said(said, notes if has_notes else None)
    found = evaluate(closed.jaxpr, closed.consts, given, told, roles)
    found = [dense_sum(x) if is_adapted(x) else x for x in found]
    if missing:
      warnings.warn(_no_rule(missing), stacklevel=2)
    result = jax.tree.unflatten(jax.tree.structure(shape), found)
    return (result, notes) if has_notes else result

  return run


def _of_inputs(args: Any, kwargs: Any, at: Sequence[int]) -> list[bool]:
  """Returns which leaves belong to an argument without an Adapted."""
  found: list[bool] = []
  for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
    leaves = jax.tree.leaves(value, is_leaf=is_adapted)
    found += [not any(map(is_adapted, leaves))] * len(leaves)
  return [found[i] for i in at]


def is_dynamic(leaf: Any) -> bool:
  """Returns whether a leaf is traced: an array or an Adapted.

  Example:
    >>> is_dynamic(jnp.ones(2)), is_dynamic(2.0)
    (True, False)
  """
  return isinstance(leaf, Adapted | jax.Array | np.ndarray)


def _no_rule(missing: Mapping[str, str]) -> str:
  """Formats the message that names the operations without a rule."""
  cases = [f"{name} (of {path})" for name, path in missing.items()]
  return (
    "adapt knows no rule for an adapted weight in "
    f"{name_some(cases)}: the dense sum is formed there."
  )


def lora_dot(
  x: jax.Array,
  w: Any,
  lora: Lora,
  gate: jax.Array | None = None,
  *,
  implementation: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Multiplies rows by a matrix with a Lora on it, by a fused kernel or XLA.

      y = x w + ((x aᵀ) g) b,   g = gate · scale

  Args:
    x: (..., in).
    w: (in, out), or quantised as for `pallas_kernels.lora_dot`.
    lora: a (r, in), b (r, out), scale ().
    gate: broadcastable to (..., r); None is 1.
    implementation: as for `pallas_kernels.lora_dot.lora_dot`.

  Returns:
    (..., out) in x's dtype.

  Raises:
    ValueError: shapes that do not fit.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> lora_dot(jnp.ones((1, 3)), jnp.zeros((3, 2)), lora)
    Array([[1.5, 1.5]], dtype=float32)
  """
  scale = jnp.broadcast_to(lora.scale, (lora.rank,)).astype(jnp.float32)
  if gate is None:
    gate = scale
  else:
    gate = jnp.atleast_1d(gate).astype(jnp.float32)
    gate = gate * scale.reshape((1,) * (gate.ndim - 1) + scale.shape)
  return kernels.lora_dot(
    x, w, lora.a, lora.b, gate, implementation=implementation
  )
