# SPDX-License-Identifier: Apache-2.0
"""What an adapter keeps of the base it was made on, to know another one by.

base ─► a sample of each weight ─► hash, singular values; norm ─► adapter's file

A weight is sampled at up to 64 x 64 places of a regular grid, and of leading
axes (layers, experts) at up to four, so that an open checkpoint is not read
whole to be compared.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.documents import (
  REAL,
  SIZE,
  TEXT,
  check_fields,
  list_of,
  parse_json,
  record_of,
)
from jlora.checkpoints.hub import locate
from jlora.formats.peft.layouts import TENSORS
from jlora.messages import name_some
from jlora.numerics.backends import library_of
from jlora.numerics.sums import sums_of
from jlora.paths import arrays_of, flatten

#: Path -> {shape, norm, singular_values, hash}.
Fingerprint = dict[str, dict[str, Any]]

#: The entry of a safetensors header that holds it. Readers of PEFT's folders
#: look at tensors alone; of adapter_config.json PEFT refuses unknown entries.
ENTRY = "jlora_base"

_SIDE, _LEAD = 64, 4  # places along the last two axes, and along others
_VALUES = 4
_DIGITS = 6
_NOTHING = 1e-5  # a singular value of this share of the first
_RECORD = record_of(
  {
    "shape": list_of(SIZE),
    "norm": REAL,
    "singular_values": list_of(REAL),
    "hash": TEXT,
  }
)


class OtherBaseWarning(UserWarning):
  """An adapter meets weights that are not those it was made on."""


def fingerprint(params: Any, paths: Iterable[str]) -> Fingerprint:
  """Describes weights so that others are told from them.

  Args:
    params: a pytree of arrays or an open checkpoint.
    paths: which parameters: those that an adapter changes.

  Returns:
    Path -> `shape`; `norm`, Frobenius, of all numbers, to six digits;
    `singular_values`, the first four of the sampled numbers as a matrix (of the
    whole weight they would take as long as an extraction); `hash`, of the
    sampled numbers rounded to bfloat16. So a base and its copy in bfloat16 have
    the same hash, and one in float16 or four bits has another. Some 200 bytes
    for each as JSON. Reads every number once, one parameter in float32 at a
    time. On the host: not for use under `jit`.

  Raises:
    ValueError: parameters that are not there, or not finite.

  Example:
    >>> found = fingerprint({"w": np.eye(3, dtype=np.float32)}, ["w"])["w"]
    >>> found["shape"], found["norm"], found["singular_values"]
    ([3, 3], 1.73205, [1.0, 1.0, 1.0])
  """
  shapes, read = _reader(params)
  paths = list(paths)
  lacking = [path for path in paths if path not in shapes]
  if lacking:
    raise ValueError(
      f"{len(lacking)} parameters are not there: {name_some(lacking)}; there "
      f"are {name_some(shapes)}."
    )
  return {path: describe_weight(path, read(path, ())) for path in paths}


def check_fingerprint(
  known: Mapping[str, Mapping[str, Any]] | None,
  params: Any,
  *,
  name: str = "The adapter",
) -> list[str]:
  """Warns where weights are not those that an adapter was made on.

  Args:
    known: of `fingerprint` or `read_fingerprint`; None or {} says nothing.
    params: a pytree of arrays or an open checkpoint, with paths as in `known`.
      Parameters that only one of both has are not compared.
    name: what the adapter is called.

  Returns:
    Paths of the weights that differ. Of each only the sample is read, of the
    first three that differ all: a change of few numbers elsewhere is not seen.

  Warns:
    OtherBaseWarning: once, naming three of them.

  Example:
    >>> w = np.eye(3, dtype=np.float32)
    >>> check_fingerprint(fingerprint({"w": w}, ["w"]), {"w": w})
    []
  """
  if not known:
    return []
  shapes, read = _reader(params)
  compared = [path for path in known if path in shapes]
  others = [
    path for path in compared if _differs(known[path], path, shapes, read)
  ]
  if others:
    named = [
      f"{path} ({_how(known[path], shapes[path], read(path, ()))})"
      for path in others[:3]
    ]
    warnings.warn(
      f"{name} was made on another base: {len(others)} of {len(compared)} "
      f"weights are not what they were, {name_some([*named, *others[3:]])}. "
      "Give the base it was made on, or carry it over with `jlora port`.",
      OtherBaseWarning,
      stacklevel=2,
    )
  return others


def read_fingerprint(folder: str | os.PathLike) -> Fingerprint:
  """Reads what a PEFT folder says of its base.

  Args:
    folder: holds `adapter_model.safetensors`.

  Returns:
    Path in the base -> as from `fingerprint`; {} if nothing is said, as in
    folders that PEFT itself wrote.

  Raises:
    ValueError: no such file, or an entry that is damaged.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   write_safetensors(f"{tmp}/{TENSORS}", {"w": np.ones(2)})
    ...   read_fingerprint(tmp)
    {}
  """
  file = locate(folder) / TENSORS
  return parse_fingerprint(open_checkpoint(file).metadata, str(file))


def parse_fingerprint(metadata: Mapping[str, str], place: str) -> Fingerprint:
  """Reads a fingerprint out of a safetensors header's metadata.

  Args:
    metadata: of the header.
    place: the file, for errors.

  Returns:
    As `read_fingerprint`.

  Raises:
    ValueError: it is damaged.

  Example:
    >>> parse_fingerprint({"format": "pt"}, "x.safetensors")
    {}
  """
  if ENTRY not in metadata:
    return {}
  place = f"{place}: {ENTRY}"
  found = parse_json(metadata[ENTRY], place)
  kinds = dict.fromkeys(found, _RECORD) if isinstance(found, dict) else {}
  return check_fields(found, kinds, place)


def metadata_of(
  known: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, str]:
  """Returns the entry of a safetensors header for a fingerprint.

  Args:
    known: of `fingerprint`; None or {} gives no entry.

  Returns:
    For `stream_safetensors`.

  Example:
    >>> metadata_of({})
    {}
  """
  if not known:
    return {}
  return {ENTRY: json.dumps(known, sort_keys=True, separators=(",", ":"))}


def sample_of(shape: tuple[int, ...]) -> tuple[slice, ...]:
  """Returns the places of a weight that are looked at.

  Args:
    shape: of the weight.

  Returns:
    A slice for each axis.

  Example:
    >>> sample_of((128, 100))
    (slice(None, None, 2), slice(None, None, 2))
  """
  axes = len(shape)
  most = [_LEAD if axis < axes - 2 else _SIDE for axis in range(axes)]
  steps = (-(-size // n) for size, n in zip(shape, most, strict=True))
  return tuple(slice(None, None, max(step, 1)) for step in steps)


def describe_weight(path: str, whole: Any) -> dict[str, Any]:
  """Describes one weight.

  Args:
    path: of the weight, for errors.
    whole: an array of NumPy or JAX, any floating dtype.

  Returns:
    An entry of a Fingerprint.

  Raises:
    ValueError: numbers that are not finite.

  Example:
    >>> describe_weight("w", np.ones((2, 2)))["norm"]
    2.0
  """
  sample = np.asarray(whole[sample_of(whole.shape)])
  return describe_sample(path, sample, whole.shape, _norm(whole))


def describe_sample(
  path: str, sample: np.ndarray, shape: tuple[int, ...], norm: float
) -> dict[str, Any]:
  """Describes a weight whose sample and norm are known.

  Args:
    path: of the weight, for errors.
    sample: the numbers at `sample_of(shape)`, any floating dtype.
    shape: of the weight.
    norm: Frobenius norm of the weight.

  Returns:
    An entry of a Fingerprint.

  Raises:
    ValueError: numbers that are not finite.

  Example:
    >>> describe_sample("w", np.ones((2, 2)), (2, 2), 2.0)["singular_values"]
    [2.0, 0.0]
  """
  sample = sample.astype(np.float32, copy=False)
  if not (np.isfinite(sample).all() and np.isfinite(norm)):
    raise ValueError(f"{path} holds numbers that are not finite.")
  flat = sample.reshape(-1, sample.shape[-1] if sample.ndim else 1)
  values = [*np.linalg.svd(flat, compute_uv=False)] if flat.size else []
  told = [_rounded(float(x)) for x in values[:_VALUES]]
  return {
    "shape": list(shape),
    "norm": _rounded(norm),
    # What rounding leaves where there is nothing is not told.
    "singular_values": [x if x > _NOTHING * told[0] else 0.0 for x in told],
    "hash": _hash(sample),
  }


def _rounded(x: float) -> float:
  """Rounds to the digits that are kept."""
  return float(f"{x:.{_DIGITS}g}")


def _hash(sample: np.ndarray) -> str:
  """Hashes numbers as bfloat16 has them; -0 is 0."""
  with np.errstate(over="ignore", invalid="ignore"):
    coarse = (sample + np.float32(0)).astype(ml_dtypes.bfloat16)
  words = np.ascontiguousarray(coarse).view(np.uint16).astype("<u2")
  return hashlib.sha256(words.tobytes()).hexdigest()[:16]


def _reader(params: Any) -> tuple[Mapping[str, Any], Callable[[str, Any], Any]]:
  """Returns the shapes of all parameters, and (path, index) -> numbers."""
  if hasattr(params, "spec"):
    shapes = {path: tuple(x.shape) for path, x in params.spec.items()}
    read = getattr(params, "read", None)
    return shapes, read or (lambda path, index: params[path][index])
  leaves = arrays_of(flatten(params))
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  return shapes, lambda path, index: leaves[path][index]


def _differs(known: Mapping[str, Any], path: str, shapes, read) -> bool:
  """Returns whether a weight is another, by its shape and its sample."""
  shape = shapes[path]
  if list(shape) != known["shape"]:
    return True
  sample = np.asarray(read(path, sample_of(shape)))
  return _hash(sample.astype(np.float32, copy=False)) != known["hash"]


def _how(known: Mapping[str, Any], shape: tuple[int, ...], whole: Any) -> str:
  """Says how a weight differs."""
  if list(shape) != known["shape"]:
    return f"shape {tuple(known['shape'])}, here {shape}"
  return f"norm {known['norm']:g}, here {_rounded(_norm(whole)):g}"


def _norm(x: Any) -> float:
  """Returns the Frobenius norm of an array of NumPy or JAX."""
  if not np.size(x):
    return 0.0
  sums = sums_of(library_of(x).asarray(x, jnp.float32))
  return float(sums.squares) ** 0.5 * float(sums.unit)
