# SPDX-License-Identifier: Apache-2.0
"""Weights packed in few bits: read by published formulas, or else named.

    MXFP4          w = value[code] 2^(scale - 127)      32 codes share a scale
    bitsandbytes   w = value[code] absmax               64 codes, say, share one
    int8           w = code scale[row] / 127

`packed_formats` has those that are not read.

References:
  Open Compute Project, Microscaling Formats (MX) 1.0: FP4 E2M1 and E8M0.
  Dettmers et al. (2023), QLoRA: NF4 (appendix E) and double quantisation.
  Dettmers et al. (2022), LLM.int8().
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.checkpoints.documents import (
  NUMBER,
  SIZE,
  Kind,
  check_fields,
  list_of,
  parse_json,
)
from jlora.checkpoints.safetensors import TensorSpec
from jlora.messages import name_some
from jlora.selection import is_floating

# A stored tensor's name and region -> the array.
Read = Callable[[str, Sequence[range]], np.ndarray]
Region = Sequence[range]

# What four bits stand for. FP4 is E2M1; a code of 8 and more is negative.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4 = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
# Of bitsandbytes: quantiles of a normal distribution, and its own E2M1.
_BNB_E2M1 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
VALUES = {
  "nf4": np.array(
    [
      *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
      *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
      *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
      *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
      *(0.7229568362236023, 1.0),
    ],
    np.float32,
  ),
  "fp4": np.array([*_BNB_E2M1, *(-x for x in _BNB_E2M1)], np.float32) / 12,
}
_GROUP = 32  # codes that share a scale in MXFP4
_FLOATS = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
  "float32": np.dtype(np.float32),
}


class PackedWeight(NamedTuple):
  """A weight that is stored as codes and scales.

  Attributes:
    spec: its shape and dtype when read; the bytes are those stored.
    parts: names of the tensors that it is made of.
    read: (read, region) -> the values of a region of it.
  """

  spec: TensorSpec
  parts: tuple[str, ...]
  read: Callable[[Read, Region], np.ndarray]


def find_packed(
  stored: Mapping[str, TensorSpec], read: Read
) -> dict[str, PackedWeight]:
  """Finds the weights of a checkpoint that are packed and can be read.

  Args:
    stored: name -> TensorSpec of all that is stored.
    read: reads a region of a stored tensor; called for the small descriptions
      that bitsandbytes keeps beside each weight of four bits.

  Returns:
    {name of the weight: PackedWeight}.

  Raises:
    ValueError: a description or a scale that does not fit its weight.

  Example:
    >>> codes = TensorSpec((4, 1, 16), np.dtype(np.uint8), 64)
    >>> scales = TensorSpec((4, 1), np.dtype(np.uint8), 4)
    >>> found = find_packed({"w_blocks": codes, "w_scales": scales}, None)
    >>> found["w"].spec.shape
    (4, 32)
  """
  found = {}
  for name, spec in stored.items():
    if match := _BLOCKS.fullmatch(name):
      scales = f"{match[1]}{match[2]}scales"
      if _is_mxfp4(spec, stored.get(scales)):
        found[match[1]] = _mxfp4(stored, name, scales, match[2] == "_")
    elif match := _STATE.fullmatch(name):
      if match[1] in stored:
        found[match[1]] = _four_bits(stored, match[1], name, read)
    elif match := _SCB.fullmatch(name):
      weight = f"{match[1]}weight"
      if weight in stored and stored[weight].dtype == np.int8:
        found[weight] = _eight_bits(stored, weight, name, read)
  clashing = [
    name for name, one in found.items() if _is_twice(name, one, stored)
  ]
  if clashing:
    raise ValueError(
      f"{name_some(clashing)} is there quantised and as it was; delete one"
    )
  return found


# Codes, and scales beside them: of gpt-oss by transformers, and by OpenAI.
_BLOCKS = re.compile(r"(.+)([._])blocks")
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_SCB = re.compile(r"(.*)SCB")


def _is_twice(name: str, one: PackedWeight, stored) -> bool:
  """Returns whether a packed weight's name is also that of another tensor."""
  return name in stored and name not in one.parts


def _whole(spec: TensorSpec) -> list[range]:
  """Returns the region of a whole tensor."""
  return [range(n) for n in spec.shape]


