# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written: atomically, the same bytes for the same arrays."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jlora.byte_ranges import place_arrays
from jlora.safetensors_headers import Shapes, lay_out
from jlora.safetensors_headers import TensorSpec as TensorSpec
from jlora.safetensors_headers import read_header as read_header


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """A safetensors file, written whole or not at all; the same bytes each time.

  Args:
    path: the file; replaced if it exists, once the new one is complete.
    tensors: arrays by name, of any dtype the format has.
    metadata: strings to strings, stored in the header.

  Raises:
    ValueError: for a dtype the format lacks, or metadata that is not strings.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/a.safetensors", {"w": np.ones(2)})
    ...   read_header(f"{folder}/a.safetensors").spec["w"].shape
    (2,)
  """
  arrays = {name: np.asarray(array) for name, array in tensors.items()}
  spec = {name: (array.shape, array.dtype) for name, array in arrays.items()}
  stream_safetensors(path, spec, arrays.items(), metadata)


def stream_safetensors(
  path: str | os.PathLike,
  spec: Shapes,
  arrays: Iterable[tuple[str, np.ndarray | Iterator[np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """A safetensors file from arrays that come one by one, in any order.

  The header is laid out from `spec` first, so each array goes straight to its
  place: one, or part of one, is held at a time.

  Args:
    path: the file; replaced if it exists, once the new one is complete.
    spec: name -> (shape, dtype), or a TensorSpec: what the file will hold.
    arrays: (name, array) pairs, each name of `spec` exactly once. In place of
      an array an iterator of its parts, whose entries follow each other.
    metadata: strings to strings, stored in the header.

  Raises:
    ValueError: if an array is missing, given twice, not announced, or of
      another shape or dtype than announced, its parts together of another
      size. The file is then not written.

  Example:
    >>> import tempfile
    >>> spec = {"a": ((2,), np.float32), "b": ((), np.int8)}
    >>> arrays = {"b": np.int8(1), "a": np.zeros(2, np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   stream_safetensors(f"{folder}/x.safetensors", spec, arrays.items())
    ...   list(read_header(f"{folder}/x.safetensors").spec)
    ['a', 'b']
  """
  files = {Path(path): lay_out(path, spec, metadata)}
  place_arrays(files, arrays)
