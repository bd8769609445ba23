# SPDX-License-Identifier: Apache-2.0
"""Merges whole models or adapters, parameter by parameter, by any method."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factoring.deltas import difference
from jlora.loras import Lora
from jlora.merging.arrays.averages import linear
from jlora.merging.arrays.inputs import is_known
from jlora.messages import name_some
from jlora.numerics.kth_largest import count_of, kth_of_all
from jlora.paths import check_same_paths, flatten, key_for, unflatten
from jlora.selection import is_floating

PathSettings = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]


def merge(
  models: Sequence[Any],
  *,
  method: Callable[..., Any] = linear,
  base: Any = None,
  weights: Any = None,
  key: jax.Array | None = None,
  settings: PathSettings | None = None,
) -> Any:
  """Merges models or adapters of one structure, parameter by parameter.

      merged[path] = method([model[path], ...], weights, base[path], **settings)

  Args:
    models: n pytrees of arrays, `{path: array}` mappings or Loras.
    method: any method of `jlora.merging`; for Loras `concat`, `svd_merge`,
      `core_space` or `knots`. `functools.partial` sets its options.
    base: the model that the models were finetuned from, of the same structure.
      None for adapters, which are changes already.
    weights: (n,); None is ones.
    key: PRNG key; None is `key(0)`. Each parameter uses `key_for(key, path)`,
      so its result does not depend on the other parameters or their order.
    settings: options of the method, for all parameters or as a function of the
      path; a `weights` among them replaces the argument.

  Returns:
    A pytree like the first model; `{path: array}` if that is a mapping but not
    a pytree. Leaves are computed in float32 and rounded once to the first
    model's dtype, with n + 1 float32 copies of one parameter at a time. Each
    shape, method and set of settings compiles a program, so reuse a partial in
    later calls. Non-floating leaves are the first model's. A leaf that occurs
    in several places (tied weights) is merged once, with the settings of the
    first. Pure: jit it as a whole, and close over tied weights.

  Raises:
    ValueError: no models, names or shapes that differ, non-floating leaves that
      differ (or are traced, so that they cannot be compared), a base for
      adapters, or the method's own error, with the path.

  Example:
    >>> models = [{"w": jnp.zeros(2), "step": 3}, {"w": jnp.ones(2), "step": 3}]
    >>> merge(models, weights=[1.0, 3.0])
    {'step': 3, 'w': Array([0.75, 0.75], dtype=float32)}
  """
  flat = [flatten(model, _is_lora) for model in models]
  if not flat:
    raise ValueError("There are no models to merge; give at least one.")
  weights = [1.0] * len(flat) if weights is None else weights
  below = None if base is None else flatten(base, _is_lora)
  _check(flat, below)

  done: dict[tuple[int, ...], Any] = {}
  merged = {}
  for path in flat[0]:
    leaves = [own[path] for own in flat]
    under = None if below is None else below[path]
    identity = tuple(id(leaf) for leaf in (*leaves, under))
    if identity not in done:
      options = dict(settings(path) if callable(settings) else settings or {})
      done[identity] = _merged(
        path, leaves, under, method, {"weights": weights, **options}, key
      )
    merged[path] = done[identity]
  is_node = not jax.tree_util.treedef_is_leaf(jax.tree.structure(models[0]))
  return unflatten(merged, models[0], _is_lora) if is_node else merged


def magnitude_thresholds(
  models: Sequence[Any], base: Any, density: Any
) -> jax.Array:
  """Computes for each model the magnitude that a share of its changes reaches.

  The TIES paper trims a model as a whole, so that a matrix that changed little
  loses more entries than one that changed much:

      merge(models, method=ties, base=base, settings={
        "threshold": magnitude_thresholds(models, base, 0.2)})

  Args:
    models: n pytrees of arrays or mappings; not adapters.
    base: of the same structure.
    density: share to keep, one for all models or (n,).

  Returns:
    (n,) float32, one threshold per model. Reads all parameters 31 times, one at
    a time, and stores nothing of their size. Tied weights count once.

  Raises:
    ValueError: names or shapes that differ, Loras, or no floating parameter.

  Example:
    >>> base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    >>> model = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([-3.0, 2.0])}
    >>> magnitude_thresholds([model], base, 0.5)
    Array([3.], dtype=float32)
  """
  flat, below = [flatten(model, _is_lora) for model in models], flatten(base)
  _check(flat, below)
  density = jnp.broadcast_to(jnp.asarray(density, jnp.float32), (len(flat),))

  def of_model(own, share):
    """Computes the threshold of one model."""
    pairs = {
      (id(own[path]), id(below[path])): (below[path], own[path])
      for path in own
      if _is_array(own[path]) and is_floating(own[path].dtype)
    }
    if not pairs:
      raise ValueError("The models have no floating parameter to trim.")
    return _threshold(list(pairs.values()), share)

  return jnp.stack(
    [of_model(own, share) for own, share in zip(flat, density, strict=True)]
  )


@jax.jit
def _threshold(pairs: Sequence[tuple[Any, Any]], density: Any) -> Any:
  """Computes the magnitude that a share of all changes reaches."""
  count = count_of(density, sum(leaf.size for leaf, _ in pairs))
  return kth_of_all(pairs, lambda pair: jnp.abs(difference(*pair)), count)


def _merged(path, leaves, under, method, options, key):
  """Merges one parameter; adds its path to errors."""
  known = {name: x for name, x in options.items() if is_known(x)}
  traced = {name: x for name, x in options.items() if name not in known}
  static = tuple((name, _hashable(x)) for name, x in known.items())
  is_array = _is_array(leaves[0]) and is_floating(leaves[0].dtype)
  try:
    if not is_array and not _is_lora(leaves[0]):
      return _same(leaves)
    return _run(leaves, under, key_for(key, path), traced, method, static)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(leaves, base, key, traced, method, static):
  """Runs a method, compiled once for all parameters of a shape.

  Settings that are not traced are static, so that the method can check them.
  """
  options = {**dict(static), **traced}
  weights = options.pop("weights")
  call = functools.partial(method, key=key, **options)
  first = leaves[0]
  if _is_lora(first):
    return call(leaves, weights, base)
  is_same = all(leaf.dtype == first.dtype for leaf in leaves)
  dtype = first.dtype if is_same else jnp.float32
  stack = jnp.stack([leaf.astype(dtype) for leaf in leaves])
  return call(stack, weights, base).astype(first.dtype)


def _hashable(value: Any) -> Any:
  """Converts arrays and lists of numbers to tuples."""
  if isinstance(value, list | tuple):
    return tuple(_hashable(x) for x in value)
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return _hashable(np.asarray(jax.device_get(value)).tolist())
  return value


def _same(leaves: list[Any]) -> Any:
  """Returns the first of the leaves; raises unless all are equal."""
  if not all(is_known(leaf) for leaf in leaves):
    raise ValueError(
      "not floating, and traced: whether the models agree cannot be known. "
      "Merge outside jit, or leave it out."
    )
  for other in leaves[1:]:
    if not np.array_equal(leaves[0], other):
      raise ValueError(
        f"not floating and not equal, {leaves[0]} and {other}: such leaves are "
        "not merged, so models must agree."
      )
  return leaves[0]


def _check(flat: Sequence[Mapping[str, Any]], below: Any) -> None:
  """Raises unless all models have the same names, kinds and shapes."""
  others = [(f"model {i}", own) for i, own in enumerate(flat)][1:]
  if below is not None:
    others.append(("base", below))
    loras = [path for path, leaf in flat[0].items() if _is_lora(leaf)]
    if loras:
      raise ValueError(
        f"{name_some(loras)}: Loras are changes already and have no base; leave"
        " it out, and apply what comes out."
      )
  for name, own in others:
    _check_paths(flat[0], own, name)
    wrong = [
      f"{path}: {_shape(leaf)} and {_shape(own[path])}"
      for path, leaf in flat[0].items()
      if _shape(leaf) != _shape(own[path])
    ]
    if wrong:
      raise ValueError(
        f"model 0 and {name} differ in shape: {name_some(wrong)}. Models must "
        "be finetunes of one base."
      )


def _check_paths(
  first: Mapping[str, Any], own: Mapping[str, Any], name: str
) -> None:
  """Raises unless a model has the first one's paths."""
  try:
    check_same_paths(first, own, "model 0", name)
  except ValueError as error:
    if not any(_is_lora(leaf) for leaf in first.values()):
      raise
    raise ValueError(
      f"{error} If a module that an adapter lacks is one it does not change, "
      "merge `fill_missing(adapters)`."
    ) from error


def _shape(leaf: Any) -> Any:
  """Returns what must agree: shape, a Lora's in and out, or the dtype."""
  if _is_lora(leaf):
    return "Lora", *leaf.a.shape[:-2], leaf.a.shape[-1], leaf.b.shape[-1]
  if not _is_array(leaf):
    return ()
  is_merged = is_floating(leaf.dtype)
  return leaf.shape if is_merged else (*leaf.shape, str(leaf.dtype))


def _is_lora(leaf: Any) -> bool:
  """Returns whether a leaf is a Lora."""
  return isinstance(leaf, Lora)


def _is_array(leaf: Any) -> bool:
  """Returns whether a leaf is an array."""
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
