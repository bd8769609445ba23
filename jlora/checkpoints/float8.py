# SPDX-License-Identifier: Apache-2.0
"""Turning float8 weights and their scales back into float32.

A float8 weight W is stored as codes C and a scale S in a tensor of its own:

    W = C * S        S per tensor, per row, or per block of 128 x 128

DeepSeek names the scale `<name>_scale_inv`, others `<name>_scale`, and some
that of `<module>.weight` `<module>.scale_weight`. All multiply: `inv` means
that the scale is the inverse of the factor by which the weight was multiplied
before it was rounded. Files of image models may have no scales at all: their
weights were cast, and each code is the value.

References:
  DeepSeek-V3, README_WEIGHTS.md: each 128 x 128 block times its
  weight_scale_inv; the last block of an axis may be smaller.
  comfyanonymous/ComfyUI, QUANTIZATION.md: `_quantization_metadata`, and files
  of before with the marker `scaled_fp8`.
"""

import math
import re
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

FLOAT8 = (
  np.dtype(ml_dtypes.float8_e4m3fn),
  np.dtype(ml_dtypes.float8_e5m2),
)
_FLOATS = [np.dtype(name) for name in ("bfloat16", "f2", "f4", "f8")]
_SUFFIXES = ("_scale_inv", "_scale")
_BLOCK = 128

Shapes = Mapping[str, Sequence]  # name -> (shape, dtype, ...)


def find_casts(
  tensors: Shapes, metadata: Mapping[str, str], is_told: bool
) -> set[str]:
  """Finds the float8 tensors that are values themselves, without a scale.

  Args:
    tensors: name -> (shape, dtype), or a TensorSpec, of a whole checkpoint.
    metadata: of its files.
    is_told: whether the caller says that what has no scale is a value.

  Returns:
    Names. Without being told none, unless no float8 tensor has a scale and
    nothing in the files says that they have.

  Example:
    >>> e4m3 = FLOAT8[0]
    >>> find_casts({"w": ((4, 4), e4m3)}, {}, False)
    {'w'}
    >>> some = {"w": ((4, 4), e4m3), "v": ((4, 4), e4m3), "v_scale": ((), "f4")}
    >>> find_casts(some, {}, False), find_casts(some, {}, True)
    (set(), {'w'})
  """
  weights = [
    name
    for name, (_, dtype, *_) in tensors.items()
    if dtype in FLOAT8
    and not _MARKER.fullmatch(name)
    and not _is_scale_of_codes(name, tensors)
  ]
  lone = {
    name
    for name in weights
    if not any(scale in tensors for scale in _scale_names(name))
  }
  is_scaled = ANNOUNCED in metadata or any(map(_MARKER.fullmatch, tensors))
  if not is_told and (is_scaled or len(lone) < len(weights)):
    return set()
  return lone


def pair_scales(tensors: Shapes) -> dict[str, str]:
  """Finds the scale of every float8 weight: {scale's name: weight's name}.

  Args:
    tensors: name -> (shape, dtype), or a TensorSpec, of a whole checkpoint.

  Returns:
    {scale name: weight name}. Scales of other tensors and of activations are
    left out.

  Raises:
    ValueError: for float8 weights without a scale, with two, or with one whose
      shape or dtype is not understood.

  Example:
    >>> e4m3 = FLOAT8[0]
    >>> pair_scales({"w": ((256, 200), e4m3), "w_scale": ((2, 2), "float32")})
    {'w_scale': 'w'}
  """
  paired = {}
  for name, (shape, dtype, *_) in tensors.items():
    if dtype not in FLOAT8 or _MARKER.fullmatch(name):
      continue
    if _is_scale_of_codes(name, tensors):
      continue
    found = [scale for scale in _scale_names(name) if scale in tensors]
    if len(found) != 1:
      raise ValueError(
        f"tensor {name!r} is {dtype} with {len(found)} scales, and needs one:"
        f" {name}_scale_inv or {name}_scale. Without it the codes mean"
        " nothing; store the weight in bfloat16 instead. If it was cast, so"
        " that each code is the value, say --float8=cast (float8='cast')"
      )
    scale_shape, scale_dtype, *_ = tensors[found[0]]
    if np.dtype(scale_dtype) not in _FLOATS:
      raise ValueError(f"scale {found[0]!r} is {scale_dtype}, not floating")
    if _blocks(shape, scale_shape) is None:
      raise ValueError(
        f"scale {found[0]!r} of shape {tuple(scale_shape)} fits {name!r} of"
        f" shape {tuple(shape)} neither per tensor, per row, nor per"
        f" {_BLOCK} x {_BLOCK} block"
      )
    paired[found[0]] = name
  return paired


#: ComfyUI's metadata of files whose weights have scales.
ANNOUNCED = "_quantization_metadata"
# A float8 tensor that says the same in older files.
_MARKER = re.compile(r"(.*\.)?scaled_fp8")
# Scales of what a layer reads, gives or caches: after its name, its weight's.
_OF_LAYER = re.compile(
  r"(.*?)[._]?((input|output|activation|act)_scale(_ub)?|scale_(input|output)"
  r"|(q|k|v|kv|prob)_scale|comfy_quant)"
)


