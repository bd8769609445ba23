# SPDX-License-Identifier: Apache-2.0
"""The update of a base as a Lora beside a user's, as docs/porting.md has it."""

import pathlib
import re

import jax
import numpy as np
import pytest

from jlora.adapting import apply
from jlora.extraction import port_adapter
from jlora.factoring import svd
from jlora.loras import Lora, dense
from jlora.merging import svd_merge, truncate

# Of full rank a Lora is larger than its weight, which `extract` says.
pytestmark = pytest.mark.filterwarnings("ignore:.*more numbers than their")
ROOT = pathlib.Path(__file__).parents[3]
NAMES = ("q/kernel", "k/kernel")


def recipe():
  """The page's own lines."""
  page = (ROOT / "docs" / "porting.md").read_text()
  (found,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
  return found


@pytest.fixture
def given():
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
  old = {name: {"kernel": normal(7, 5)} for name in "qk"}
  new = {name: {"kernel": w["kernel"] + np.float32(0.3) * normal(7, 5)}
         for name, w in old.items()}  # fmt: skip
  # The user changed one of both, the update each.
  user = {"q/kernel": Lora(normal(2, 7), normal(2, 5), np.float32(0.5))}
  return old, new, user


def both_of(old, new, user, rank):
  names = {"old": old, "new": new, "user": user, "rank": rank}
  exec(recipe(), names)
  return names["update"], names["both"]


def test_at_full_rank_it_is_the_port_by_add(given):
  old, new, user = given
  _, both = both_of(*given, rank=5)
  ranks = {path: lora.rank for path, lora in both.items()}
  # What the user did not change is filled with a unit of zeros.
  assert ranks == {"q/kernel": 5 + 2, "k/kernel": 5 + 1}
  ported = port_adapter(user, old, new).loras
  found, wanted = apply(old, both), apply(new, ported)
  for name in "qk":
    np.testing.assert_allclose(
      found[name]["kernel"], wanted[name]["kernel"], atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_at_a_lower_rank_the_error_is_the_updates(given, rank):
  old, new, user = given
  update, both = both_of(*given, rank=rank)
  found, wanted = apply(old, both), apply(new, user)
  for name in "qk":
    change = new[name]["kernel"] - old[name]["kernel"]
    missed = change - dense(update[f"{name}/kernel"])
    error = wanted[name]["kernel"] - found[name]["kernel"]
    np.testing.assert_allclose(error, missed, atol=1e-5)
    s = svd(change, 5).s
    np.testing.assert_allclose(
      np.linalg.norm(error), np.linalg.norm(s[rank:]), rtol=1e-3
    )


def test_the_sum_is_to_be_cut_not_its_parts(given):
  old, new, user = given
  update, both = both_of(*given, rank=5)
  update = jax.tree.map(np.asarray, update)  # nothing is compiled
  path, whole = "q/kernel", dense(both["q/kernel"])
  once = svd_merge([update[path], user[path]], [1.0, 1.0], rank=3)
  apart = dense(truncate(update[path], 2)) + dense(truncate(user[path], 1))
  errors = [np.linalg.norm(whole - x) for x in (dense(once), apart)]
  np.testing.assert_allclose(
    errors[0], np.linalg.norm(svd(whole, 5).s[3:]), rtol=1e-3
  )
  assert errors[0] < errors[1]
