# SPDX-License-Identifier: Apache-2.0
"""Makes adapters of at most the same bytes, in many ways."""

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

import jlora
from experiments.lib.adapters import ladders
from experiments.lib.adapters.trials import WEIGHINGS, Trial, Units
from jlora import formats, ranks
from jlora.checkpoints import write_safetensors
from jlora.formats import save_packed

PLAIN = "plain SVD in bfloat16"


class Made(NamedTuple):
  """An adapter that a variant made, with its sizes.

  Attributes:
    loras: path -> Lora, as it is served.
    nbytes: bytes of its numbers, which the budget limits.
    file_bytes: bytes of its file, with the names and shapes of all tensors.
  """

  loras: Mapping[str, jlora.Lora]
  nbytes: int
  file_bytes: int


Variant = Callable[[Trial, int], Made]


def plain(trial: Trial, rank: int) -> Made:
  """Truncates the SVD of every module at one rank, in bfloat16."""
  return in_bfloat16(ladders.cut(trial.ladder.loras, rank))


def weighed(trial: Trial, rank: int, name: str) -> Made:
  """Truncates the whitened SVD of every module at one rank, in bfloat16."""
  return in_bfloat16(ladders.cut(trial.whitened(name).loras, rank))


def spread(trial: Trial, rank: int, units: Units) -> Made:
  """Chooses uneven ranks by the units' worth per byte, in bfloat16."""
  sizes = {path: 2 * sum(shape) for path, shape in trial.ladder.shapes.items()}
  chosen = ranks.budget(units.spectra, sizes, trial.max_bytes(rank))
  return in_bfloat16(ladders.cut(units.loras, chosen))


