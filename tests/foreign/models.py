# SPDX-License-Identifier: Apache-2.0
"""Small models of packages that nobody here wrote, as functions of parameters.

Each row of MODELS makes a `Model`: `fn(params, inputs)` with rows of a batch
first in inputs and result, and everything random drawn from a fixed key.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 6, 16, 24


class Model(NamedTuple):
  """A model as a pure function.

  Attributes:
    fn: `(params, inputs) -> (ROWS, ...)`.
    params: a pytree of float32 arrays.
    inputs: (ROWS, ...) array.
    is_of_any_dtype: whether it computes in the dtype of its parameters.
  """

  fn: Callable[[Any, Any], jax.Array]
  params: Any
  inputs: Any
  is_of_any_dtype: bool = True


class Row(NamedTuple):
  """A model and the packages that it needs.

  Attributes:
    name: what it is.
    packages: modules that have to be there.
    make: makes it.
  """

  name: str
  packages: tuple[str, ...]
  make: Callable[[], Model]

  @property
  def is_here(self) -> bool:
    """Whether its packages are installed."""
    return all(map(importlib.util.find_spec, self.packages))


def _tokens() -> Any:
  draw = np.random.default_rng(0)
  return jnp.asarray(draw.integers(0, VOCABULARY, (ROWS, LENGTH)))


def _image(channels: int = 3, size: int = 8) -> Any:
  draw = np.random.default_rng(0)
  return jnp.asarray(draw.normal(size=(ROWS, size, size, channels)), "float32")


def _series() -> Any:
  draw = np.random.default_rng(0)
  return jnp.asarray(draw.normal(size=(ROWS, LENGTH, WIDTH)), "float32")


# Flax linen.


def _linen(module, inputs, **options) -> Model:
  variables = module.init(jax.random.key(0), inputs)
  rest = {k: v for k, v in variables.items() if k != "params"}

  def fn(params, inputs):
    return module.apply({"params": params, **rest}, inputs, **options)

  return Model(fn, variables["params"], inputs)


def linen_transformer(is_scanned: bool) -> Model:
  """A decoder of linen's own layers, its blocks scanned or in a row."""
  from flax import linen as nn

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      mask = nn.make_causal_mask(x[..., 0])
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
      y = nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))
      return x + nn.Dense(WIDTH)(nn.gelu(y)), None

  class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(VOCABULARY, WIDTH)
      place = self.param("place", nn.initializers.normal(), (LENGTH, WIDTH))
      x = embed(tokens) + place[None]
      if is_scanned:
        block = nn.scan(
          nn.remat(Block),
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=2,
        )
        x, _ = block(name="blocks")(x, None)
      else:
        for _ in range(2):
          x, _ = Block()(x, None)
      return embed.attend(nn.LayerNorm()(x))

  return _linen(Decoder(), _tokens())


def linen_resnet() -> Model:
  """Convolutions of linen: plain, strided, in groups, depthwise, transposed."""
  from flax import linen as nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(8, (3, 3))(x))
      y = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x))
      x = nn.relu(x + y)
      x = nn.Conv(8, (3, 3), feature_group_count=2)(x)
      x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
      x = nn.Conv(12, (2, 2), strides=(2, 2))(x)
      x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
      return nn.Dense(5)(x.mean((1, 2)))

  return _linen(Net(), _image())


def linen_lstm() -> Model:
  """A recurrent network of linen's cells."""
  from flax import linen as nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      x = nn.Embed(VOCABULARY, WIDTH)(tokens)
      x = nn.RNN(nn.OptimizedLSTMCell(WIDTH))(x)
      return nn.Dense(7)(nn.RNN(nn.GRUCell(12))(x))

  return _linen(Net(), _tokens())


# Flax NNX.


def _nnx(module, inputs, call=None) -> Model:
  from flax import nnx

  graph, params, rest = nnx.split(module, nnx.Param, ...)
  call = call or (lambda module, inputs: module(inputs))

  def fn(params, inputs):
    return call(nnx.merge(graph, params, rest), inputs)

  return Model(fn, params, inputs)


