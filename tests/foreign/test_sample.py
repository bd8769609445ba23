# SPDX-License-Identifier: Apache-2.0
"""Some models of `make test-foreign`, of packages that tests need anyway."""

import jax
import pytest

from tests.foreign.checks import LIMITS, examine, faults
from tests.foreign.models import MODELS

SAMPLE = (
  "flax linen decoder, scan and remat",
  "flax NNX vision transformer",
  "equinox convolutions and GRU",
)


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_another_package_computes_the_same(name):
  (row,) = (row for row in MODELS if row.name == name)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    found = examine(row.make())  # other packages promote
  assert not faults(found)
  assert found["matrices"]


def test_a_fault_is_seen():
  good = dict.fromkeys(LIMITS, 0.0) | {"dense": []}
  assert not faults(good)
  for name, limit in LIMITS.items():
    assert faults(good | {name: 1.1 * limit})
    assert faults(good | {name: float("nan")})
  assert faults(good | {"dense": ["gather (of w)"]})