def even_bits(trial: Trial, rank: int, bits: int) -> Made:
  """Packs all modules in one bit width, with as many units as fit."""
  most = trial.max_bytes(rank)
  while True:
    loras = ladders.cut(trial.ladder.loras, rank + 1)
    size = sum(
      lora.rank * (-(-bits * (lora.a.shape[1] + lora.b.shape[1]) // 8) + 9)
      for lora in loras.values()
    )
    if size > most:
      loras = ladders.cut(trial.ladder.loras, rank)
      return in_bits(loras, dict.fromkeys(loras, bits))
    rank += 1


def spread_bits(trial: Trial, rank: int, units: Units) -> Made:
  """Chooses ranks and bit widths together, by the units' worth per byte."""
  shapes = {path: trial.ladder.shapes[path] for path in units.loras}
  bits = formats.bits_within(units.spectra, shapes, trial.max_bytes(rank))
  return in_bits(units.loras, bits)


def unweighted(trial: Trial, _: int) -> Units:
  """Returns plain SVD's units, each worth its squared singular value."""
  return Units(trial.ladder.loras, trial.ladder.spectra)


def sensitive(trial: Trial, rank: int) -> Units:
  """Returns the same units, worth the divergence measured for them."""
  costs = trial.sensitivity(rank)
  return _worth(unweighted(trial, rank), costs)


def two_sided(trial: Trial, _: int) -> Units:
  """Returns whitened units, worth nats by K-FAC.

  No layer reads the embedding, so its units have no nats: they are scaled by
  the worth of an average squared unit of the other modules.
  """
  found, plain_spectra = trial.whitened("two-sided full"), trial.ladder.spectra
  known = trial.inputs().keys() & plain_spectra.keys()
  weighed_, plain_ = (
    sum(float(np.sum(np.square(x[path], dtype=np.float64))) for path in known)
    for x in (found.spectra, plain_spectra)
  )
  spectra = {
    path: s if path in known else s * np.float32(np.sqrt(weighed_ / plain_))
    for path, s in found.spectra.items()
  }
  return Units(found.loras, spectra)


def by_channel(trial: Trial, _: int) -> Units:
  """Returns units whitened by channel; modules keep their unweighted worth.

  Weights then choose among the units of a module, but not among modules.
  """
  found, norms = trial.whitened("diagonal"), trial.ladder.spectra
  spectra = {
    path: s * np.float32(np.linalg.norm(norms[path]) / np.linalg.norm(s))
    for path, s in found.spectra.items()
  }
  return Units(found.loras, spectra)


def refined(trial: Trial, rank: int) -> Units:
  """Refines four times as many units, and factors the result."""
  loras: dict[str, jlora.Lora] = {}
  spectra: dict[str, Any] = {}
  for path, lora in trial.refined(4 * rank).items():
    factors = jlora.factoring.recompress(lora.a, lora.b, lora.rank)
    loras[path], spectra[path] = jlora.loras.from_factors(factors), factors.s
  return Units(loras, spectra)


def refined_sensitive(trial: Trial, rank: int) -> Units:
  """Returns the refined units, worth the divergence measured for them."""
  return _worth(refined(trial, rank), trial.sensitivity(rank))


def _weighed(name: str) -> Variant:
  """Returns the variant that truncates under one of `WEIGHINGS`."""
  return lambda trial, rank: weighed(trial, rank, name)


#: name -> (trial, rank of plain SVD whose bytes are the budget) -> Made.
VARIANTS: dict[str, Variant] = {
  "no adapter": lambda t, r: Made({}, 0, 0),
  PLAIN: plain,
  **{f"whitened {name}": _weighed(name) for name in WEIGHINGS},
  "ranks by squared error": lambda t, r: spread(t, r, unweighted(t, r)),
  "ranks by sensitivity": lambda t, r: spread(t, r, sensitive(t, r)),
  "ranks by two-sided error": lambda t, r: spread(t, r, two_sided(t, r)),
  "8 bits": lambda t, r: even_bits(t, r, 8),
  "4 bits": lambda t, r: even_bits(t, r, 4),
  "2 bits": lambda t, r: even_bits(t, r, 2),
  "bits by squared error": lambda t, r: spread_bits(t, r, unweighted(t, r)),
  "bits by sensitivity": lambda t, r: spread_bits(t, r, sensitive(t, r)),
  "bits by two-sided error": lambda t, r: spread_bits(t, r, two_sided(t, r)),
  "bits by squared error and whitened diagonal": lambda t, r: spread_bits(
    t, r, by_channel(t, r)
  ),
  "refined in bfloat16": lambda t, r: in_bfloat16(t.refined(r)),
  "refined at 4 x rank in bits by squared error": lambda t, r: spread_bits(
    t, r, refined(t, r)
  ),
  "refined at 4 x rank in bits by sensitivity": lambda t, r: spread_bits(
    t, r, refined_sensitive(t, r)
  ),
}
#: The variants that take minutes to make.
COSTLY = tuple(
  name for name in VARIANTS if "sensitiv" in name or "refined" in name
)


def in_bfloat16(loras: Mapping[str, jlora.Lora]) -> Made:
  """Rounds Loras to bfloat16 and counts their bytes."""
  made = {path: jax.tree.map(_rounded, lora) for path, lora in loras.items()}
  tensors = {
    f"{path}.{name}": np.asarray(getattr(lora, name))
    for path, lora in made.items()
    for name in ("a", "b")
  }
  size = size_of_file(lambda path: write_safetensors(path, tensors))
  return Made(made, sum(lora.nbytes for lora in made.values()), size)


def in_bits(loras: Mapping[str, jlora.Lora], bits: Mapping[str, Any]) -> Made:
  """Packs and unpacks Loras, and counts their packed bytes."""
  packed = {
    path: formats.pack(lora, bits[path]) for path, lora in loras.items()
  }
  made = {path: formats.unpack(x) for path, x in packed.items()}
  size = size_of_file(lambda path: save_packed(path, packed))
  return Made(made, sum(x.nbytes for x in packed.values()), size)


def size_of_file(save: Callable[[str], Any]) -> int:
  """Counts the bytes that `save` writes to a path."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "adapter.safetensors")
    save(path)
    return os.path.getsize(path)


def _rounded(x: Any) -> Any:
  """Rounds factors to bfloat16; leaves scales as they are."""
  x = np.asarray(x)
  return x.astype(ml_dtypes.bfloat16) if x.ndim else x


def _worth(units: Units, costs: Mapping[str, float]) -> Units:
  """Multiplies the worth of a module's units by its cost."""
  return Units(
    units.loras,
    {path: s * np.sqrt(costs[path]) for path, s in units.spectra.items()},
  )
