# SPDX-License-Identifier: Apache-2.0
"""What the writers of image models' adapters share: which tensors, and how.

A writer names the modules, this file makes the tensors: kernels get their axes
back, the scale goes into B, factors are balanced before they are rounded, and
nothing is clamped: what a dtype cannot hold is an error.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.safetensors import stream_safetensors
from jlora.checkpoints.sources import check_apart
from jlora.formats.bases import COMPONENTS, Base, Split, base_of
from jlora.formats.joining import halves_exchanged, join
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.finite import rounded

#: (module of diffusers without its component, shape of its weight) -> whether
#: its LoRA is written.
Select = Callable[[str, tuple[int, ...]], bool]

_TABLES = re.compile(
  r".*\b(token_embedding|position_embedding|embed_tokens|shared"
  r"|relative_attention_bias)"
)


class Target(NamedTuple):
  """A module of a file.

  Attributes:
    stem: what its keys begin with.
    parts: the modules whose changes make it up, in order, None for those that
      nothing changes.
    sizes: how many outputs each has.
    shape: of its weight, (out, in, *kernel).
    exchanged: whether the halves of the outputs change places.
  """

  stem: str
  parts: tuple[str | None, ...]
  sizes: tuple[int, ...]
  shape: tuple[int, ...]
  exchanged: bool = False


class Given(NamedTuple):
  """What a writer is given, by component and module.

  Attributes:
    names: (component, module) -> name in `loras`, of what can be written.
    shapes: (component, module) -> shape, of all that is known.
    biased: those that have a bias.
    shifts: (component, module) -> {"weight" or "bias": name in `shifts`}.
    base: where the names were found.
    left: name -> why it is not written.
  """

  names: dict[Split, str]
  shapes: Mapping[Split, tuple[int, ...]]
  biased: frozenset[Split]
  shifts: dict[Split, dict[str, str]]
  base: Base
  left: dict[str, str]


class Suffixes(NamedTuple):
  """What follows a module's name in a format.

  Attributes:
    down: of A.
    up: of B.
    alpha: of alpha; None where the format has none.
  """

  down: str
  up: str
  alpha: str | None = None


def everything(module: str, shape: tuple[int, ...]) -> bool:
  """Selects all modules.

  Args:
    module: its name.
    shape: of its weight.

  Returns:
    True.

  Example:
    >>> everything("conv_in", (320, 4, 3, 3))
    True
  """
  del module, shape
  return True


def linear_layers(module: str, shape: tuple[int, ...]) -> bool:
  """Selects linear layers, and convolutions of 1x1.

  Args:
    module: its name.
    shape: of its weight.

  Returns:
    Whether it is one.

  Example:
    >>> linear_layers("conv_in", (320, 4, 3, 3))
    False
  """
  del module
  return math.prod(shape[2:]) == 1


def attention_layers(module: str, shape: tuple[int, ...]) -> bool:
  """Selects the matrices of attention.

  Args:
    module: its name.
    shape: of its weight.

  Returns:
    Whether it is one.

  Example:
    >>> attention_layers("transformer_blocks.0.attn.to_q", (64, 64))
    True
  """
  del shape
  return bool(re.search(r"(^|\.)(self_)?attn\w*\.|SelfAttention\.", module))


def given_by(
  loras: Mapping[str, Lora],
  like: Any,
  shifts: Mapping[str, Any] | None,
  select: Select,
) -> Given:
  """Sorts what a writer is given by component and module.

  Args:
    loras: module or parameter -> Lora.
    like: the base, as `base_of` takes it, or shapes of weights by module; None
      for `loras.shapes`, and without those all are linear layers.
    shifts: parameter -> change, of what is no Lora.
    select: which modules are written.

  Returns:
    Given.

  Raises:
    ValueError: no Lora, names that `like` lacks, or shapes that differ.
  """
  if not loras:
    raise ValueError("there is no Lora to write.")
  if like is None:
    like = getattr(loras, "shapes", None) or {
      name: (lora.b.shape[-1], lora.a.shape[-1]) for name, lora in loras.items()
    }
  base = base_of(like)
  at = {name: split for split, name in base.names.items()}
  own = {name: name.removesuffix(".weight") for name in loras}
  if lost := [name for name in loras if own[name] not in at]:
    raise ValueError(
      f"`like` has no {name_some(lost)}; give the base that the Loras are for."
    )
  left: dict[str, str] = {}
  kept = {}
  for name in loras:
    split = at[own[name]]
    if reason := _reason(split, base.shapes[split], select):
      left[name] = reason
    elif split in kept:
      raise ValueError(f"{kept[split]} and {name} are one module; give one.")
    else:
      kept[split] = name
  moved_names = shifts or {}
  biased = base.biased | {
    split for split, name in base.names.items() if f"{name}.bias" in moved_names
  }
  moved: dict[Split, dict[str, str]] = {}
  for name in moved_names:
    module, _, leaf = name.rpartition(".")
    split = at.get(module) or _beside(module, at)
    moved.setdefault(split, {})[leaf] = name
  return Given(kept, base.shapes, biased, moved, base, left)


def _beside(module: str, at: Mapping[str, Split]) -> Split:
  """Returns component and module of a norm that no shape is known of."""
  name, (component, inner) = next(iter(at.items()))
  first, _, rest = module.partition(".")
  is_split = bool(component) and name.startswith(f"{component}.{inner}")
  if is_split and first in COMPONENTS:
    return first, rest
  return component, module


def rounded_change(
  name: str, change: Any, shape: tuple[int, ...] | None, dtype: Any
) -> np.ndarray:
  """Rounds a change that is no Lora.

  Args:
    name: of the parameter.
    change: of a weight or a bias.
    shape: of the module's weight; None if it is not known.
    dtype: storage dtype.

  Raises:
    ValueError: another shape, or entries that the dtype cannot hold.
  """
  change = np.asarray(change)
  if shape is not None and name.endswith(".bias"):
    shape = shape[:1]
  fits = shape is None or (
    change.shape[:1] == shape[:1] and change.size == math.prod(shape)
  )
  if not change.ndim or not fits:
    raise ValueError(
      f"the change of {name} is {change.shape}, needed is {shape or 'an array'}"
      "; give the base that it is for as `like`."
    )
  return rounded(name, change, dtype)


def _reason(split: Split, shape: tuple[int, ...], select: Select) -> str:
  """Returns why a module's Lora is not written, "" if it is."""
  if _TABLES.fullmatch(split[1]):
    return "a table of tokens: the format has no LoRA for embeddings"
  return "" if select(split[1], shape) else "not among the layers asked for"