def _spec_of(stored, parts, weight: str, shape, dtype) -> TensorSpec:
  """Returns the spec of a packed weight; it has no place of its own."""
  nbytes = sum(stored[part].nbytes for part in parts)
  return TensorSpec(tuple(shape), dtype, nbytes, stored[weight].file)


def _is_mxfp4(codes: TensorSpec, scales: TensorSpec | None) -> bool:
  """Returns whether two tensors are codes of MXFP4 and their scales."""
  return (
    scales is not None
    and codes.dtype == scales.dtype == np.uint8
    and len(codes.shape) >= 3
    and codes.shape[-1] == _GROUP // 2
    and codes.shape[:-1] == scales.shape
  )


def _mxfp4(stored, blocks: str, scales: str, is_hf: bool) -> PackedWeight:
  """Describes a weight of MXFP4.

  Experts that transformers names come as (expert, in, out), as its own class
  keeps them; all else in the order of the codes.
  """
  *outer, groups, _ = stored[blocks].shape
  shape = [*outer, groups * _GROUP]
  swap = is_hf and len(shape) == 3
  if swap:
    shape[-2:] = shape[:-3:-1]
  spec = _spec_of(stored, (blocks, scales), blocks, shape, _FLOATS["bfloat16"])
  read = functools.partial(_read_mxfp4, blocks, scales, swap)
  return PackedWeight(spec, (blocks, scales), read)


