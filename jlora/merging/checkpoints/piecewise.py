# SPDX-License-Identifier: Apache-2.0
"""Which merges can be made piece by piece, and what they are told for it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.merging.arrays.averages import linear, nearswap, passthrough
from jlora.merging.arrays.pruning import dare, dare_lengths
from jlora.merging.arrays.sparsifiers import inverse_keep, match_l1, unscaled
from jlora.merging.arrays.spherical import products_of, slerp
from jlora.merging.arrays.task_vectors import (
  by_count,
  by_mass_or_plus,
  task_arithmetic,
  ties,
)
from jlora.numerics.kth_largest import count_of, kth_on_host

Method = Callable[..., Any]


class WholeSums(NamedTuple):
  """Numbers of a whole tensor, added up from those of its pieces.

  Attributes:
    setting: the method's argument that takes them.
    of: called as the method is, with its options and a piece -> float32 of one
      shape for all pieces. Zeros in all models and the base add none.
    where: options of the method with which alone it needs them.
  """

  setting: str
  of: Method
  where: Mapping[str, Any] = {}


class ToldFirst(NamedTuple):
  """A number of whole tensors that the host finds sooner than XLA on a CPU.

  Attributes:
    setting: the method's argument that takes it.
    instead_of: the argument it is found from, which it stands for.
    default: of that argument.
    of: (stack, base, value of the argument) -> the number of each model.
  """

  setting: str
  instead_of: str
  default: Any
  of: Callable[[Any, Any, Any], np.ndarray]


def host_thresholds(stack: Any, base: Any, density: Any) -> np.ndarray:
  """Finds the magnitude that a share of each model's changes reaches.

  Args:
    stack: (n, ...) one parameter of n models.
    base: (...) the parameter they were finetuned from.
    density: share to keep, one for all models or (n,).

  Returns:
    (n,) float32; a NaN, which nothing reaches, where the share is 0.
  """
  shares = np.broadcast_to(np.float32(density), (len(stack),))
  return np.asarray(
    [
      kth_on_host(_magnitudes(leaf, base), count_of(share, base.size))
      for leaf, share in zip(stack, shares, strict=True)
    ],
    np.float32,
  )


@jax.jit
def _magnitudes(leaf, base):
  """Computes |leaf - base| in float32."""
  return jnp.abs(leaf.astype(jnp.float32) - base.astype(jnp.float32))


# An entry of the result depends on nothing but that entry of the models and of
# the base, on its place where entries are drawn, and on the sums where there
# are some; whatever the method's options, or with these values of them. The
# defaults are among those.
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
    "density",
    inspect.signature(ties).parameters["density"].default,
    host_thresholds,
  ),
}
# Told the key of the whole tensor, and where in it a piece starts.
DRAWN = frozenset([dare])


def is_piecewise(method: Method) -> bool:
  """Whether a method can be given a tensor piece by piece.

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
  """The sums that a method needs to be given a tensor piece by piece.

  Args:
    method: as for `is_piecewise`.

  Returns:
    Sums, with the method's options bound, or None.

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
  """Returns what the host finds for a method, its own default taken over.

  Args:
    method: as for `is_piecewise`.

  Returns:
    ToldFirst, or None.
  """
  plain, options = unbind(method)
  told = TOLD_FIRST.get(plain)
  if told is None:
    return None
  return told._replace(default=options.get(told.instead_of, told.default))


def unbind(method: Method) -> tuple[Method, Mapping[str, Any]]:
  """A method without its options, and these.

  Args:
    method: as for `is_piecewise`.

  Returns:
    The function, and its options.

  Example:
    >>> unbind(linear)[1]
    {}
  """
  return getattr(method, "func", method), getattr(method, "keywords", {})
