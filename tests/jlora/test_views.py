# SPDX-License-Identifier: Apache-2.0
"""Matrix views: exact inverses, and the product the layer itself computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora import views
from jlora.tree_views import table_for
from jlora.views import (
  EXPERTS_IN_OUT_VIEWS,
  FLAX_VIEWS,
  GPT2_VIEWS,
  TORCH_VIEWS,
  as_matrix,
  as_parameter,
  view_of,
)

TABLES = {
  "flax": FLAX_VIEWS,
  "torch": TORCH_VIEWS,
  "gpt2": GPT2_VIEWS,
  "experts_in_out": EXPERTS_IN_OUT_VIEWS,
}
ROWS = [
  pytest.param(*rule[1:], id=f"{name}-{place}")
  for name, table in TABLES.items()
  for place, rule in enumerate(table)
]
SIDES = (2, 3, 4, 5, 6)


def numbered(*shape):
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(("axes", "view"), ROWS)
def test_every_axis_has_one_role(axes, view):
  roles = (*view.batch, *view.inputs, *view.outputs)
  assert sorted(roles) == list(range(axes))


@pytest.mark.parametrize(("axes", "view"), ROWS)
def test_as_parameter_inverts_as_matrix(axes, view):
  parameter = numbered(*SIDES[:axes])
  matrix = as_matrix(parameter, view)
  assert matrix.shape == view.shape(parameter.shape)
  assert matrix.ndim == len(view.batch) + 2
  back = as_parameter(matrix, view, parameter.shape)
  np.testing.assert_array_equal(back, parameter)
  other = as_parameter(
    as_matrix(jnp.asarray(parameter), view), view, SIDES[:axes]
  )
  np.testing.assert_array_equal(other, parameter)


# What the layer computes: input, parameter -> output, batch letters in all.
LAYERS = [
  ("flax", "mlp/kernel", "i,io->o"),
  ("flax", "kernel", "i,io->o"),
  ("flax", "layers/0/attn/q/kernel", "i,ihd->hd"),
  ("flax", "encoder/query/kernel", "i,ihd->hd"),
  ("flax", "layers/0/attn/o/kernel", "hd,hdo->o"),
  ("flax", "encoder/out/kernel", "hd,hdo->o"),
  ("flax", "layer_0/attn/q_einsum/w", "i,hid->hd"),
  ("flax", "layer_0/attn/attn_vec_einsum/w", "hd,hdo->o"),
  ("flax", "layer_0/attn/kv_einsum/w", "ci,chid->chd"),
  ("flax", "layer_0/attn/qkv_einsum/w", "ci,chid->chd"),
  ("flax", "layer_0/mlp/gating_einsum", "gi,goi->go"),
  ("flax", "layer_0/mlp/gating_einsum/w", "gi,goi->go"),
  ("flax", "stem/conv1/kernel", "hwi,hwio->o"),
  ("flax", "stem/conv/kernel", "ki,kio->o"),
  ("flax", "layers/mlp/kernel", "li,lio->lo"),
  ("flax", "layers/attn/q/kernel", "li,lihd->lhd"),
  ("flax", "layers/attn/o/kernel", "lhd,lhdo->lo"),
  ("flax", "layers/experts/kernel", "lei,leio->leo"),
  ("torch", "model.layers.0.self_attn.q_proj.weight", "i,oi->o"),
  ("torch", "lm_head.weight", "i,oi->o"),
  ("torch", "weight", "i,oi->o"),
  ("torch", "model.embed_tokens.weight", "t,to->o"),
  ("torch", "transformer.wte.weight", "t,to->o"),
  ("torch", "encoder.conv1.weight", "ik,oik->o"),
  ("torch", "stem.conv.weight", "ihw,oihw->o"),
  ("torch", "patch_embedding.weight", "ithw,oithw->o"),
  ("torch", "resblocks.0.attn.in_proj_weight", "i,oi->o"),
  ("torch", "resblocks.0.attn.k_proj_weight", "i,oi->o"),
  ("torch", "model.text_projection", "i,io->o"),
  ("torch", "model.layers.0.mlp.experts.gate_up_proj", "ei,eoi->eo"),
  ("torch", "model.layers.0.mlp.experts.down_proj", "ei,eoi->eo"),
  ("gpt2", "h.0.attn.c_attn.weight", "i,io->o"),
  ("gpt2", "h.0.mlp.c_proj.weight", "i,io->o"),
  ("gpt2", "lm_head.weight", "i,oi->o"),
  ("experts_in_out", "model.layers.0.mlp.experts.gate_up_proj", "ei,eio->eo"),
  ("experts_in_out", "model.layers.0.mlp.experts.down_proj", "ei,eio->eo"),
  ("experts_in_out", "model.layers.0.self_attn.q_proj.weight", "i,oi->o"),
]


@pytest.mark.parametrize(("table", "path", "layer"), LAYERS)
def test_the_matrix_computes_what_the_layer_does(table, path, layer):
  given, weights, out = layer.replace("->", ",").split(",")
  side = dict(zip(weights, SIDES, strict=False))
  rng = np.random.default_rng(0)
  w = rng.standard_normal([side[axis] for axis in weights])
  x = rng.standard_normal([side[axis] for axis in given])
  view = view_of(path, w.shape, TABLES[table])
  assert view is not None
  matrix = as_matrix(w, view)
  rows = x.reshape(*matrix.shape[:-2], 1, matrix.shape[-2])
  expected = np.einsum(layer, x, w)
  np.testing.assert_allclose((rows @ matrix).ravel(), expected.ravel())
  assert len(view.batch) == len(set(given) & set(out))


@pytest.mark.parametrize(
  ("table", "path", "shape"),
  [
    ("flax", "mlp/bias", (4,)),
    ("flax", "layers/mlp/bias", (3, 4)),
    ("flax", "layers/norm/scale", (3, 4)),
    ("flax", "scale", (3, 4)),
    ("flax", "layers/attn/q/bias", (3, 4, 5)),
    ("flax", "step", ()),
    ("torch", "model.norm.weight", (4,)),
    ("torch", "model.layers.0.mlp.experts.gate_up_proj_bias", (2, 4)),
  ],
)
def test_what_is_no_matrix_has_no_view(table, path, shape):
  assert view_of(path, shape, TABLES[table]) is None


@pytest.mark.parametrize(
  ("paths", "model_type", "table"),
  [
    (["a/kernel", "b/kernel"], None, FLAX_VIEWS),
    (["a/kernel"], "gpt2", FLAX_VIEWS),
    (["a.weight", "b.weight", "c/d"], None, TORCH_VIEWS),
    (["a.weight"], "llama", TORCH_VIEWS),
    (["a.weight"], "gpt2", GPT2_VIEWS),
    (["a.weight"], "gpt_oss", EXPERTS_IN_OUT_VIEWS),
    (["a.weight"], "llama4_text", EXPERTS_IN_OUT_VIEWS),
    ([], None, FLAX_VIEWS),
  ],
)
def test_table_for(paths, model_type, table):
  assert table_for(paths, model_type) is table


def test_an_ordered_view_shares_memory():
  parameter = numbered(2, 3)
  assert np.shares_memory(as_matrix(parameter, views.KERNEL), parameter)
