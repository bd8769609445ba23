# SPDX-License-Identifier: Apache-2.0
"""The programs whose cost is compared: they agree, and the base is itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import adapting

SIZES = adapting.QUICK._replace(layers=1)
TOKENS = jnp.arange(8).reshape(2, 4)


# qwix 0.1.8 asks flax for a name of before.
@pytest.mark.filterwarnings("ignore:'VariableState':DeprecationWarning")
def test_what_is_timed_agrees_and_does_something():
  programs = adapting.list_programs(SIZES)
  params, loras = adapting.draw(SIZES)
  args = loras, params, TOKENS
  adapting.check(programs, args)
  base, ours = (
    programs[name](*args) for name in (adapting.BASE, adapting.OURS)
  )
  assert np.abs(base - ours).max() > 1e-2
  wrong = {**programs, adapting.OURS: programs[adapting.BASE]}
  with pytest.raises(RuntimeError, match="bind and adapt is off by"):
    adapting.check(wrong, args)


def test_every_program_is_timed_as_often():
  params, loras = adapting.draw(SIZES)
  programs = {
    "one": lambda loras, params, x: x + 1,
    "two": lambda loras, params, x: x + 2,
  }
  with jax.numpy_rank_promotion("allow"):
    found = adapting.measure(programs, (loras, params, TOKENS), 3)
  for times in found.values():
    assert {kind: len(own) for kind, own in times.items()} == {
      "trace": 3, "compile": 3, "run": 3,
    }  # fmt: skip
  found["two"]["run"] = [2 * t for t in found["one"]["run"]]
  assert adapting.compare(found, "two", "one", "run") == 2