def _is_scale_of_codes(name: str, tensors: Shapes) -> bool:
  """Returns whether a float8 tensor is itself a scale, of NVFP4 say."""
  weight = name.removesuffix("_scale")
  return weight != name and (
    f"{weight}_packed" in tensors
    or (weight in tensors and np.dtype(tensors[weight][1]).kind in "iu")
  )


def _scale_names(name: str) -> list[str]:
  """Lists the names that the scale of a weight may have."""
  names = [name + end for end in _SUFFIXES]
  stem = name.removesuffix("weight")
  return names if stem == name else [*names, f"{stem}scale_weight"]


def pair_other_scales(
  tensors: Shapes, paired: Mapping[str, str]
) -> dict[str, str]:
  """Finds what lies beside float8 weights and is no part of their values.

  Args:
    tensors: name -> (shape, dtype), or a TensorSpec, of a whole checkpoint.
    paired: from `pair_scales`.

  Returns:
    {name: name of a weight it belongs to}: scales of activations and of caches
    in modules that hold float8 weights, and the marker `scaled_fp8`. Empty
    where no weight is float8.

  Example:
    >>> found = {"q.weight_scale": "q.weight"}
    >>> pair_other_scales({"q.input_scale": ((), "float32")}, found)
    {'q.input_scale': 'q.weight'}
  """
  owners: dict[str, str] = {}
  for weight in paired.values():
    for end in (at for at, letter in enumerate(weight) if letter == "."):
      owners.setdefault(weight[:end], weight)
    owners.setdefault(weight, weight)
  found = {}
  for name, (shape, *_) in tensors.items() if owners else ():
    if name not in paired and _MARKER.fullmatch(name):
      found[name] = next(iter(owners.values()))
    elif name in paired or not (match := _OF_LAYER.fullmatch(name)):
      continue
    elif match[1] in owners and (not match[6] or math.prod(shape) == 1):
      found[name] = owners[match[1]]
  return found


def dequantise(
  codes: np.ndarray,
  scale: np.ndarray,
  shape: Sequence[int],
  region: Sequence[range],
) -> np.ndarray:
  """Computes the float32 values of a region of a float8 tensor.

  Args:
    codes: the region's codes, float8, of the ranges' lengths.
    scale: the scales of the whole tensor: one number; or on each axis of the
      tensor as many entries as the axis has, one, or one for each 128.
    shape: the whole tensor's shape.
    region: for each axis the range of indices that `codes` holds.

  Returns:
    float32, codes times scales, of the shape of `codes`. Besides, memory holds
    the scales of one row of blocks at full width.

  Raises:
    ValueError: if the scale's shape does not fit.

  Example:
    >>> codes = np.ones((2, 3), FLOAT8[0])
    >>> scale = np.array([[2.0], [3.0]], np.float32)
    >>> dequantise(codes, scale, (2, 3), (range(2), range(3)))
    array([[2., 2., 2.], [3., 3., 3.]], dtype=float32)
  """
  blocks = _blocks(shape, scale.shape)
  if blocks is None:
    raise ValueError(f"scales {scale.shape} do not fit a tensor {tuple(shape)}")
  out = codes.astype(np.float32)
  scale = scale.astype(np.float32)
  if math.prod(scale.shape) == 1:
    out *= scale.reshape(())
    return out
  scale = scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))
  coarse = [
    np.asarray(r, int) // b for r, b in zip(region, blocks, strict=True)
  ]
  rows = coarse[-2] if len(shape) > 1 else np.zeros(1, int)
  for axis, indices in enumerate(coarse):
    if axis != len(shape) - 2 and scale.shape[axis] > 1:
      scale = np.take(scale, indices, axis)
  if len(shape) == 1 or scale.shape[-2] == 1:
    out *= scale
  elif blocks[-2] == 1:
    out *= np.take(scale, rows, -2)
  else:
    # One row of blocks at a time, so that scales are not repeated for all rows.
    for row in np.unique(rows):
      first, last = np.searchsorted(rows, (row, row + 1))
      out[..., first:last, :] *= scale[..., row : row + 1, :]
  return out


def _blocks(
  shape: Sequence[int], scale_shape: Sequence[int]
) -> tuple[int, ...] | None:
  """Returns the entries per scale on each axis; None if shapes do not fit."""
  if math.prod(scale_shape) == 1:
    return tuple(max(n, 1) for n in shape)
  if len(scale_shape) > len(shape):
    return None
  blocks = []
  padded = (*scale_shape, *(1,) * (len(shape) - len(scale_shape)))
  for n, scales in zip(shape, padded, strict=True):
    if scales == n:
      blocks.append(1)
    elif scales == 1:
      blocks.append(max(n, 1))
    elif scales == -(-n // _BLOCK) and len(scale_shape) == len(shape):
      blocks.append(_BLOCK)
    else:
      return None
  return tuple(blocks)
