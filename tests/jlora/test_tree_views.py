# SPDX-License-Identifier: Apache-2.0
"""What a tree of names and shapes tells of how its kernels are read."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.declared_views import declared_views
from jlora.paths import flatten
from jlora.tree_views import (
  find_stacks,
  read_tree,
  table_for,
)
from jlora.views import LINEAR, MatrixView, view_of

STACK = MatrixView((0,), (1,), (2,))
WRITES_HEADS = MatrixView((), (0,), (1, 2))
SUMS_HEADS = MatrixView((), (0, 1), (2,))
NONE2 = MatrixView((0, 1), (), ())

# What is special -> (shapes of a tree, the views that it must have).
TREES = {
  "scanned, a number for each layer": (
    {"layers/q_proj/kernel": (6, 32, 32), "layers/norm/scale": (6, 32),
     "layers/temp": (6,)},
    {"layers/q_proj/kernel": STACK, "layers/norm/scale": NONE2},
  ),
  "scanned, one buffer and one number for all layers": (
    {"layers/up/kernel": (6, 32, 64), "layers/norm/scale": (6, 32),
     "layers/rope/inv_freq": (4,), "layers/temp": ()},
    {"layers/up/kernel": STACK, "layers/norm/scale": NONE2},
  ),
  "as many heads as each has entries, with a bias": (
    {"query/kernel": (64, 8, 8), "query/bias": (8, 8),
     "key/kernel": (64, 8, 8), "key/bias": (8, 8)},
    {"query/kernel": WRITES_HEADS, "query/bias": NONE2,
     "key/kernel": WRITES_HEADS, "key/bias": NONE2},
  ),
  "as many heads as inputs, with a bias": (
    {"query/kernel": (8, 8, 4), "query/bias": (8, 4)},
    {"query/kernel": WRITES_HEADS, "query/bias": NONE2},
  ),
  "a transposed convolution that keeps (out, in)": (
    {"ConvTranspose_0/kernel": (4, 4, 5, 12), "ConvTranspose_0/bias": (5,)},
    {"ConvTranspose_0/kernel": MatrixView((), (0, 1, 3), (2,))},
  ),
  "a transposed convolution that keeps (in, out)": (
    {"ConvTranspose_0/kernel": (4, 4, 12, 5), "ConvTranspose_0/bias": (5,)},
    {"ConvTranspose_0/kernel": MatrixView((), (0, 1, 2), (3,))},
  ),
  "haiku's transposed convolution": (
    {"up/w": (3, 3, 5, 3), "up/b": (5,),
     "conv2_d_transpose/w": (3, 3, 6, 6), "conv2_d_transpose/b": (6,)},
    {"up/w": MatrixView((), (0, 1, 3), (2,)),
     "conv2_d_transpose/w": MatrixView((), (0, 1, 3), (2,))},
  ),
  "equinox's linear layers and table": (
    {"up/weight": (16, 6), "up/bias": (16,), "down/weight": (6, 16),
     "embed/weight": (50, 6)},
    {"up/weight": LINEAR, "down/weight": LINEAR, "embed/weight": MatrixView()},
  ),
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


# What the tree tells beyond names: kind -> (shapes, path, its view).
EVIDENCE = {
  "a window": ({"stem/kernel": (3, 3, 8, 16)}, MatrixView((), (0, 1, 2), (3,))),
  "a window on an image": (
    {"patches/kernel": (16, 16, 3, 32)}, MatrixView((), (0, 1, 2), (3,)),
  ),
  "a window of one": ({"stem/kernel": (1, 1, 8, 16)}, MatrixView(
    (), (0, 1, 2), (3,))),
  "layers that are the whole tree": (
    {"up/kernel": (3, 8, 16), "norm/scale": (3, 8)}, STACK,
  ),
  "one axis of length 1": ({"pos": (1, 50, 32)}, STACK),
  "a token": ({"cls": (1, 1, 32)}, MatrixView((0,), (1,), (2,))),
  "a weight, (out, in)": (
    {"x/weight": (16, 8, 1), "x/norm": (8,)}, MatrixView((), (1, 2), (0,)),
  ),
  "a weight by its bias": (
    {"x/weight": (16, 8, 3), "x/bias": (16,)}, MatrixView((), (1, 2), (0,)),
  ),
  "a weight by Equinox's bias": (
    {"x/weight": (8, 8, 8), "x/bias": (8, 1)}, MatrixView((), (1, 2), (0,)),
  ),
  "weights of layers": (
    {"x/weight": (3, 16, 8), "x/bias": (3, 16), "y/bias": (8,)},
    MatrixView((0,), (2,), (1,)),
  ),
  "queries, keys and values at once": (
    {"attn/qkv/kernel": (32, 3, 4, 8)}, MatrixView((), (0,), (1, 2, 3)),
  ),
  "the width of a norm": (
    {"x/kernel": (64, 4, 16), "norm/scale": (64,)}, WRITES_HEADS,
  ),
  "the width of a norm, in experts": (
    {"x/kernel": (8, 64, 256), "norm/scale": (64,)}, STACK,
  ),
  "as many layers as another block": (
    {"x/kernel": (6, 8, 16), "h/w": (6, 9, 7), "h/norm": (6, 9)}, STACK,
  ),
  "heads that do not fit each other": (
    {"h/query/kernel": (6, 8, 16), "h/out/kernel": (6, 8, 16)}, STACK,
  ),
  "heads that do": (
    {"h/query/kernel": (16, 2, 8), "h/out/kernel": (2, 8, 16)}, WRITES_HEADS,
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVIDENCE)
def test_evidence_goes_before_a_refusal(kind):
  shapes, view = EVIDENCE[kind]
  path = next(iter(shapes))
  assert read_tree(shapes)[path] == (view,)


UNCLEAR = {f"x{at}": jnp.ones((3, 4, 6)) for at in range(4)}
GIVEN = [("x.", 3, WRITES_HEADS)]
LORA = jlora.Lora(jnp.ones((1, 3)), jnp.ones((1, 24)), jnp.float32(1))
#: Every door that reads an array tree, and takes views.
DOORS = {
  "extract": lambda **views: jlora.extract(UNCLEAR, UNCLEAR, rank=1, **views),
  "extract, traced": lambda **views: jax.eval_shape(
    lambda one, two: jlora.extract(one, two, rank=1, **views), UNCLEAR, UNCLEAR
  ),
  "init_lora": lambda **views: jlora.init_lora(UNCLEAR, 1, **views),
  "split_base": lambda **views: jlora.training.split_base(UNCLEAR, 1, **views),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_stays_ambiguous_is_refused_at_every_door(door):
  with pytest.raises(ValueError) as error:  # noqa: PT011
    DOORS[door]()
  for said in (
    "4 parameters can be read as different matrices",
    "x0 (3, 4, 6): ((0,), (1,), (2,)) is 4 x 6 3 times or "
    "((), (0,), (1, 2)) is 3 x 24 or ((), (0, 1), (2,)) is 12 x 6",
    "and 1 more",
    "`views=[",
    "views=jlora.adapting.views_from(fn, params, *inputs)",
  ):
    assert said in str(error.value)
  assert "x3" not in str(error.value)
  DOORS[door](views=GIVEN)


def test_only_what_is_selected_has_to_be_clear():
  tree = {**UNCLEAR, "q": jnp.ones((8, 6))}
  only = jlora.paths.matching("q")
  assert list(jlora.extract(tree, tree, rank=1, select=only)) == ["q"]
  assert list(jlora.init_lora(tree, 1, select=only)) == ["q"]


@pytest.mark.parametrize(
  "view", [STACK, WRITES_HEADS, SUMS_HEADS], ids=["stack", "writes", "sums"]
)
def test_the_shapes_of_a_lora_decide(view):
  *lead, n_in, n_out = view.shape((3, 4, 6))
  lora = jlora.Lora(
    jnp.ones((*lead, 1, n_in)), jnp.ones((*lead, 1, n_out)), jnp.ones(lead)
  )
  params = {"x0": UNCLEAR["x0"]}
  merged = jlora.apply(params, {"x0": lora})
  np.testing.assert_array_equal(merged["x0"], 2.0)
  assert jlora.bind(params, {"x0": lora})["x0"].changes
  finetuned = {"x0": params["x0"] + 1.0}
  found = jlora.compare(params, finetuned, {"x0": lora})
  assert found.totals["relative_error"] < 1e-6


def test_shapes_of_a_lora_that_two_readings_have_do_not_decide():
  table = {"w": (MatrixView((), (0,), (1,)), MatrixView((), (1,), (0,)))}
  with pytest.raises(ValueError, match="1 parameters can be read"):
    view_of("w", (5, 5), table, (5, 5))


def test_a_lora_that_no_reading_fits_is_named_with_both_shapes():
  wrong = jlora.Lora(jnp.ones((1, 5)), jnp.ones((1, 5)), jnp.float32(1))
  with pytest.raises(
    ValueError, match=r"x0 float32 \(3, 4, 6\) for a \(1, 5\)"
  ):
    jlora.apply(UNCLEAR, {"x0": wrong})


class Everything(nn.Module):
  """Linen's layers under their own names, with and without biases."""

  bias: bool = True

  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(2, use_bias=self.bias)(
      nn.LayerNorm()(x)
    )
    x = nn.Conv(8, (3,), use_bias=self.bias)(x)
    heads = nn.DenseGeneral((2, 4), use_bias=self.bias)(x)
    x = x + nn.Dense(8, use_bias=self.bias)(heads.reshape(x.shape))
    return x, None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
