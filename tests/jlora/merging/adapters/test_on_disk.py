# SPDX-License-Identifier: Apache-2.0
"""Adapters of every method go to a PEFT folder and come back the same."""

import jax
import numpy as np
import pytest

from jlora import formats, merging
from jlora.loras import Lora, dense
from tests.helpers.small_pairs import draw

IN, OUT = 12, 8
NAMES = [
  f"model.layers.{at}.self_attn.{x}_proj.weight" for at in (0, 1) for x in "qv"
]
LIKE = {name: np.zeros((OUT, IN), np.float32) for name in NAMES}


def adapter(seed):
  """Ranks and scales differ between modules; the second has one module less."""
  return {
    name: Lora(
      draw(1 + at, IN, seed=seed + at),
      draw(1 + at, OUT, seed=seed + at + 50),
      np.float32(0.5 + at),
    )
    for at, name in enumerate(NAMES[: 4 - seed])
  }


ADAPTERS = [adapter(0), adapter(1)]
METHODS = {
  "mix": lambda: merging.mix(
    ADAPTERS, merging.init_weights(ADAPTERS, [0.3, -1.5])
  ),
  "zip_columns": lambda: merging.zip_columns(
    ADAPTERS, merging.init_columns(ADAPTERS, [0.3, -1.5])
  ),
  "lego": lambda: {
    name: merging.lego([own[name] for own in ADAPTERS], [1.0, 0.5], rank=2)
    for name in ADAPTERS[1]
  },
  "random entries": lambda: merging.random_like(ADAPTERS)[0],
  "random directions": lambda: merging.random_like(
    ADAPTERS, jax.random.key(1), keep="spectrum"
  )[0],
}


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_goes_to_disk_and_back(name, tmp_path):
  loras = METHODS[name]()
  lost = formats.save_peft(tmp_path / "peft", loras, like=LIKE)
  assert lost == {}
  found = formats.load_peft(tmp_path / "peft", like=LIKE).loras
  assert found.keys() == loras.keys()
  for path, lora in loras.items():
    wanted = np.asarray(dense(lora))
    np.testing.assert_allclose(
      dense(found[path]), wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max()
    )
