# SPDX-License-Identifier: Apache-2.0
"""Many small programs: what XLA could do for their speed costs more here."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
  """Half of the time that these tests would take."""
  was = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", was)