def test_the_one_line_call_reads_linen_as_its_program_does(scanned, bias):
  check_against_program(*linen(scanned, bias))


def linen(scanned, bias):
  """A function of parameters and an input, and both."""
  net = Everything(bias)
  if scanned:
    net = nn.scan(
      Everything,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )(bias)
  x = jnp.ones((2, 5, 8))
  params = net.init(jax.random.key(0), x, None)["params"]
  return lambda p, x: net.apply({"params": p}, x, None), params, x


class Own(nnx.Module):
  """NNX's layers under names of one's own."""

  def __init__(self, rngs, bias=True):
    self.enter = nnx.Linear(8, 8, rngs=rngs, use_bias=bias)
    self.attention = nnx.MultiHeadAttention(
      2, 8, decode=False, rngs=rngs, use_bias=bias
    )
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs, use_bias=True)
    self.join = nnx.LinearGeneral(
      (2, 4), 8, axis=(-2, -1), rngs=rngs, use_bias=True
    )
    self.stem = nnx.Conv(8, 8, (3,), rngs=rngs)

  def __call__(self, x):
    x = self.enter(x) + self.attention(self.norm(x))
    return self.stem(self.join(self.split(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [None, 3])
def test_the_one_line_call_reads_nnx_as_its_program_does(layers, bias):
  if layers is None:
    graph, state = nnx.split(Own(nnx.Rngs(0), bias))
    run = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
  else:

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def make(rngs):
      return Own(rngs, bias)

    graph, state = nnx.split(make(nnx.Rngs(0)))

    def run(p, x):
      step = lambda x, own: (nnx.merge(graph, own)(x), None)  # noqa: E731
      return jax.lax.scan(step, x, p)[0]

  check_against_program(run, state, jnp.ones((2, 5, 8)))


def check_against_program(fn, params, x):
  """The views of names and of the program give the same matrices."""
  from jlora.adapting import views_from

  with warnings.catch_warnings(action="ignore"):
    rules = views_from(fn, params, x)
    loras = jlora.extract(params, params, rank=1)
  shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
  wanted = {
    path: (*view.shape(shape)[:-2], *sorted(view.shape(shape)[-2:]))
    for path, shape in shapes.items()
    if (view := view_of(path, shape, rules))
  }
  found = {
    path: (*x.a.shape[:-2], *sorted((x.a.shape[-1], x.b.shape[-1])))
    for path, x in loras.items()
  }
  assert found == wanted


class Bare(nnx.Module):
  """Layers without biases, under names that say nothing."""

  def __init__(self, rngs):
    more = {"use_bias": False, "rngs": rngs}
    self.a = nnx.Linear(8, 8, **more)
    self.b = nnx.LinearGeneral(8, (2, 4), **more)
    self.c = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), **more)
    self.d = nnx.Conv(8, 8, (3,), **more)
    self.e = nnx.ConvTranspose(8, 6, (3,), transpose_kernel=True, **more)
    self.f = nnx.Einsum("btd,dhk->bthk", (6, 2, 3), rngs=rngs)
    self.g = nnx.List([nnx.Embed(9, 8, rngs=rngs)])

  def __call__(self, x):
    x = self.d(self.c(self.b(self.a(x))))
    y = self.f(self.e(x)).reshape(2, -1, 6)
    return y.sum() + self.g[0](jnp.arange(4)).sum()