def nnx_transformer(is_scanned: bool) -> Model:
  """A decoder of NNX's own layers, its blocks scanned or in a row."""
  from flax import nnx

  class Block(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
      self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
      self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
      self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
      mask = nnx.make_causal_mask(x[..., 0])
      x = x + self.attention(self.norm(x), mask=mask)
      return x + self.down(nnx.gelu(self.up(x)))

  class Decoder(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
      self.head = nnx.LinearGeneral(WIDTH, (2, 5), rngs=rngs)
      if is_scanned:
        self.blocks = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.fork(split=2))
      else:
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens):
      x = self.embed(tokens)
      if is_scanned:
        scan = nnx.scan(
          lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        x = scan(x, self.blocks)
      else:
        for block in self.blocks:
          x = block(x)
      return self.head(x)

  return _nnx(Decoder(nnx.Rngs(0)), _tokens())


def nnx_convolutions() -> Model:
  """Convolutions of NNX, a table of positions and a class token."""
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.patch = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), rngs=rngs)
      self.token = nnx.Param(jax.random.normal(rngs(), (1, 1, WIDTH)))
      self.place = nnx.Param(jax.random.normal(rngs(), (1, 5, WIDTH)))
      self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
      self.mix = nnx.Conv(
        WIDTH, WIDTH, (3,), feature_group_count=WIDTH, rngs=rngs
      )
      self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x):
      x = self.patch(x).reshape(len(x), 4, WIDTH)
      token = jnp.broadcast_to(self.token[...], (len(x), 1, WIDTH))
      x = jnp.concatenate([token, x], axis=1) + self.place[...]
      x = x + self.mix(self.attention(x))
      return self.head(x[:, 0])

  return _nnx(Net(nnx.Rngs(0)), _image())


# Equinox.


def _equinox(module, inputs) -> Model:
  import equinox as eqx

  params, rest = eqx.partition(module, eqx.is_inexact_array)

  def fn(params, inputs):
    return jax.vmap(eqx.combine(params, rest))(inputs)

  return Model(fn, params, inputs)


def equinox_transformer() -> Model:
  """An encoder of Equinox's layers, which take one row and are vmapped."""
  import equinox as eqx

  keys = jax.random.split(jax.random.key(0), 6)

  class Encoder(eqx.Module):
    embed: Any = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
    norm: Any = eqx.nn.LayerNorm(WIDTH)
    attention: Any = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[1])
    up: Any = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=keys[2])
    down: Any = eqx.nn.Linear(2 * WIDTH, WIDTH, key=keys[3])

    def __call__(self, tokens):
      x = jax.vmap(self.embed)(tokens)
      y = jax.vmap(self.norm)(x)
      x = x + self.attention(y, y, y)
      return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))

  return _equinox(Encoder(), _tokens())


def equinox_network() -> Model:
  """Convolutions, a recurrent cell and a linear layer of Equinox."""
  import equinox as eqx

  keys = jax.random.split(jax.random.key(0), 4)

  class Net(eqx.Module):
    first: Any = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
    grouped: Any = eqx.nn.Conv2d(8, 8, 3, groups=4, key=keys[1])
    cell: Any = eqx.nn.GRUCell(8, 12, key=keys[2])
    last: Any = eqx.nn.Linear(12, 5, key=keys[3])

    def __call__(self, x):
      x = self.grouped(jax.nn.relu(self.first(x.transpose(2, 0, 1))))
      series = x.reshape(8, -1).T
      state = jnp.zeros(12, x.dtype)
      state, _ = jax.lax.scan(
        lambda state, x: (self.cell(x, state), None), state, series
      )
      return self.last(state)

  return _equinox(Net(), _image())


# Haiku.


def _haiku(call, inputs) -> Model:
  import haiku as hk

  net = hk.without_apply_rng(hk.transform(call))
  return Model(net.apply, net.init(jax.random.key(0), inputs), inputs)


