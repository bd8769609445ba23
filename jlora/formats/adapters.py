# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk as lazy mappings, whatever tool wrote it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.loras import Lora
from jlora.numerics.finite import is_finite, not_finite


class Adapter(Mapping[str, Lora]):
  """An adapter's file: a mapping from modules to Loras, read on demand.

  Attributes:
    path: what was opened.
    readers: module -> what reads its Lora.
    format: the tool's name.
    family: of the model, None if not known.
    shapes: module -> shape of its weight, (out, in, *kernel); of a table of
      tokens (tokens, features), which its Lora reads by rows.
    ranks: module -> rank; where one module of the file is several of the model
      the largest that it can be.
    alphas: module -> alpha as stored, None if it has none.
    shifts: parameter -> change to add, of what is stored whole and of biases.
    whole: parameter -> new value, of what PEFT stores whole.
    metadata: of the file.
    notes: what a reader should know.
    left_out: name in the file -> why it is not here.
    parameters: modules whose name is that of the parameter itself, as in
      models of JAX.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> from jlora.formats import open_adapter
    >>> tensors = {"unet.conv_in.lora.down.weight": np.ones((1, 4, 3, 3), "f4"),
    ...            "unet.conv_in.lora.up.weight": np.ones((8, 1, 1, 1), "f4")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", tensors)
    ...   adapter = open_adapter(f"{folder}/x.safetensors")
    ...   adapter.format, adapter.shapes, adapter["unet.conv_in"].a.shape
    ('old diffusers', {'unet.conv_in': (8, 4, 3, 3)}, (1, 36))
  """

  def __init__(self, path: Path, format: str, readers: Mapping[str, Any]):
    self.path, self.format = path, format
    self.readers = dict(readers)
    self.family: str | None = None
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.ranks: dict[str, int] = {}
    self.alphas: dict[str, float | None] = {}
    self.shifts: Mapping[str, np.ndarray] = {}
    self.whole: Mapping[str, np.ndarray] = {}
    self.metadata: dict[str, str] = {}
    self.notes: list[str] = []
    self.left_out: dict[str, str] = {}
    self.parameters: frozenset[str] = frozenset()

  def __getitem__(self, module: str) -> Lora:
    lora = self.readers[module]()
    for side, factor in (("A", lora.a), ("B", lora.b)):
      if not is_finite(factor):
        raise not_finite(f"{self.path}: {module}, {side}", factor, factor.dtype)
    return lora

  def __iter__(self) -> Iterator[str]:
    return iter(self.readers)

  def __len__(self) -> int:
    return len(self.readers)

  def __repr__(self) -> str:
    return f"Adapter({str(self.path)!r}, {self.format}, {len(self)} modules)"

  def by_parameter(self) -> "Parameters":
    """Returns the same Loras by the names of the parameters they change."""
    return Parameters(self, self.parameters)


class Parameters(Mapping[str, Lora]):
  """Loras by parameters instead of modules, as the library's functions.

  Attributes:
    loras: by module.
    modules: parameter -> module.
  """

  def __init__(self, loras: Mapping[str, Lora], names: Iterable[str] = ()):
    own = set(names)
    self.loras = loras
    self.modules = {
      module if module in own else f"{module}.weight": module
      for module in loras
    }

  def __getitem__(self, name: str) -> Lora:
    return self.loras[self.modules[name]]

  def __iter__(self) -> Iterator[str]:
    return iter(self.modules)

  def __len__(self) -> int:
    return len(self.modules)