def factors(
  target: Target, loras: Mapping[str, Lora], dtype: Any, gain: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
  """Makes the two stored tensors of a module.

  Args:
    target: the module.
    loras: module or parameter -> Lora.
    dtype: storage dtype.
    gain: by which B is multiplied besides the scale.

  Returns:
    down (r, in, *k) and up (out, r, *1).

  Raises:
    ValueError: a Lora that does not fit, is stacked or not finite, or an entry
      that the dtype cannot hold.
  """
  n_in = math.prod(target.shape[1:])
  parts = [
    None
    if name is None
    else _matrices(name, loras[name], (n_in, size), dtype, gain)
    for name, size in zip(target.parts, target.sizes, strict=True)
  ]
  changed = [part if part and len(part[0]) else None for part in parts]
  a, b = next(part for part in parts if part)
  if any(changed) and len(parts) > 1:
    a, b = join(changed, target.sizes)
  if target.exchanged:
    b = halves_exchanged(b)
  down = np.ascontiguousarray(a).reshape(len(a), *target.shape[1:])
  up = np.ascontiguousarray(b).reshape(*b.shape, *(1,) * len(target.shape[2:]))
  return down, up


def _matrices(
  name: str, lora: Lora, sides: tuple[int, int], dtype: Any, gain: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns A and B with the scale in B, rounded."""
  a, b, scale = np.asarray(lora.a), np.asarray(lora.b), np.asarray(lora.scale)
  if a.ndim != 2 or b.ndim != 2:
    raise ValueError(
      f"{name}: a {a.shape}, b {b.shape} is a stack; write its members one by "
      "one, under their own names."
    )
  if len(a) != len(b):
    raise ValueError(
      f"{name}: a {a.shape} and b {b.shape} have different ranks."
    )
  if (a.shape[1], b.shape[1]) != sides:
    raise ValueError(
      f"{name}: the Lora is for ({a.shape[1]}, {b.shape[1]}), the weight reads "
      f"{sides[0]} and writes {sides[1]}; give the base that it is for as "
      "`like`."
    )
  scale = gain * float(scale)
  if scale == 1 and a.dtype == b.dtype == np.dtype(dtype):
    # Nothing is rounded, so that a file written anew has the same bytes.
    return rounded(f"{name}, A", a, dtype), rounded(f"{name}, B", b, dtype).T
  a, b = balanced(
    a.astype(np.float32), np.float32(scale) * b.astype(np.float32)
  )
  return rounded(f"{name}, A", a, dtype), rounded(f"{name}, B", b, dtype).T


def balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gives both factors of each unit about the same norm.

      a_i 2^k, b_i 2^-k,   k = round(½ log2(‖b_i‖ / ‖a_i‖))

  Powers of two change no digit of any entry.

  Args:
    a: (r, in).
    b: (r, out).

  Returns:
    a and b with norms that differ by a factor of two at most; a unit of which
    one norm is 0, or not finite, stays.
  """
  norms = [np.sqrt(np.sum(np.square(x, dtype=np.float64), 1)) for x in (a, b)]
  usable = np.isfinite(norms[0] + norms[1]) & (norms[0] * norms[1] > 0)
  ratio = np.where(usable, norms[1], 1.0) / np.where(usable, norms[0], 1.0)
  k = np.rint(0.5 * np.log2(ratio)).astype(int)[:, None]
  return np.ldexp(a, k), np.ldexp(b, -k)


def write_file(
  path: str | os.PathLike,
  targets: Sequence[Target],
  loras: Mapping[str, Lora],
  suffixes: Suffixes,
  dtype: Any,
  extra: Mapping[str, np.ndarray],
  describe: Callable[[Mapping[str, int]], Mapping[str, str]],
  left: dict[str, str],
  one_alpha: bool = False,
) -> None:
  """Writes a file of modules one by one, whole or not at all.

  Args:
    path: the file.
    targets: its modules.
    loras: module or parameter -> Lora; each is read twice, the first time to
      check it and for its rank.
    suffixes: of the format.
    dtype: storage dtype of the factors.
    extra: further tensors.
    describe: rank by stem -> the metadata.
    left: gets modules of rank 0 and the reason.
    one_alpha: whether all modules have the largest rank as alpha, and B makes
      up for it, instead of their own.

  Raises:
    ValueError: as `factors`, nothing to write, or a path that is read from.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be a floating one, got {np.dtype(dtype)}.")
  if Path(path).is_dir():
    raise ValueError(f"{path} is a folder; give the name of a file.")
  check_apart(path, [p for x in (loras, getattr(loras, "adapter", None))
                     if (p := getattr(x, "path", None))])  # fmt: skip
  spec: dict[str, tuple] = {
    name: (x.shape, x.dtype) for name, x in extra.items()
  }
  ranks: dict[str, int] = {}
  written = []
  for target in targets:
    found = factors(target, loras, dtype)
    if not len(found[0]):
      left |= dict.fromkeys(filter(None, target.parts), "rank 0: no change")
      continue
    for suffix, tensor in zip(suffixes[:2], found, strict=True):
      spec[target.stem + suffix] = (tensor.shape, tensor.dtype)
    ranks[target.stem] = len(found[0])
    written.append(target)
  if not written:
    raise ValueError(
      "No module is left to write: "
      + name_some(f"{name}: {reason}" for name, reason in left.items())
    )

  most = max(ranks.values())
  alphas = {s: alpha_of(most if one_alpha else r, dtype)
            for s, r in ranks.items()}  # fmt: skip
  if suffixes.alpha:
    for stem, alpha in alphas.items():
      spec[stem + suffixes.alpha] = ((), alpha.dtype)

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    yield from extra.items()
    for target in written:
      gain = ranks[target.stem] / most if one_alpha else 1.0
      found = factors(target, loras, dtype, gain)
      for suffix, tensor in zip(suffixes[:2], found, strict=True):
        yield target.stem + suffix, tensor
      if suffixes.alpha:
        yield target.stem + suffixes.alpha, alphas[target.stem]

  stream_safetensors(path, spec, tensors(), describe(ranks))


def alpha_of(rank: int, dtype: Any) -> np.ndarray:
  """Returns a rank as alpha, in float32 if the dtype would round it.

  Args:
    rank: the number.
    dtype: of the factors.
  """
  stored = np.array(rank, dtype)
  return stored if float(stored) == rank else np.array(rank, np.float32)
