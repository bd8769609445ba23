# SPDX-License-Identifier: Apache-2.0
"""Lists the merges that work piece by piece, and the numbers these need."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.merging.arrays.averages import linear, nearswap, passthrough
from jlora.merging.arrays.pruning import dare, dare_lengths, della
from jlora.merging.arrays.sparsifiers import inverse_keep, match_l1, unscaled
from jlora.merging.arrays.spherical import products_of, slerp
from jlora.merging.arrays.task_vectors import (
  by_count,
  by_mass_or_plus,
  task_arithmetic,
  ties,
)
from jlora.numerics.backends import ranks_along
from jlora.numerics.kth_largest import count_of, kth_magnitude

Method = Callable[..., Any]


class WholeSums(NamedTuple):
  """Sums over a whole tensor that a method needs to merge a piece of it.

  Attributes:
    setting: the method's argument that takes them.
    of: called as the method is, with its options and a piece; returns float32
      of one shape for all pieces. Zeros in all models and the base add nothing.
    where: the options of the method with which it needs them; else it does not.
  """

  setting: str
  of: Method
  where: Mapping[str, Any] = {}


class ToldFirst(NamedTuple):
  """What the host finds of whole tensors faster than XLA does on a CPU.

  Attributes:
    setting: the method's argument that takes it.
    of: (stack, base, value of the argument it replaces) -> that of each model.
    instead_of: the argument that it is computed from and replaces, if any.
    default: that argument's default.
    without: options of the method with which it is not found.
  """

  setting: str
  of: Callable[[Any, Any, Any], np.ndarray]
  instead_of: str | None = None
  default: Any = None
  without: frozenset[str] = frozenset()


def host_thresholds(stack: Any, base: Any, density: Any) -> np.ndarray:
  """Finds the magnitude that a share of each model's changes reaches.

  Args:
    stack: (n, ...) one parameter of n models.
    base: (...) the parameter they were finetuned from.
    density: share to keep, one for all models or (n,).

  Returns:
    (n,) float32; NaN, which no magnitude reaches, where the share is 0.
  """
  shares = np.broadcast_to(np.float32(density), (len(stack),))
  return np.asarray(
    [
      kth_magnitude(
        np.asarray(_magnitudes(leaf, base)), count_of(share, base.size)
      )
      for leaf, share in zip(stack, shares, strict=True)
    ],
    np.float32,
  )


def host_ranks(stack: Any, base: Any, _: Any = None) -> np.ndarray:
  """Finds the rank of each entry of each model's changes, in its row.

  Args:
    stack: (n, ...) one parameter of n models.
    base: (...) the parameter they were finetuned from.

  Returns:
    (n, ...) int32, 0 for the smallest of a row.
  """
  return np.stack(
    [
      ranks_along(np.atleast_1d(_magnitudes(leaf, base)), -1).reshape(
        base.shape
      )
      for leaf in stack
    ]
  )


@jax.jit
def _magnitudes(leaf, base):
  """Computes |leaf - base| in float32."""
  return jnp.abs(leaf.astype(jnp.float32) - base.astype(jnp.float32))


# Methods whose result depends, entry by entry, on that entry of the models and
# the base alone, on its position if they draw at random, and on `SUMS`. Each
# with the options that matter for this, and their allowed values; the defaults
# are among these.
PIECEWISE: Mapping[Method, Mapping[str, frozenset[Any]]] = {
  linear: {},
  nearswap: {},
  passthrough: {},
  slerp: {},
  task_arithmetic: {},
  dare: {
    "elect": frozenset([None, by_count, by_mass_or_plus]),
    "rescale": frozenset([inverse_keep, match_l1, unscaled]),
  },
}
SUMS: Mapping[Method, WholeSums] = {
  slerp: WholeSums("products", lambda stack, *_, **__: products_of(stack)),
  dare: WholeSums("lengths", dare_lengths, {"rescale": match_l1}),
}
TOLD_FIRST: Mapping[Method, ToldFirst] = {
  ties: ToldFirst(
    "threshold",
    host_thresholds,
    "density",
    inspect.signature(ties).parameters["density"].default,
  ),
  della: ToldFirst("ranks", host_ranks, without=frozenset({"axis"})),
}
# Methods that draw at random: they get the whole tensor's key and the position
# at which a piece starts.
DRAWN = frozenset([dare])


def is_piecewise(method: Method) -> bool:
  """Returns whether a method can merge a tensor piece by piece.

  Args:
    method: a function, or options bound to one by `functools.partial`.

  Returns:
    bool.

  Example:
    >>> import functools
    >>> from jlora.merging import by_mass
    >>> is_piecewise(dare), is_piecewise(functools.partial(dare, elect=by_mass))
    (True, False)
  """
  plain, options = unbind(method)
  if plain not in PIECEWISE:
    return False
  allowed = PIECEWISE[plain]
  return all(
    options[name] in allowed[name] for name in allowed.keys() & options
  )


def whole_sums_of(method: Method) -> WholeSums | None:
  """Returns the sums over a tensor that a method needs for its pieces.

  Args:
    method: as for `is_piecewise`.

  Returns:
    Sums with the method's options bound, or None.

  Example:
    >>> whole_sums_of(slerp).setting, whole_sums_of(dare)
    ('products', None)
  """
  plain, options = unbind(method)
  sums = SUMS.get(plain)
  if sums is None or sums.setting in options:
    return None
  if any(options.get(name) is not own for name, own in sums.where.items()):
    return None
  return sums._replace(of=functools.partial(sums.of, **options))


def told_of(method: Method) -> ToldFirst | None:
  """Returns what the host finds for a method, with the method's own default.

  Args:
    method: as for `is_piecewise`.

  Returns:
    ToldFirst, or None.
  """
  plain, options = unbind(method)
  told = TOLD_FIRST.get(plain)
  if told is None or told.without & options.keys():
    return None
  return told._replace(default=options.get(told.instead_of or "", told.default))


def unbind(method: Method) -> tuple[Method, Mapping[str, Any]]:
  """Splits a method into its function and the options bound to it.

  Args:
    method: as for `is_piecewise`.

  Returns:
    The function, and its options by name.
  """
  return getattr(method, "func", method), getattr(method, "keywords", {})