def haiku_transformer() -> Model:
  """An encoder of Haiku's layers."""
  import haiku as hk

  def call(tokens):
    x = hk.Embed(VOCABULARY, WIDTH)(tokens)
    start = hk.initializers.VarianceScaling()
    for _ in range(2):
      y = hk.LayerNorm(-1, True, True)(x)
      x = x + hk.MultiHeadAttention(2, 8, w_init=start, model_size=WIDTH)(
        y, y, y
      )
      x = x + hk.nets.MLP([2 * WIDTH, WIDTH])(x)
    return hk.Linear(5)(x)

  return _haiku(call, _tokens())


def haiku_network() -> Model:
  """Convolutions and a recurrent core of Haiku."""
  import haiku as hk

  def call(x):
    x = jax.nn.relu(hk.Conv2D(8, 3)(x))
    x = jax.nn.relu(hk.DepthwiseConv2D(1, 3)(x))
    x = hk.Conv2DTranspose(6, 3)(x)
    series = x.reshape(len(x), -1, 6)
    core = hk.GRU(10)
    start = core.initial_state(len(x)).astype(x.dtype)
    y, _ = hk.dynamic_unroll(core, series, start, time_major=False)
    return hk.Linear(5)(hk.Conv1D(7, 3)(y).mean(1))

  return _haiku(call, _image(size=4))


# Language models of tunix, and qwix.


def _positions(tokens):
  places = jnp.arange(tokens.shape[1])
  mask = places[:, None] >= places[None, :]
  return (
    jnp.broadcast_to(places[None], tokens.shape),
    jnp.broadcast_to(mask[None], (len(tokens), *mask.shape)),
  )


def _tunix_call(module, tokens):
  positions, mask = _positions(tokens)
  return module(tokens, positions, None, mask)[0]


_SIZES = {
  "num_layers": 2, "embed_dim": WIDTH, "hidden_dim": 24, "num_heads": 4,
  "head_dim": 8, "num_kv_heads": 2,
}  # fmt: skip


def tunix_llama3(is_rematerialised: bool = False) -> Model:
  """Llama 3 of tunix."""
  from flax import nnx
  from tunix.models.llama3 import model

  kind = (
    model.RematConfig.BLOCK if is_rematerialised else model.RematConfig.NONE
  )
  config = model.ModelConfig(
    **_SIZES,
    vocab_size=VOCABULARY,
    rope_theta=10_000,
    norm_eps=1e-5,
    remat_config=kind,
  )
  return _nnx(model.Llama3(config, rngs=nnx.Rngs(0)), _tokens(), _tunix_call)


def tunix_qwen3(experts: int | None = None) -> Model:
  """Qwen 3 of tunix, dense or with experts."""
  from flax import nnx
  from tunix.models.qwen3 import model

  config = model.ModelConfig(
    **_SIZES,
    vocab_size=VOCABULARY,
    rope_theta=10_000,
    norm_eps=1e-5,
    use_tied_embedding=True,
    num_experts=experts,
    num_experts_per_tok=experts and 2,
  )
  return _nnx(model.Qwen3(config, rngs=nnx.Rngs(0)), _tokens(), _tunix_call)


def tunix_gemma3() -> Model:
  """Gemma 3 of tunix."""
  from flax import nnx
  from tunix.models.gemma3 import model

  config = model.ModelConfig(
    **_SIZES,
    num_embed=VOCABULARY,
    sliding_window_size=4,
    param_dtype=jnp.float32,
  )
  return _nnx(model.Gemma3(config, rngs=nnx.Rngs(0)), _tokens(), _tunix_call)


def qwix_lora() -> Model:
  """Llama 3 of tunix with qwix's own LoRA in it, which are parameters too."""
  import qwix
  from flax import nnx
  from tunix.models.llama3 import model

  config = model.ModelConfig(
    **_SIZES, vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-5
  )
  plain = model.Llama3(config, rngs=nnx.Rngs(0))
  tokens = _tokens()
  positions, mask = _positions(tokens)
  provider = qwix.LoraProvider(
    module_path=".*q_proj|.*gate_proj|.*down_proj", rank=2, alpha=2.0
  )
  module = qwix.apply_lora_to_model(
    plain, provider, tokens, positions, None, mask
  )
  return _nnx(module, tokens, _tunix_call)