def test_a_module_says_what_its_parameters_are():
  """An NNX module, where its State alone is refused."""
  from jlora.adapting import views_from

  module, x = Bare(nnx.Rngs(0)), jnp.ones((2, 5, 8))
  graph, state = nnx.split(module)
  with pytest.raises(ValueError, match="5 parameters can be read"):
    jlora.init_lora(state, 1, select=lambda *_: True)
  rules = views_from(lambda p, x: nnx.merge(graph, p)(x), state, x)
  flat = flatten(module)
  table = table_for(flat, tree=module)
  assert len(rules) == len(flat) == 7
  for path, leaf in flat.items():
    one, two = (view_of(path, leaf.shape, t) for t in (table, rules))
    assert one == two, path
  finetuned = jax.tree.map(lambda w: w + 1.0, module)
  merged = jlora.apply(module, jlora.extract(module, finetuned, rank=1))
  assert isinstance(merged, Bare)
  for got, want in zip(*map(jax.tree.leaves, (merged, finetuned)), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_vmapped_module_knows_which_axis_is_its_layers(axis):
  at = nnx.StateAxes({nnx.Param: axis, ...: 0})

  @nnx.split_rngs(splits=3)
  @nnx.vmap(in_axes=0, out_axes=at)
  def make(rngs):
    return nnx.Linear(8, 6, use_bias=False, rngs=rngs)

  layer = make(nnx.Rngs(0))
  table = table_for(flatten(layer), tree=layer)
  rest = tuple(a for a in range(3) if a != axis)
  assert table["kernel"] == (MatrixView((axis,), rest[:1], rest[1:]),)


# Names of a boxed parameter's axes -> its view; None where they say nothing.
NAMES = {
  ("layers", "embed", "mlp"): STACK,
  ("embed", "layers", "mlp"): MatrixView((1,), (0,), (2,)),
  ("layers", "mlp"): NONE2,
  ("embed", "heads", "kv"): WRITES_HEADS,
  ("heads", "kv", "embed"): SUMS_HEADS,
  ("layers", "embed", "heads", "kv"): MatrixView((0,), (1,), (2, 3)),
  ("layers", "experts", "embed", "mlp"): MatrixView((0, 1), (2,), (3,)),
  (None, "data", "model"): None,
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_say_what_their_axes_are(names, box):
  shape = (4, 6, 8, 2)[: len(names)]
  tree = {"x": {"y": box(jnp.ones(shape), names)}}
  view = NAMES[names]
  alone = lambda path, shape: ()  # noqa: E731
  found = declared_views(tree, alone)
  assert found == ({"x/y": (view,)} if view else {})


def test_boxed_parameters_go_through_the_one_line_call():
  """A scanned Dense without a bias or a norm: its metadata alone tell."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
      init = nn.with_logical_partitioning(
        nn.initializers.lecun_normal(), ("embed", "mlp")
      )
      return nn.Dense(8, use_bias=False, kernel_init=init)(x), None

  net = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )()
  base = net.init(jax.random.key(0), jnp.ones((2, 8)), None)
  finetuned = jax.tree.map(lambda w: w + 1.0, base)
  loras = jlora.extract(base, finetuned, rank=1)
  assert loras["params/Dense_0/kernel"].a.shape == (3, 1, 8)
  merged = jlora.apply(base, loras)
  assert jax.tree.structure(merged) == jax.tree.structure(finetuned)
  jax.tree.map(
    lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5),
    merged,
    finetuned,
  )
  with pytest.raises(ValueError, match="can be read as different"):
    jlora.extract(nn.unbox(base), nn.unbox(finetuned), rank=1)


def test_counters_and_keys_of_layers_are_no_evidence():
  """NNX's Dropout has both in each layer of a vmapped block."""

  class Block(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.LayerNorm(32, rngs=rngs)
      self.up = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)

  layers = nnx.split_rngs(splits=6)(nnx.vmap(Block))(nnx.Rngs(0))
  params = flatten(nnx.state({"layers": layers}))
  assert params["layers/drop/rngs/count"].shape == (6,)
  assert read_tree(params)["layers/up/kernel"] == (STACK,)


def test_a_name_that_widths_contradict_is_refused():
  """(6, 32, 32) beside a norm of 32: six layers, whatever its name."""
  tree = {"layers/q_proj/kernel": jnp.ones((6, 32, 32)), "norm": {"scale": 1.0}}
  tree["norm"]["scale"] = jnp.ones(32)
  with pytest.raises(ValueError, match="1 parameters can be read as different"):
    jlora.training.init_lora(tree, 2)
