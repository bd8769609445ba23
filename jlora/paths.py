# SPDX-License-Identifier: Apache-2.0
"""Paths of pytree leaves: flattening, matching by regex, PRNG keys by path."""

import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jlora.messages import name_some
from jlora.numerics.threefry import fold_in

T = TypeVar("T")


def flatten(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns the leaves of a pytree by path, such as `layers/0/attn/q/kernel`.

  A mapping whose keys are already the paths of its leaves (an open checkpoint,
  or a flat dict) keeps its names. NNX's trailing `value` attribute is left out,
  so that a linen and an NNX model have the same paths.

  Args:
    tree: any pytree, or a lazy `Mapping[str, array]`; leaves are not changed.
    is_leaf: tells which further nodes are leaves, as for `jax.tree.map`.

  Returns:
    {path: leaf}, in the tree's own order.

  Raises:
    ValueError: two leaves with the same path, or one parameter of an NNX module
      at several paths, which JAX would take for several parameters.

  Example:
    >>> flatten({"layers": [{"w": 1}, {"w": 2}]})
    {'layers/0/w': 1, 'layers/1/w': 2}
  """
  if isinstance(tree, Mapping) and not _is_node(tree):
    return {str(name): tree[name] for name in tree}
  _check_unshared(tree)
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
  flat = {_name(path): leaf for path, leaf in leaves}
  if len(flat) != len(leaves):
    raise ValueError(
      f"{len(leaves) - len(flat)} leaves of the tree share a path with another;"
      " rename the keys that contain '/'."
    )
  return flat


def arrays_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves that are arrays, or have a shape and a dtype as they do.

  Activation functions, numbers of Python, strings and classes are no parameters
  of a model, though its pytree may hold them.

  Args:
    leaves: {path: leaf}, as of `flatten`.

  Returns:
    {path: leaf} in the given order; leaves are not changed.

  Example:
    >>> tree = {"w": jax.ShapeDtypeStruct((2, 3), "float32"), "t": 3.0}
    >>> arrays_of(flatten({**tree, "act": jax.nn.relu, "name": "mlp"}))
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
  """
  # A class such as np.float32 has both attributes, but its shape is no tuple.
  return {
    path: leaf
    for path, leaf in leaves.items()
    if isinstance(getattr(leaf, "shape", None), tuple)
    and hasattr(leaf, "dtype")
  }


def unflatten(
  flat: Mapping[str, Any],
  like: Any,
  is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
  """Rebuilds a pytree from {path: leaf}, with the structure of another.

  Args:
    flat: one leaf for every path of `like`, no more and no fewer.
    like: the pytree that gives the structure; its leaves are not used.
    is_leaf: tells which further nodes of it are leaves.

  Returns:
    The pytree.

  Raises:
    ValueError: paths missing or left over, up to three named.

  Example:
    >>> unflatten({"a/0": 1, "a/1": 2}, like={"a": [0, 0]})
    {'a': [1, 2]}
  """
  paths, tree = jax.tree_util.tree_flatten_with_path(like, is_leaf)
  names = [_name(path) for path, _ in paths]
  check_same_paths(names, flat, "the tree", "the given leaves")
  return jax.tree_util.tree_unflatten(tree, [flat[name] for name in names])


def check_same_paths(
  left: Iterable[str], right: Iterable[str], left_name: str, right_name: str
) -> None:
  """Raises unless two collections hold the same paths.

  Args:
    left: paths.
    right: paths.
    left_name: the name of the first collection in the error.
    right_name: the name of the second.

  Raises:
    ValueError: paths that only one side has; names up to three of each.

  Example:
    >>> check_same_paths(["w"], ["w", "v"], "base", "finetuned")
    Traceback (most recent call last):
    ...
    ValueError: Paths differ: only in finetuned: v.
  """
  left, right = list(left), list(right)
  only_left = sorted(set(left) - set(right))
  only_right = sorted(set(right) - set(left))
  parts = [
    f"only in {name}: {name_some(only)}"
    for name, only in ((left_name, only_left), (right_name, only_right))
    if only
  ]
  if parts:
    raise ValueError(f"Paths differ: {'; '.join(parts)}.")


def first_match(
  rules: Iterable[tuple[str, T]], path: str, default: T | None = None
) -> T | None:
  """Returns the value of the first rule whose regex matches the whole path.

  Args:
    rules: (regex, value) pairs, tried in order with `re.fullmatch`.
    path: the path.
    default: returned when no rule matches.

  Returns:
    The value or the default.

  Example:
    >>> first_match([(".*/q/kernel", 8), (".*", 64)], "layers/0/q/kernel")
    8
  """
  for pattern, value in rules:
    if re.fullmatch(pattern, path):
      return value
  return default


def matching(
  include: str | None = None, exclude: str | None = None
) -> Callable[[str, Any], bool]:
  """Returns a selector `(path, leaf) -> bool` made from two regexes.

  Args:
    include: regex of whole paths to take; None takes all.
    exclude: regex of whole paths to leave out, even when included; None leaves
      out none.

  Returns:
    A function for the `select` argument of `extract`.

  Raises:
    ValueError: what is no regex.

  Example:
    >>> matching(include=".*mlp.*", exclude=".*/0/.*")("layers/1/mlp/up", 0)
    True
  """
  for regex in (include, exclude):
    try:
      re.compile(regex or "")
    except re.error as error:
      raise ValueError(f"{regex!r} is no regex: {error}.") from None

  def select(path: str, leaf: Any) -> bool:
    """Returns whether a path is included and not excluded."""
    del leaf
    if exclude is not None and re.fullmatch(exclude, path):
      return False
    return include is None or re.fullmatch(include, path) is not None

  return select


def key_for(key: Any, path: str) -> Any:
  """Derives the PRNG key of one module: `fold_in(key, crc32(path))`.

  It hangs on the path alone: neither the order of the modules nor the choice of
  modules changes it.

  Args:
    key: a PRNG key; None means `jax.random.key(0)`. Its two words of NumPy
      compile nothing.
    path: the module's path.

  Returns:
    A PRNG key, or its words.

  Example:
    >>> bool(key_for(None, "q") == key_for(jax.random.key(0), "q"))
    True
  """
  root = jax.random.key(0) if key is None else key
  return fold_in(root, zlib.crc32(path.encode()))


def _check_unshared(tree: Any) -> None:
  """Raises if a floating Variable of NNX is at several paths of a tree."""
  nnx = sys.modules.get("flax.nnx")
  if nnx is None:
    return
  is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
  first, shared = {}, []
  for at, node in jax.tree_util.tree_flatten_with_path(tree, is_variable)[0]:
    if is_variable(node) and any(map(_is_floating, jax.tree.leaves(node))):
      path = _name(at)
      if first.setdefault(id(node), path) != path:
        shared.append(f"{first[id(node)]} and {path}")
  if shared:
    raise ValueError(
      f"{len(shared)} parameters of an NNX module are at several paths: "
      f"{name_some(shared)}. JAX would untie them; give `nnx.state(module)` or "
      "what `nnx.split` returns, which hold each once."
    )


def _is_floating(leaf: Any) -> bool:
  """Returns whether a leaf is an array of floating dtype."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _is_node(tree: Any) -> bool:
  """Returns whether JAX can take this container apart."""
  return not jax.tree_util.treedef_is_leaf(jax.tree_util.tree_structure(tree))


def _name(path: tuple[Any, ...]) -> str:
  """Joins a key path to `a/b/c`, without NNX's trailing `.value`."""
  if path and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")
