# SPDX-License-Identifier: Apache-2.0
"""Small networks of every family, and random orders of their units."""

import functools

import jax
import numpy as np
from flax import linen as nn

from jlora.alignment.layouts import lay_out_units
from jlora.alignment.symmetries import Row, Symmetry, chain, decoder, gpt2
from jlora.models import networks
from jlora.paths import flatten

LLAMA = {
  "model_type": "llama",
  "vocab_size": 32,
  "hidden_size": 24,
  "intermediate_size": 20,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 32,
  "n_embd": 24,
  "n_layer": 1,
  "n_head": 3,
  "n_positions": 16,
}
MIXTURE = {"num_local_experts": 3, "num_experts_per_tok": 2}
LANGUAGE = {
  "llama": ({**LLAMA, "num_hidden_layers": 2}, decoder(4, 2)),
  "llama, tied, biased": (
    {**LLAMA, "tie_word_embeddings": True, "attention_bias": True,
     "mlp_bias": True}, decoder(4, 2)),
  "qwen2": ({**LLAMA, "model_type": "qwen2"}, decoder(4, 2)),
  "qwen3": ({**LLAMA, "model_type": "qwen3"}, decoder(4, 2)),
  "all heads their own": (
    {**LLAMA, "num_key_value_heads": 4}, decoder(4)),
  "one key head": ({**LLAMA, "num_key_value_heads": 1}, decoder(4, 1)),
  "mixtral": ({**LLAMA, **MIXTURE, "model_type": "mixtral"}, decoder(4, 2)),
  "gpt2": (GPT2, gpt2(3)),
}  # fmt: skip


class Mlp(nn.Module):
  """Three dense layers."""

  width: int = 12

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(self.width, name="a")(x))
    x = nn.relu(nn.Dense(self.width + 1, name="b")(x))
    return nn.Dense(5, name="c")(x)


class Convolutions(nn.Module):
  """Two convolutions, norms of both kinds, a flattened image, two dense."""

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=True, name="norm0")(
      nn.Conv(6, (3, 3), name="conv0")(x)
    )
    x = nn.LayerNorm(name="norm1")(nn.Conv(7, (3, 3), name="conv1")(nn.relu(x)))
    x = nn.relu(x).reshape(x.shape[0], -1)
    return nn.Dense(3, name="out")(nn.relu(nn.Dense(8, name="flat")(x)))


class Residual(nn.Module):
  """Convolutions around a stream."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), name="enter")(x)
    for i in range(2):
      y = nn.relu(nn.Conv(5, (3, 3), name=f"up_{i}")(x))
      x = x + nn.Conv(6, (3, 3), name=f"down_{i}")(y)
    return nn.Dense(3, name="exit")(x.mean((1, 2)))


STREAM = Symmetry((
  Row("params/enter/.*", "-, stream"),
  Row(r"params/up_(\d+)/.*", "stream, unit.{0}"),
  Row(r"params/down_(\d+)/.*", "unit.{0}, stream"),
  Row("params/exit/.*", "stream, -"),
))  # fmt: skip

FLAX = {
  "mlp": (Mlp(), (4, 6), chain(["params/a", "params/b", "params/c"])),
  "convolutions": (
    Convolutions(), (2, 4, 5, 3),
    Symmetry((
      Row("batch_stats/norm0/.*", "unit.0"),
      *chain([("params/conv0", "params/norm0"),
              ("params/conv1", "params/norm1"), "params/flat", "params/out"],
             flattened=["params/flat"]).rows,
    ))),
  "residual": (Residual(), (2, 4, 4, 3), STREAM),
}  # fmt: skip

NAMES = (*FLAX, *LANGUAGE)


@functools.cache
def network(name, seed):
  """A function of its input and parameters, parameters, input, symmetry.

  Drawn by NumPy, as initialising would have to be compiled. No bias is zero and
  no scale one: what is not permuted must show.
  """
  rng = np.random.default_rng(0)
  if name in FLAX:
    module, shape, symmetry = FLAX[name]
    x, model = rng.standard_normal(shape, np.float32), module.apply
  else:
    config, symmetry = LANGUAGE[name]
    x = rng.integers(0, 32, (2, 10)).astype(np.int32)
    model = networks.build(config)
    module = model.network
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  rng = np.random.default_rng(seed)

  def fill(leaf):
    if len(leaf.shape) > 1:
      scale = np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
      return rng.standard_normal(leaf.shape, np.float32) * scale
    return rng.uniform(0.2, 1.8, leaf.shape).astype(np.float32)

  params = jax.tree.map(fill, dict(shapes))
  return model, params if name in FLAX else params["params"], x, symmetry


def draw(params, symmetry, seed):
  """Random permutations of all units."""
  rng = np.random.default_rng(seed)
  layout = lay_out_units(symmetry, flatten(params))
  return {
    name: rng.permutation(size)
    if name not in layout.outer
    else np.stack([
      rng.permutation(size) for _ in range(layout.sizes[layout.outer[name]])
    ])
    for name, size in layout.sizes.items()
  }  # fmt: skip


def distance(left, right):
  """The norm of the difference of two trees."""
  squares = jax.tree.map(
    lambda x, y: float(np.sum(np.square(x - y))), left, right
  )
  return sum(jax.tree.leaves(squares)) ** 0.5
