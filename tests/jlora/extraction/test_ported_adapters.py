# SPDX-License-Identifier: Apache-2.0
"""Adapters carried to another base, of trees and of checkpoints."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints import write_safetensors
from jlora.extraction import port_adapter, project
from jlora.formats import OtherBaseWarning, fingerprint
from jlora.loras import Lora, dense

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


def lora_of(rng, n_in=6, n_out=4, rank=2):
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  return Lora(normal(rank, n_in), normal(rank, n_out), jnp.float32(0.5))


@pytest.fixture
def pair(tmp_path):
  rng = np.random.default_rng(0)
  old = {n: rng.standard_normal((4, 6)).astype(np.float32) for n in NAMES}
  new = {
    n: w + 0.2 * rng.standard_normal((4, 6)).astype(np.float32)
    for n, w in old.items()
  }
  for name, tensors in (("old", old), ("new", new)):
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  return old, new, {n: lora_of(rng) for n in NAMES}


def test_checkpoints_and_trees_give_the_same(pair, tmp_path):
  old, new, loras = pair
  opened = [
    jlora.open_checkpoint(tmp_path / f"{name}.safetensors")
    for name in ("old", "new")
  ]
  ours = port_adapter(loras, *opened, method=project, k=2)
  theirs = port_adapter(loras, old, new, method=project, k=2)
  assert ours.rows == theirs.rows
  for name in NAMES:
    np.testing.assert_array_equal(
      dense(ours.loras[name]), dense(theirs.loras[name])
    )
    row = ours.rows[name]
    drift = np.linalg.norm(new[name] - old[name]) / np.linalg.norm(old[name])
    kept = np.linalg.norm(dense(ours.loras[name]))
    kept /= np.linalg.norm(dense(loras[name]))
    np.testing.assert_allclose(row["drift"], drift, rtol=1e-5)
    np.testing.assert_allclose(row["kept"], kept, rtol=1e-5)
    spaces = [np.linalg.svd(one[name])[0][:, :2] for one in (old, new)]
    alike = np.square(spaces[0].T @ spaces[1]).sum() / 2
    np.testing.assert_allclose(row["write_alike"], alike, rtol=1e-4)


def test_the_same_base_is_alike_and_has_no_drift(pair):
  old, _, loras = pair
  for row in port_adapter(loras, old, old).rows.values():
    assert row["drift"] == 0
    assert row["kept"] == row["length"] == 1
    assert row["read_alike"] == pytest.approx(1, abs=1e-5)


def test_modules_of_which_little_is_kept_are_left_out(pair):
  old, new, loras = pair
  wide = {NAMES[0]: loras[NAMES[0]]}
  u, _, vt = np.linalg.svd(new[NAMES[1]].T)
  inside = Lora(jnp.float32(u[:, :1].T), jnp.float32(vt[:1]), jnp.float32(1))
  found = port_adapter(
    {**wide, NAMES[1]: inside}, old, new, method=project, k=1, keep=0.9
  )
  assert list(found.loras) == [NAMES[1]]
  assert found.left_out == [NAMES[0]]
  assert [row["is_kept"] for row in found.rows.values()] == [False, True]


def test_layers_are_mapped_where_they_are_other_ones(pair):
  old, new, loras = pair
  third = "model.layers.2.self_attn.q_proj.weight"
  moved = {third: new[NAMES[1]]}
  with pytest.raises(ValueError, match=r"lacks 2 parameters .* paths="):
    port_adapter(loras, old, moved)
  paths = {NAMES[0]: None, NAMES[1]: third}
  found = port_adapter(loras, old, moved, paths=paths)
  assert list(found.loras) == [third]
  assert found.rows[third]["source"] == NAMES[1]
  assert found.left_out == [NAMES[0]]


def test_rows_of_a_table_are_carried_where_they_are(pair):
  """Of a tree the caller says which; both sides of a matrix may have them."""
  old, _, loras = pair
  name, rows = NAMES[0], [2, -1, 0, 3, 1]
  grown = {name: np.random.default_rng(5).standard_normal((5, 6))}
  lora = {name: loras[name]}
  found = port_adapter(lora, old, grown, rows={name: rows})
  before, after = dense(loras[name]), dense(found.loras[name])
  np.testing.assert_allclose(after[:, [2, 4, 0, 3]], before, atol=1e-6)
  assert not np.any(after[:, 1])
  assert found.rows[name]["kept"] == pytest.approx(1)
  with pytest.raises(ValueError, match=r"no rows in common: .*: 0 to 4 of 4"):
    port_adapter(lora, old, grown, rows={name: [0, 1, 2, 3, 4]})


def test_a_source_that_is_another_is_told(pair):
  old, new, loras = pair
  known = fingerprint(old, loras)
  port_adapter(loras, old, new, fingerprint=known)  # warnings are errors
  with pytest.warns(OtherBaseWarning, match="2 of 2 weights"):
    port_adapter(loras, new, old, fingerprint=known)


def test_what_does_not_fit_is_refused(pair):
  old, new, loras = pair
  grown = {**new, NAMES[0]: np.ones((5, 6), np.float32)}
  with pytest.raises(
    ValueError, match=r"1 weights have no Lora's shape.*\(6, 5\)"
  ):
    port_adapter(loras, old, grown)
  with pytest.raises(ValueError, match="several Loras"):
    port_adapter(loras, old, new, paths={NAMES[0]: NAMES[1]})
  with pytest.raises(ValueError, match="mapped that the adapter does not have"):
    port_adapter(loras, old, new, paths={"nowhere": None})


def test_other_lengths_are_said(pair):
  old, new, loras = pair
  with pytest.warns(UserWarning, match=r"1 weights differ much in length"):
    port_adapter(loras, old, {**new, NAMES[0]: 2 * old[NAMES[0]]})


def test_a_change_of_nothing_has_no_share_that_is_kept(pair):
  old, new, loras = pair
  zero = {n: Lora(x.a, jnp.zeros_like(x.b), x.scale) for n, x in loras.items()}
  found = port_adapter(zero, old, new, keep=0.5)
  assert all(np.isnan(row["kept"]) for row in found.rows.values())
  assert list(found.loras) == NAMES  # nothing says that it should go