# Others.


def penzai_llama() -> Model:
  """A Llama of penzai, whose arrays have named axes."""
  import penzai.pz as pz
  from penzai.models.transformer.variants import llamalike_common as common

  config = common.LlamalikeTransformerConfig(
    num_kv_heads=2,
    query_head_multiplier=2,
    embedding_dim=WIDTH,
    projection_dim=8,
    mlp_hidden_dim=24,
    num_decoder_blocks=2,
    vocab_size=VOCABULARY,
    mlp_variant="swiglu",
    tie_embedder_and_logits=False,
    parameter_dtype=jnp.float32,
    activation_dtype=jnp.float32,
    use_layer_stack=True,
  )
  model = common.build_llamalike_transformer(
    config, init_base_rng=jax.random.key(0)
  )
  bare, params = pz.unbind_params(model, freeze=True)
  leaves, tree = jax.tree.flatten(params)
  names = [param.label for param in params]

  def fn(params, tokens):
    values = jax.tree.unflatten(tree, [params[name] for name in names])
    own = pz.bind_variables(bare, values)
    inputs = pz.nx.wrap(tokens).tag("batch", "seq")
    return own(inputs, token_positions=pz.nx.arange("seq", LENGTH)).unwrap(
      "batch", "seq", "vocabulary"
    )

  params = dict(zip(names, leaves, strict=True))
  return Model(fn, params, _tokens(), is_of_any_dtype=False)


def keras_network() -> Model:
  """Convolutions and attention of Keras."""
  import os

  os.environ["KERAS_BACKEND"] = "jax"
  import keras

  keras.utils.set_random_seed(0)
  layers = keras.layers
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(8, 3, activation="relu")(inputs)
  x = layers.SeparableConv2D(8, 3)(x)
  x = layers.Reshape((16, 8))(x)
  x = x + layers.MultiHeadAttention(2, 4)(x, x)
  x = layers.EinsumDense("abc,cd->abd", (16, 12))(x)
  model = keras.Model(inputs, layers.Dense(5)(layers.GRU(6, unroll=True)(x)))
  names = [v.path for v in model.trainable_variables]
  params = {v.path: v.value for v in model.trainable_variables}
  rest = [v.value for v in model.non_trainable_variables]

  def fn(params, x):
    return model.stateless_call([params[name] for name in names], rest, x)[0]

  return Model(fn, params, _image())


MODELS: tuple[Row, ...] = (
  Row("flax linen decoder", ("flax",), lambda: linen_transformer(False)),
  Row("flax linen decoder, scan and remat", ("flax",),
      lambda: linen_transformer(True)),
  Row("flax linen convolutions", ("flax",), linen_resnet),
  Row("flax linen LSTM and GRU", ("flax",), linen_lstm),
  Row("flax NNX decoder", ("flax",), lambda: nnx_transformer(False)),
  Row("flax NNX decoder, vmap and scan", ("flax",),
      lambda: nnx_transformer(True)),
  Row("flax NNX vision transformer", ("flax",), nnx_convolutions),
  Row("equinox encoder", ("equinox",), equinox_transformer),
  Row("equinox convolutions and GRU", ("equinox",), equinox_network),
  Row("haiku encoder", ("haiku",), haiku_transformer),
  Row("haiku convolutions and GRU", ("haiku",), haiku_network),
  Row("tunix llama3", ("tunix",), tunix_llama3),
  Row("tunix llama3, remat", ("tunix",), lambda: tunix_llama3(True)),
  Row("tunix qwen3", ("tunix",), tunix_qwen3),
  Row("tunix qwen3, experts", ("tunix",), lambda: tunix_qwen3(4)),
  Row("tunix gemma3", ("tunix",), tunix_gemma3),
  Row("qwix LoRA on tunix llama3", ("qwix", "tunix"), qwix_lora),
  Row("penzai llama", ("penzai",), penzai_llama),
  Row("keras network", ("keras",), keras_network),
)  # fmt: skip
