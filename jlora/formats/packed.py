# SPDX-License-Identifier: Apache-2.0
"""Quantises Loras to few bits, so that the same bytes hold a larger rank.

`pack` and `unpack` convert, `bits_within` chooses bit widths for a budget of
bytes, `save_packed` and `load_packed` write and read files. Every unit (rank-1
term) has its own bit width, and one step for each of its two factors. Their
entries are about Gaussian, so the error of a width is known beforehand, and
widths can be chosen like ranks: by squared error per byte.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.documents import (
  COUNT,
  Kind,
  check_fields,
  list_of,
  parse_json,
)
from jlora.checkpoints.safetensors import write_safetensors
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.finite import is_finite, not_finite

#: Squared error of the best uniform quantiser of a standard normal variable by
#: bits, and its step (Max, 1960, table II; checked by a test).
LOST = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 3.04e-4,
        8.77e-5)  # fmt: skip
STEPS = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569,
         0.0308)  # fmt: skip
MAX_BITS = 8
_UNIT_BYTES = 9  # its width and two steps
# Steps tried for each unit, relative to the normal variable's.
_TRIED = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75)


class Packed(NamedTuple):
  """A Lora of one matrix, quantised to few bits, in host memory.

  Attributes:
    shape: (in, out).
    bits: (r,) uint8, bits per entry of each unit, 1 to 8.
    steps: (2, r) float32, distance of neighbouring values of a and of b.
    codes: (bytes,) uint8: the units' codes, a before b, without gaps within
      units of equal width.
  """

  shape: tuple[int, int]
  bits: np.ndarray
  steps: np.ndarray
  codes: np.ndarray

  @property
  def nbytes(self) -> int:
    """Number of bytes stored."""
    return self.bits.nbytes + self.steps.nbytes + self.codes.nbytes


def pack(lora: Lora, bits: Any = 4) -> Packed:
  """Quantises a Lora to few bits per entry.

      a_ij ≈ step_i (code_ij - 2^(bits-1) + 1/2),   code in 0..2^bits - 1

  Seven steps near the Gaussian optimum are tried for each row of a and b; the
  one of least squared error is taken. The scale is folded into a.

  Args:
    lora: a (r, in), b (r, out), scale (), of any floating dtype.
    bits: per entry, one width or (r,); a unit of 0 bits is dropped.

  Returns:
    Packed, units in the order of the Lora. It loses about `1 - (1 - LOST)²` of
    each unit's energy. O(r (in + out)) on the host.

  Raises:
    ValueError: bits outside 0..8, not one width per unit, a stacked Lora, or
      one that is not finite.

  Example:
    >>> a, b = np.ones((2, 3)), np.array([[1.0, -1.0], [0.5, 0.5]])
    >>> packed = pack(Lora(a, b, np.float32(1)), 1)
    >>> packed.codes.nbytes, unpack(packed).b.round(1)
    (2, array([[ 1. , -1. ],
           [ 0.5,  0.5]], dtype=float32))

  References:
    Max (1960), Quantizing for minimum distortion.
  """
  a, b, widths = _checked(lora, bits)
  steps = np.zeros((2, len(widths)), np.float32)
  streams = []
  for width in np.unique(widths):
    units = np.flatnonzero(widths == width)
    both = [_round(side[units], int(width)) for side in (a, b)]
    steps[:, units] = [step for step, _ in both]
    codes = np.concatenate([code for _, code in both], axis=1)
    streams.append(_join(codes.ravel(), int(width)))
  joined = np.concatenate(streams) if streams else np.zeros(0, np.uint8)
  return Packed(
    (a.shape[1], b.shape[1]), widths.astype(np.uint8), steps, joined
  )


def unpack(packed: Packed) -> Lora:
  """Converts a packed Lora back to float32 factors.

  Args:
    packed: from `pack`.

  Returns:
    Lora of NumPy arrays: a (r, in), b (r, out) float32, scale 1.

  Example:
    >>> lora = Lora(np.eye(2, 3), np.eye(2), np.float32(1))
    >>> unpack(pack(lora, 8)).a.shape
    (2, 3)
  """
  m, n = packed.shape
  values = np.zeros((len(packed.bits), m + n), np.float32)
  start = 0
  for width in np.unique(packed.bits):
    units = np.flatnonzero(packed.bits == width)
    count = len(units) * (m + n)
    end = start + -(-count * int(width) // 8)
    codes = _split(packed.codes[start:end], int(width), count)
    values[units] = codes.reshape(len(units), -1) - (2.0 ** (width - 1.0) - 0.5)
    start = end
  a = values[:, :m] * packed.steps[0][:, None]
  b = values[:, m:] * packed.steps[1][:, None]
  return Lora(a, b, np.float32(1))  # type: ignore[arg-type]


def bits_within(
  spectra: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, int]],
  max_bytes: int,
) -> dict[str, np.ndarray]:
  """Chooses bit widths that minimise the squared error for a number of bytes.

      minimise Σ σ² lost(bits),   lost = 1 - (1 - LOST[bits])²

  Every further bit of a unit gains less than the one before, so bits are spent
  in the order of gain per byte, which is optimal up to the last unit. Units
  that gain least get 0 bits, so this chooses the ranks as well.

  Args:
    spectra: path -> (r,) singular values, descending.
    shapes: path -> (in, out).
    max_bytes: of all packed factors together.

  Returns:
    {path: (r,) int}, bits per entry of each unit, 0 to 8.

  Raises:
    ValueError: the paths differ, or the budget is below 1.

  Example:
    >>> bits_within({"q": [9.0, 3.0, 0.1]}, {"q": (64, 64)}, 120)
    {'q': array([4, 2, 0])}

  References:
    Reverse water-filling: Cover and Thomas, Elements of Information Theory,
    theorem 10.3.3, with a real quantiser's error instead of the exponential.
  """
  if set(spectra) != set(shapes):
    odd = sorted(set(spectra) ^ set(shapes))
    raise ValueError(f"spectra and shapes differ in {name_some(odd)}.")
  if max_bytes < 1:
    raise ValueError(f"max_bytes must be at least 1, got {max_bytes}.")
  gains = -np.diff(1 - (1 - np.array(LOST)) ** 2)
  sigmas = {path: np.asarray(s, np.float64) for path, s in spectra.items()}
  worth = np.concatenate(
    [np.square(s)[:, None] * gains for s in sigmas.values()]
  )
  entry = np.repeat(
    [sum(shapes[path]) / 8 for path in sigmas],
    [len(s) for s in sigmas.values()],
  )
  cost = np.repeat(entry[:, None], MAX_BITS, axis=1)
  cost[:, 0] += _UNIT_BYTES
  # The first bit costs more per gain; the second must not come before it.
  rate = np.minimum.accumulate(worth / cost, axis=1).ravel()
  order = np.argsort(-rate, kind="stable")
  order = order[rate[order] > 0]
  bought = np.zeros(rate.size, int)
  bought[order[np.cumsum(cost.ravel()[order]) <= max_bytes]] = 1
  counts = bought.reshape(-1, MAX_BITS).sum(1)
  ends = np.cumsum([len(s) for s in sigmas.values()])[:-1]
  return dict(zip(sigmas, np.split(counts, ends), strict=True))


_PARTS = ("bits", "steps", "codes")
# Key of the shapes in the metadata of a file.
SHAPES = "jlora_packed_shapes"


def save_packed(path: str | os.PathLike, packed: Mapping[str, Packed]) -> None:
  """Writes packed Loras to a safetensors file, whole or not at all.

  Args:
    path: the file.
    packed: path -> Packed, stored as `<path>.bits`, `.steps` and `.codes`; the
      shapes are in the file's metadata.

  Raises:
    ValueError: `packed` is empty.

  Example:
    >>> import tempfile
    >>> from jlora.loras import Lora
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   lora = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))
    ...   save_packed(f"{folder}/x.safetensors", {"w": pack(lora, 2)})
    ...   load_packed(f"{folder}/x.safetensors")["w"].shape
    (3, 2)
  """
  if not packed:
    raise ValueError("There is no packed Lora to save.")
  tensors = {
    f"{name}.{part}": getattr(module, part)
    for name, module in packed.items()
    for part in _PARTS
  }
  shapes = {name: module.shape for name, module in packed.items()}
  write_safetensors(path, tensors, {SHAPES: json.dumps(shapes)})


def load_packed(path: str | os.PathLike) -> dict[str, Packed]:
  """Reads the packed Loras of a file.

  `unpack` converts them to Loras, which `save_peft` can export.

  Args:
    path: a file that `save_packed` wrote.

  Returns:
    path -> Packed.

  Raises:
    ValueError: not such a file, a tensor missing or left over, or codes that do
      not fit their bits and shape; names up to three.

  Example:
    >>> load_packed("/nowhere.safetensors")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere.safetensors does not exist
  """
  checkpoint = open_checkpoint(path)
  shapes = packed_shapes(checkpoint)
  expected = {f"{name}.{part}" for name in shapes for part in _PARTS}
  if odd := sorted(expected ^ set(checkpoint)):
    raise ValueError(f"{path}: missing or left over: {name_some(odd)}.")
  found = {
    name: Packed(shape, *(checkpoint[f"{name}.{part}"] for part in _PARTS))
    for name, shape in shapes.items()
  }
  if wrong := [name for name, one in found.items() if not _is_whole(one)]:
    raise ValueError(
      f"{path}: the codes of {name_some(wrong)} do not fit their bits and "
      "shape; the file is damaged."
    )
  return found


_SIDES = Kind(
  "[in, out] of integers, at least 1",
  lambda value: list_of(COUNT).fits(value) and len(value) == 2,
)


def packed_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
  """Reads the shapes of the matrices whose packed Loras a file holds.

  Args:
    checkpoint: the file, open.

  Returns:
    {path: (in, out)}.

  Raises:
    ValueError: it holds none, or they are damaged.

  Example:
    >>> import tempfile
    >>> lora = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_packed(f"{folder}/x.safetensors", {"w": pack(lora, 2)})
    ...   packed_shapes(open_checkpoint(f"{folder}/x.safetensors"))
    {'w': (3, 2)}
  """
  text = checkpoint.metadata.get(SHAPES)
  place = f"{checkpoint.path}: {SHAPES}"
  if text is None:
    raise ValueError(
      f"{checkpoint.path} holds no packed Loras: {SHAPES} is missing."
    )
  found = check_fields(parse_json(text, place), {}, place)
  check_fields(found, dict.fromkeys(found, _SIDES), place)
  return {name: (n_in, n_out) for name, (n_in, n_out) in found.items()}


def _checked(lora: Lora, bits: Any) -> tuple[np.ndarray, ...]:
  """Returns scale times a, b and the widths, without units of 0 bits."""
  if lora.a.ndim != 2 or lora.b.ndim != 2:
    raise ValueError(
      f"pack takes one matrix's Lora, got a {lora.a.shape}, b {lora.b.shape}; "
      "pack the members of a stack one by one."
    )
  with np.errstate(over="ignore", invalid="ignore"):
    a = np.asarray(lora.a, np.float32) * np.float32(lora.scale)
  b = np.asarray(lora.b, np.float32)
  for side, factor in (("a, times the scale,", a), ("b", b)):
    if not is_finite(factor):
      raise not_finite(side, factor, np.float32)
  widths = np.asarray(bits)
  if widths.shape not in ((), (len(a),)) or widths.dtype.kind not in "iu":
    raise ValueError(
      f"bits must be one whole number or {len(a)}, one a unit, got "
      f"{widths.dtype} of shape {widths.shape}."
    )
  if widths.size and not (widths.min() >= 0 and widths.max() <= MAX_BITS):
    raise ValueError(
      f"bits must be 0 to {MAX_BITS}, got {widths.min()} to {widths.max()}."
    )
  widths = np.broadcast_to(widths, len(a))
  kept = widths > 0
  return a[kept], b[kept], widths[kept]


def _round(rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the best steps (k,) and codes (k, n) of rows."""
  deviation = np.sqrt(np.mean(np.square(rows), axis=1))
  best = np.full(len(rows), np.inf)
  steps = np.ones(len(rows), np.float32)
  codes = np.zeros(rows.shape, np.uint8)
  for share in _TRIED:
    step = deviation * np.float32(share * STEPS[width])
    step = np.where(step > 0, step, np.float32(1))[:, None]
    half = 2 ** (width - 1)
    found = np.clip(np.floor(rows / step) + half, 0, 2 * half - 1)
    lost = np.sum(np.square(rows - (found - half + 0.5) * step), axis=1)
    better = lost < best
    best[better] = lost[better]
    steps[better] = step[better, 0]
    codes[better] = found[better].astype(np.uint8)
  # No code stands for 0, so a row of zeros gets a step of 0.
  return np.where(deviation > 0, steps, 0.0).astype(np.float32), codes


def _join(codes: np.ndarray, width: int) -> np.ndarray:
  """Packs codes into bytes, their lowest bits first."""
  places = np.arange(width, dtype=np.uint8)
  return np.packbits((codes[:, None] >> places) & 1)


def _split(stream: np.ndarray, width: int, count: int) -> np.ndarray:
  """Unpacks the first codes of a stream of bits."""
  bits = np.unpackbits(stream, count=count * width).reshape(count, width)
  weights = 1 << np.arange(width)
  return bits @ weights


def _is_whole(packed: Packed) -> bool:
  """Returns whether bits, steps, codes and shape fit each other."""
  bits, sides = packed.bits, sum(packed.shape)
  counts = [np.sum(bits == width) * width for width in range(1, MAX_BITS + 1)]
  return (
    bits.ndim == 1
    and bits.dtype == packed.codes.dtype == np.uint8
    and bool(np.all((bits >= 1) & (bits <= MAX_BITS)))
    and packed.steps.shape == (2, len(bits))
    and packed.codes.shape == (sum(-(-int(n) * sides // 8) for n in counts),)
  )
