# SPDX-License-Identifier: Apache-2.0
"""Figures of two adapters by kind and layer, from tiny ones."""

import numpy as np
import pytest

from experiments import conflict
from experiments.lib.figures import conflicts, plots
from jlora.evaluation.conflicts import compare_adapters
from jlora.loras import Lora

SHAPES = {
  "self_attn.q_proj": (12, 12), "self_attn.k_proj": (12, 6),
  "self_attn.v_proj": (12, 6), "self_attn.o_proj": (12, 12),
  "mlp.gate_proj": (12, 18), "mlp.up_proj": (12, 18),
  "mlp.down_proj": (18, 12),
}  # fmt: skip


def draw(seed, layers=3):
  rng = np.random.default_rng(seed)
  return {
    f"model.layers.{i}.{name}.weight": Lora(
      rng.standard_normal((2, shape[0]), np.float32),
      rng.standard_normal((2, shape[1]), np.float32),
      np.float32(1),
    )
    for i in range(layers)
    for name, shape in SHAPES.items()
  }


@pytest.fixture(scope="module")
def base():
  norms = ("input_layernorm", "post_attention_layernorm")
  rng = np.random.default_rng(9)
  found = {
    f"model.layers.{i}.{norm}.weight": np.full(12, 2.0 + i, np.float32)
    for i in range(3)
    for norm in norms
  }
  return found | {
    name: rng.standard_normal(lora.b.shape[1:] + lora.a.shape[1:])
    for name, lora in draw(0).items()
  }


def test_shuffling_keeps_strength_and_loses_direction():
  loras = draw(0)
  rows = compare_adapters(loras, conflict.shuffle_channels(loras, 0))
  own = compare_adapters(loras, loras)
  path = "model.layers.0.mlp.up_proj.weight"
  assert own[path]["read_overlap"] == pytest.approx(1)
  assert rows[path]["read_overlap"] < 0.7
  other = conflict.shuffle_channels(loras, 0)[path]
  np.testing.assert_allclose(
    np.linalg.svd(other.a.T @ other.b)[1],
    np.linalg.svd(loras[path].a.T @ loras[path].b)[1],
    atol=1e-4,
  )


def test_readers_stand_behind_their_own_norm(base):
  loras = draw(0)
  found = conflict.behind_norms(loras, base)
  assert len(found) == 15
  path = "model.layers.1.mlp.up_proj.weight"
  np.testing.assert_array_equal(found[path].a, 3 * loras[path].a)


def test_what_one_writes_is_followed_to_what_the_other_reads(base):
  first, second = draw(0), draw(1)
  for i in range(1, 3):  # down writes just what the next layer's q, k, v read
    writer = second[f"model.layers.{i - 1}.mlp.down_proj.weight"]
    for kind in "qkv":
      path = f"model.layers.{i}.self_attn.{kind}_proj.weight"
      first[path] = Lora(writer.b, first[path].b, np.float32(1))
  found = conflict.follow_stream(first, second, base)
  layers = found["MLP to q, k, v of the next layer"]
  assert sorted(layers) == [0, 1]
  assert layers[0]["overlap"] == pytest.approx(1)
  assert layers[0]["level"] == pytest.approx(2 / 12)
  assert found["o to the MLP of its layer"][2]["overlap"] < 0.9
  table = conflicts.as_stream_table({"second": found, "again": found})
  assert "| MLP to q, k, v of the next layer | 1.000, 1.000 | 1.000, 1" in table


def test_tables_and_figure_have_a_place_for_everything(base):
  loras = draw(0)
  rows = compare_adapters(loras, loras)
  table = conflicts.as_table(rows, rows).splitlines()
  assert len(table) == 2 + len(conflicts.KINDS)
  assert "| q_proj | 1.000 (1.000) |" in table[2]
  depths = conflicts.as_depth_table(rows).splitlines()
  assert "| q | cosine | 1.000 | 1.000 | 1.000 |" in depths
  streams = conflict.follow_stream(loras, loras, base)
  figure = conflicts.draw_layers(conflict.panels_of(rows, rows), streams)
  assert len(figure.axes) == 6
  counts = conflict.count_intruders(base, loras)
  assert counts.keys() == set(conflicts.KINDS)
  assert sum(any_ for any_, _ in counts.values()) > 0


@pytest.mark.usefixtures("quick_compilation")
def test_smoke(capsys, tmp_path):
  """Changes drawn at random have no more to do with each other than chance."""
  pairs = conflict.tiny_pairs(str(tmp_path))
  draw = conflict.compare_pairs(pairs, 2, intruders=True)
  said = capsys.readouterr().out
  assert said.count("intruders of the ") == 2
  assert said.count("| MLP |") >= 1
  plots.save_figure(tmp_path / "conflict.png", draw)
  assert (tmp_path / "conflict.png").stat().st_size > 1000