def _read_mxfp4(blocks, scales, swap, read: Read, region: Region) -> np.ndarray:
  """Reads a region of a weight of MXFP4."""
  *outer, last = (*region[:-2], *region[:-3:-1]) if swap else region
  first, end = _covering(last, _GROUP)
  groups = range(first, end)
  codes = read(blocks, [*outer, groups, range(_GROUP // 2)])
  powers = np.ldexp(np.float32(1), np.arange(255, dtype=np.int32) - 127)
  powers = np.append(powers, np.float32(np.nan))
  factors = powers[read(scales, [*outer, groups])]
  pairs = np.stack([np.tile(_MXFP4, 16), np.repeat(_MXFP4, 16)], -1)
  # Where the last axes are exchanged the first one is split, for a small peak.
  shape = [*(len(r) for r in outer), len(last)]
  out = np.empty(shape, _FLOATS["bfloat16"])
  for at in range(shape[0]):
    values = pairs[codes[at]]
    with np.errstate(over="ignore"):  # infinity is told by who reads it
      values *= factors[at][..., None, None]
    flat = values.reshape(*shape[1:-1], len(groups) * _GROUP)
    out[at] = flat[..., _within(last, first * _GROUP)]
  return np.swapaxes(out, -1, -2) if swap else out


def _covering(indices: range, size: int) -> tuple[int, int]:
  """Returns the first group that some indices need, and one past the last."""
  if not indices:
    return 0, 0
  return indices[0] // size, indices[-1] // size + 1


def _within(indices: range, start: int) -> slice:
  """Returns the slice of indices in an array that begins at `start`."""
  if not indices:
    return slice(0, 0)
  return slice(indices[0] - start, indices[-1] - start + 1, indices.step)


class _State(NamedTuple):
  """How bitsandbytes quantised a weight to four bits; parts are names."""

  weight: str
  absmax: str
  shape: tuple[int, ...]
  values: np.ndarray
  block: int
  nested: tuple[str, str, int, float] | None


def _four_bits(stored, weight: str, name: str, read: Read) -> PackedWeight:
  """Describes a weight of bitsandbytes in four bits."""
  said = _read_state(stored, weight, name, read)
  kind, dtype = said["quant_type"], _FLOATS[said["dtype"]]
  shape, block = tuple(said["shape"]), said["blocksize"]
  inner, values = ("nested_blocksize", "nested_offset"), VALUES[kind]
  nested = tuple(said[k] for k in inner) if inner[0] in said else None
  absmax, more = f"{weight}.absmax", []
  if nested:
    more = [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
  maps = tuple(n for n in (f"{weight}.quant_map",) if n in stored)
  parts = (weight, absmax, *more, *maps, name)
  if lacking := [part for part in parts if part not in stored]:
    raise ValueError(
      f"{weight!r} is quantised by bitsandbytes and lacks {name_some(lacking)}"
    )
  count = math.prod(shape)
  blocks = -(-count // max(block, 1))
  if block < 2 or block % 2 or stored[weight].nbytes < -(-count // 2):
    raise ValueError(
      f"{weight!r} is quantised by bitsandbytes in blocks of {block} to the "
      f"shape {shape}, which {stored[weight].nbytes} bytes do not hold"
    )
  _check_scales(stored, absmax, blocks, np.uint8 if nested else None)
  own = None
  if nested:
    own = (more[0], more[1], nested[0], nested[1])
    _check_scales(stored, more[0], -(-blocks // nested[0]))
    _check_scales(stored, more[1], 256)
  for part in maps:
    is_table = math.prod(stored[part].shape) == len(values)
    table = read(part, _whole(stored[part])).reshape(-1) if is_table else values
    if not is_table or not abs(table - values).max() <= 1e-3:
      raise ValueError(
        f"{weight!r} is quantised by bitsandbytes, but {part!r} is not the "
        f"table of {kind}"
      )
  state = _State(weight, absmax, shape, values, block, own)
  spec = _spec_of(stored, parts, weight, shape, dtype)
  reader = functools.partial(_read_four_bits, stored, state, dtype)
  return PackedWeight(spec, parts, reader)


# What bitsandbytes writes beside a weight; blocks of nested scales are of 256.
_BLOCK = Kind(
  "an even integer, 2 to 65536",
  lambda n: type(n) is int and n in range(2, 65537, 2),
)
_DESCRIPTION = {
  "quant_type": Kind(" or ".join(VALUES), lambda name: name in [*VALUES]),
  "dtype": Kind(" or ".join(_FLOATS), lambda name: name in [*_FLOATS]),
  "shape": list_of(SIZE),
  "blocksize": _BLOCK,
}
_NESTED = {"nested_blocksize": _BLOCK, "nested_offset": NUMBER}
_LARGEST = 2**16  # bytes of such a description


def _read_state(stored, weight: str, name: str, read: Read) -> dict[str, Any]:
  """Reads how bitsandbytes quantised a weight to four bits."""
  try:
    if stored[name].nbytes > _LARGEST:
      raise ValueError(f"it has {stored[name].nbytes} bytes")
    text = read(name, _whole(stored[name])).tobytes().decode()
    said = check_fields(parse_json(text, name), {}, name)
    fields = _DESCRIPTION | (_NESTED if _NESTED.keys() & said else {})
    return check_fields(said, fields, name, required=fields)
  except ValueError as error:
    raise ValueError(
      f"{weight!r} is quantised by bitsandbytes, but {name!r} is damaged and "
      f"does not say how: {error}. Save the model again, or dequantise it "
      "first by model.dequantize() of transformers"
    ) from error


def _check_scales(stored, name: str, count: int, dtype: Any = None) -> None:
  """Raises unless a tensor has so many numbers, floats if no dtype is given."""
  spec = stored[name]
  is_kind = is_floating(spec.dtype) if dtype is None else spec.dtype == dtype
  if math.prod(spec.shape) != count or not is_kind:
    raise ValueError(
      f"{name!r} of shape {spec.shape} has not one scale for each of {count} "
      f"blocks, or not {np.dtype(dtype).name if dtype else 'floats'} but "
      f"{spec.dtype}"
    )


def _read_four_bits(
  stored, state: _State, dtype, read: Read, region: Region
) -> np.ndarray:
  """Reads a region of a weight of four bits, in whole rows of its codes."""
  shape, block = state.shape, state.block
  row = math.prod(shape[1:])
  rows = region[0] if region else range(1)
  start, end = (rows[0] * row, (rows[-1] + 1) * row) if rows else (0, 0)
  first, last = _covering(range(start, end), block)
  codes = _bytes_of(
    stored, state.weight, read, first * block // 2, last * block // 2
  )
  pairs = np.stack([np.repeat(state.values, 16), np.tile(state.values, 16)], -1)
  flat = np.zeros((last - first) * block, np.float32)
  flat[: 2 * codes.size] = pairs[codes].reshape(-1)[: flat.size]
  scales = _absmax(stored, state, read)[first:last]
  flat = (flat.reshape(-1, block) * scales[:, None]).reshape(-1)
  flat = flat[start - first * block : end - first * block]
  array = flat.reshape((-1, *shape[1:]) if len(rows) else (0, *shape[1:]))
  array = array[:: rows.step]
  inner = tuple(slice(r.start, r.stop, r.step) for r in region[1:])
  return array[(slice(None), *inner)].astype(dtype)


def _bytes_of(
  stored, name: str, read: Read, start: int, end: int
) -> np.ndarray:
  """Reads some bytes of a tensor that has one axis longer than 1, or all."""
  spec = stored[name]
  size = spec.dtype.itemsize
  whole = _whole(spec)
  if len(whole) and len(whole[0]) * size == spec.nbytes:
    whole[0] = range(start // size, min(-(-end // size), len(whole[0])))
    offset = start // size * size
  else:
    offset = 0
  found = np.ascontiguousarray(read(name, whole)).reshape(-1).view(np.uint8)
  return found[start - offset : end - offset]


def _absmax(stored, state: _State, read: Read) -> np.ndarray:
  """Reads the scales of a weight of four bits, which may be quantised too."""
  absmax = read(state.absmax, _whole(stored[state.absmax])).reshape(-1)
  if state.nested is None:
    return absmax.astype(np.float32)
  scales, values, block, offset = state.nested
  outer = read(scales, _whole(stored[scales])).reshape(-1).astype(np.float32)
  table = read(values, _whole(stored[values])).reshape(-1).astype(np.float32)
  return table[absmax] * np.repeat(outer, block)[: absmax.size] + np.float32(
    offset
  )


def _eight_bits(stored, weight: str, scb: str, read: Read) -> PackedWeight:
  """Describes a weight of LLM.int8(), a scale for each row."""
  spec, layout = stored[weight], f"{weight}_format"
  parts = (weight, scb, *((layout,) if layout in stored else ()))
  rows = spec.shape[0] if spec.shape else 0
  if math.prod(stored[scb].shape) != rows or not is_floating(stored[scb].dtype):
    raise ValueError(
      f"{scb!r} of shape {stored[scb].shape} has not one scale for each row of "
      f"{weight!r} of shape {spec.shape}"
    )
  if layout in stored and (
    math.prod(stored[layout].shape) != 1
    or read(layout, _whole(stored[layout])).any()
  ):
    raise ValueError(
      f"{weight!r} is quantised by bitsandbytes in the tiles of a card, which "
      f"{layout!r} says; save it with bitsandbytes 0.45 or newer"
    )
  made = _spec_of(stored, parts, weight, spec.shape, _FLOATS["float32"])
  reader = functools.partial(_read_eight_bits, stored, weight, scb)
  return PackedWeight(made, parts, reader)


def _read_eight_bits(
  stored, weight: str, scb: str, read: Read, region: Region
) -> np.ndarray:
  """Reads a region of a weight of eight bits."""
  codes = read(weight, region).astype(np.float32)
  scale = read(scb, _whole(stored[scb])).reshape(-1).astype(np.float32)
  scale = scale[slice(region[0].start, region[0].stop, region[0].step)]
  return codes * (scale / np.float32(127)).reshape(-1, *[1] * (codes.ndim - 1))


_OF_ACTIVATIONS = "scale of activations, no part of the weight"
_HOW = "says how its weight is quantised"
_WHYS = (
  (r".*[._](input|output|activation|act)_scale(_ub)?", _OF_ACTIVATIONS),
  (r".*\.(scale_(input|output)|(q|k|v|kv|prob)_scale)", _OF_ACTIVATIONS),
  (r".*[._]blocks", "codes, read with their scales"),
  (r".*\.(quant_state\..*|(nested_)?quant_map|weight_format|scaled_fp8)", _HOW),
  (r"scaled_fp8|.*\.comfy_quant", _HOW),
)


def describe_companion(name: str) -> str:
  """Tells what a tensor beside a quantised weight is there for.

  Args:
    name: a key of `Checkpoint.companions`.

  Returns:
    A phrase for a report.

  Example:
    >>> describe_companion("q_proj.weight_scale_inv")
    'scale, multiplied into its weight'
  """
  return next(
    (why for rule, why in _WHYS if re.fullmatch(rule, name)),
    "scale, multiplied into its weight",
  )
