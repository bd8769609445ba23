# SPDX-License-Identifier: Apache-2.0
"""What a tree of names and shapes tells of how its kernels are read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.paths import flatten
from jlora.tree_views import find_stacks, read_tree, table_for
from jlora.views import MatrixView, view_of

STACK = MatrixView((0,), (1,), (2,))
WRITES_HEADS = MatrixView((), (0,), (1, 2))
SUMS_HEADS = MatrixView((), (0, 1), (2,))
NONE2 = MatrixView((0, 1), (), ())

# What is special -> (shapes of a tree, the views that it must have).
TREES = {
  "scanned, by a norm": (
    {"layers/q_proj/kernel": (6, 8, 8), "layers/norm/scale": (6, 8)},
    {"layers/q_proj/kernel": STACK, "layers/norm/scale": NONE2},
  ),
  "scanned, by a sibling that is no attention": (
    {"layers/q_proj/kernel": (6, 8, 8), "layers/mlp/kernel": (6, 8, 8)},
    {"layers/q_proj/kernel": STACK, "layers/mlp/kernel": STACK},
  ),
  "scanned heads": (
    {"h/q/kernel": (6, 8, 2, 4), "h/q/bias": (6, 2, 4), "h/ln/scale": (6, 8),
     "h/o/kernel": (6, 2, 4, 8), "h/o/bias": (6, 8)},
    {},
  ),
  "scanned along the second axis": (
    {"decoder/layers/query/kernel": (64, 6, 4, 16), "decoder/layers/norm/scale":
     (64, 6), "decoder/layers/mlp/wi/kernel": (64, 6, 128),
     "embed/embedding": (100, 64)},
    {"decoder/layers/query/kernel": MatrixView((1,), (0,), (2, 3)),
     "decoder/layers/mlp/wi/kernel": MatrixView((1,), (0,), (2,)),
     "embed/embedding": MatrixView()},
  ),
  "one layer, by its norm": (
    {"q_proj/kernel": (8, 2, 4), "o_proj/kernel": (2, 4, 8), "norm/scale":
     (8,)},
    {"q_proj/kernel": WRITES_HEADS, "o_proj/kernel": SUMS_HEADS},
  ),
  "a bias of heads": (
    {"x/proj/kernel": (8, 2, 4), "x/proj/bias": (2, 4)},
    {"x/proj/kernel": WRITES_HEADS, "x/proj/bias": NONE2},
  ),
  "a bias of features": (
    {"x/proj/kernel": (2, 4, 8), "x/proj/bias": (8,)},
    {"x/proj/kernel": SUMS_HEADS},
  ),
  "a bias for each layer": (
    {"x/proj/kernel": (3, 4, 8), "x/proj/bias": (3, 8)},
    {"x/proj/kernel": STACK, "x/proj/bias": NONE2},
  ),
  "tunix": (
    {"layers/0/attn/q_proj/w": (64, 4, 16), "layers/0/attn/o_proj/w":
     (4, 16, 64), "layers/0/norm/w": (64,)},
    {"layers/0/attn/q_proj/w": WRITES_HEADS,
     "layers/0/attn/o_proj/w": SUMS_HEADS},
  ),
  "linen's own names": (
    {"Conv_0/kernel": (3, 3, 16, 32), "DenseGeneral_0/kernel": (64, 4, 16)},
    {"Conv_0/kernel": MatrixView((), (0, 1, 2), (3,)),
     "DenseGeneral_0/kernel": WRITES_HEADS},
  ),
  "equinox's and haiku's convolutions": (
    {"conv/weight": (16, 8, 3, 3), "conv2_d/w": (3, 3, 8, 16)},
    {"conv/weight": MatrixView((), (1, 2, 3), (0,)),
     "conv2_d/w": MatrixView((), (0, 1, 2), (3,))},
  ),
  "experts in scanned layers": (
    {"layers/moe/w": (4, 8, 16, 32), "layers/norm/scale": (4, 16)},
    {"layers/moe/w": MatrixView((0, 1), (2,), (3,))},
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_tells_how_it_is_read(kind):
  shapes, wanted = TREES[kind]
  found = read_tree(shapes)
  assert {path: found[path] for path in wanted} == {
    path: (view,) for path, view in wanted.items()
  }


def test_scanned_heads_are_those_of_each_layer():
  shapes, _ = TREES["scanned heads"]
  assert read_tree(shapes)["h/q/kernel"] == (MatrixView((0,), (1,), (2, 3)),)
  assert read_tree(shapes)["h/o/kernel"] == (MatrixView((0,), (1, 2), (3,)),)
  assert [stack.axis for stack in find_stacks(shapes)] == [0]


def test_what_the_tree_leaves_open_has_several_readings():
  (readings,) = read_tree({"w": (2, 3, 4)}).values()
  assert readings == (STACK, WRITES_HEADS, SUMS_HEADS)
  table = table_for({"w": (2, 3, 4)})
  for view in readings:
    assert view_of("w", (2, 3, 4), table, view.shape((2, 3, 4))) == view


@pytest.mark.parametrize("scanned", [True, False])
def test_an_exact_change_of_each_layer_comes_back(scanned):
  """Whether the norm tells of layers, or of a width that is not stacked."""
  draw = np.random.default_rng(0).standard_normal
  if scanned:
    low, norm = draw((6, 32, 2)) @ draw((6, 2, 24)), (6, 32)
  else:
    low, norm = (draw((32, 2)) @ draw((2, 24))).reshape(32, 4, 6), (32,)
  base = {
    "layers": {
      "q_proj": {"kernel": jnp.zeros(low.shape)},
      "norm": {"scale": jnp.ones(norm)},
    }
  }
  finetuned = {
    "layers": {**base["layers"], "q_proj": {"kernel": jnp.float32(low)}}
  }
  loras = jlora.extract(base, finetuned, rank=2)
  got, want = map(flatten, (jlora.apply(base, loras), finetuned))
  for path in want:
    np.testing.assert_allclose(got[path], want[path], atol=1e-4)


class Scanned(nn.Module):
  """A scanned stack of attention and a convolution."""

  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return nn.Conv(8, (3,))(x), None


def test_names_and_program_agree_on_a_scanned_linen_model():
  from jlora.adapting import views_from

  net = nn.scan(
    Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
  )()
  x = jnp.ones((2, 5, 8))
  params = net.init(jax.random.key(0), x, None)["params"]
  shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
  with pytest.warns(UserWarning, match="no matrices"):
    rules = views_from(
      lambda p, x: net.apply({"params": p}, x, None), params, x
    )
  table = table_for(shapes)
  for pattern, _, view in rules:
    path = pattern.replace("\\", "")
    found = view_of(path, shapes[path], table)
    assert (
      found or MatrixView(tuple(range(len(shapes[path]))), (), ())
    ) == view
