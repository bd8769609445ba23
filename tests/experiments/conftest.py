# SPDX-License-Identifier: Apache-2.0
"""What tests of whole experiments share."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
  """Programs that run once: to make them fast would cost more."""
  was = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", was)
