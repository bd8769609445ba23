# SPDX-License-Identifier: Apache-2.0
"""Parameters of a tree of JAX: their paths, and names that PEFT can hold."""

from collections.abc import Mapping
from typing import Any

from jlora.paths import arrays_of, flatten

# What Flax calls a module's parameter -> what PyTorch calls it.
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# The collection of linen's variables that has the parameters.
_COLLECTION = "params/"

# What an error shows of `rename=`.
RENAMING = (
  "If these are no names of the model that loads the adapter, give them by"
  ' rename=lambda path: "encoder." + path.replace("/w", ".weight"), or by pairs'
  ' of a regex and what replaces it: rename=[(r"^l(\\d)", r"layers.\\1")].'
)


def leaves_of(like: Any) -> Mapping[str, Any]:
  """Returns {path: leaf} of any tree of parameters.

  Args:
    like: an open checkpoint, of which the `.spec` is taken; {path: leaf}; or
      any pytree of arrays or shapes: nested dicts, linen's variables, an NNX
      State or module, an equinox module.

  Returns:
    {path: leaf}; of a pytree the arrays alone.

  Raises:
    ValueError: as `flatten`, or no leaf is an array.

  Example:
    >>> import numpy as np
    >>> list(leaves_of({"l1": {"kernel": np.ones((3, 5))}}))
    ['l1/kernel']
  """
  spec = getattr(like, "spec", None)
  if isinstance(spec, Mapping):
    return spec
  if isinstance(like, Mapping) and all(
    isinstance(getattr(leaf, "shape", None), tuple) for leaf in like.values()
  ):
    return like
  found = arrays_of(flatten(like))
  if not found:
    raise ValueError(
      f"like={type(like).__name__} has no arrays. Give all parameters of the"
      " base: a pytree, {path: array}, or an open checkpoint."
    )
  return found


def name_path(path: str) -> str:
  """Returns the name of a parameter of JAX as PyTorch would give it.

  Args:
    path: a path of `flatten`. One without "/" is a name already.

  Returns:
    The path with dots; `kernel`, `embedding` and `scale` become `weight`, and
    linen's collection `params` goes.

  Example:
    >>> name_path("l1/kernel"), name_path("params/Dense_0/bias")
    ('l1.weight', 'Dense_0.bias')
    >>> name_path("model.norm.weight")
    'model.norm.weight'
  """
  if "/" not in path:
    return path
  *modules, leaf = path.removeprefix(_COLLECTION).split("/")
  return ".".join([*modules, _LEAVES.get(leaf, leaf)])
