# SPDX-License-Identifier: Apache-2.0
"""Rules for which parameters are taken, and the rank that each of them gets."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jlora.messages import name_some
from jlora.paths import first_match

Select = Callable[[str, Any], bool]


def is_matrix(path: str, leaf: Any) -> bool:
  """Returns whether a parameter can be a matrix: floating, two axes or more.

  One without entries is none, for nothing of it can change.

  Args:
    path: the parameter's name. It is not looked at; the view table reads it.
    leaf: anything with `.shape` and `.dtype`.

  Returns:
    bool. This is the default of `select`.

  Example:
    >>> is_matrix("norm/scale", jnp.ones(3)), is_matrix("w", jnp.ones((3, 3)))
    (False, True)
  """
  del path
  return (
    len(leaf.shape) >= 2 and 0 not in leaf.shape and is_floating(leaf.dtype)
  )


# Names of embeddings: parameters with a row for each token or position.
EMBEDDINGS = (
  r"(.*[/.])?(embed[^/.]*|wte|wpe|(word|position|token_type)_embeddings"
  r"|tok_embeddings|shared)([/.][^/.]+)?"
)

# Names of heads: likewise.
HEADS = r"(.*[/.])?(head|lm_head|output_projection)([/.][^/.]+)?"


def is_linear(path: str, leaf: Any) -> bool:
  """Returns whether a parameter is a layer's matrix, no embedding and no head.

  Embeddings and heads are told by their names.

  Args:
    path: the parameter's name.
    leaf: anything with `.shape` and `.dtype`.

  Returns:
    bool. As a `select` it takes what PEFT calls "all-linear".

  Example:
    >>> w = jnp.ones((3, 3))
    >>> [is_linear(path, w) for path in ("layers/0/q/kernel", "embed/embedding",
    ...                                  "lm_head.weight")]
    [True, False, False]
  """
  is_other = first_match([(EMBEDDINGS, True), (HEADS, True)], path, False)
  return is_matrix(path, leaf) and not is_other


def is_floating(dtype: Any) -> bool:
  """Returns whether a dtype is floating, bfloat16 and float8 included.

  Args:
    dtype: a NumPy or ml_dtypes dtype.

  Returns:
    bool.

  Example:
    >>> is_floating(jnp.bfloat16), is_floating(jnp.int32)
    (True, False)
  """
  return bool(jnp.issubdtype(dtype, jnp.floating))


def ranks_of(
  rank: int | Mapping[str, int], modules: Iterable[str]
) -> dict[str, int]:
  """Returns the rank of each module, from one number or a table.

  Args:
    rank: one rank for all, or {path: rank}.
    modules: the paths of all modules.

  Returns:
    {path: rank}, in the order of modules; of a table only the paths it names.

  Raises:
    ValueError: no modules, a rank below 1, or a path that is not a module.

  Example:
    >>> ranks_of({"q": 8}, ["q", "k"])
    {'q': 8}
  """
  modules = list(modules)
  if not modules:
    raise ValueError(
      "No matrix was selected: `select` refused all, or no view fits the names."
      " Pass `views` or another `select`."
    )
  if isinstance(rank, Mapping):
    unknown = [path for path in rank if path not in set(modules)]
    if unknown:
      raise ValueError(
        f"rank names {len(unknown)} paths that are no modules: "
        f"{name_some(unknown)}; there are {name_some(modules)}."
      )
    ranks = {path: int(rank[path]) for path in modules if path in rank}
  else:
    ranks = dict.fromkeys(modules, int(rank))
  low = [f"{path}: {value}" for path, value in ranks.items() if value < 1]
  if low or not ranks:
    raise ValueError(
      f"rank must be at least 1, got {name_some(low) or 'no path at all'}; "
      "leave a module out instead."
    )
  return ranks


def warn_of_waste(
  ranks: Mapping[str, int], matrices: Mapping[str, tuple[int, ...]]
) -> None:
  """Warns of adapters that hold more numbers than the weights they change.

      r (in + out) > in out

  Args:
    ranks: path -> rank.
    matrices: path -> (..., in, out).

  Warns:
    UserWarning: names up to three, with both sizes.

  Example:
    >>> with warnings.catch_warnings(record=True, action="always") as seen:
    ...   warn_of_waste({"q": 2, "k": 1}, {"q": (3, 4), "k": (3, 4)})
    >>> str(seen[0].message).split(": ")[1:]
    ['q', 'rank 2 of (3, 4), 14 for 12; ask for a lower rank there.']
  """
  large = []
  for path, rank in ranks.items():
    *batch, n_in, n_out = matrices[path]
    numbers = math.prod(batch) * rank * (n_in + n_out)
    if numbers > math.prod(matrices[path]):
      large.append(
        f"{path}: rank {rank} of {matrices[path]}, {numbers} for "
        f"{math.prod(matrices[path])}"
      )
  if large:
    warnings.warn(
      f"{len(large)} adapters hold more numbers than their weights: "
      f"{name_some(large)}; ask for a lower rank there.",
      stacklevel=3,
    )
