# SPDX-License-Identifier: Apache-2.0
"""Trains a small diffusion model of 8 x 8 images, and programs on it.

    x_t = α_t x + σ_t ε,   α_t = cos(πt/2), σ_t = sin(πt/2),   t in [0, 1]

The model predicts x from x_t and t. The schedule approximates Nichol and
Dhariwal's (2021) cosine schedule, without its offset at t = 0. The programs are
style LoRAs and control branches, which are told the digit wanted as a hint.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jlora
from experiments.lib.data.digits import CLASSES, PIXELS, Digits
from experiments.lib.models.loops import schedule
from jlora import training

Model = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Denoiser(nn.Module):
  """A residual MLP: x_t (n, 64) and t (n,) in, x (n, 64) out.

  Attributes:
    width: of the residual stream.
    blocks: how many; each reads the normalised stream, the time, and what is
      asked for, if anything can be.
  """

  width: int = 128
  blocks: int = 2

  @nn.compact
  def __call__(
    self, x: jax.Array, time: jax.Array, asked: jax.Array | None = None
  ) -> jax.Array:
    """Predicts the images before the noise."""
    angle = time[:, None] * jnp.geomspace(1.0, 100.0, 16)[None]
    when = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    if asked is not None:
      heard = nn.silu(nn.Dense(64, name="hear")(asked))
      when = jnp.concatenate([when, heard], axis=-1)
    h = nn.Dense(self.width, name="enter")(jnp.concatenate([x, when], -1))
    for i in range(self.blocks):
      z = jnp.concatenate([nn.LayerNorm(name=f"norm_{i}")(h), when], -1)
      z = nn.silu(nn.Dense(2 * self.width, name=f"up_{i}")(z))
      h = h + nn.Dense(self.width, name=f"down_{i}")(z)
    return nn.Dense(PIXELS, name="exit")(nn.LayerNorm(name="norm")(h))


def init_model(net: Denoiser, key: jax.Array) -> tuple[Model, Any]:
  """Returns the model as a function of its parameters, and initial ones.

  Args:
    net: the denoiser.
    key: PRNG key.

  Returns:
    `(params, x_t (n, 64), t (n,)) -> x (n, 64)`, and params.

  Example:
    >>> model, params = init_model(Denoiser(8, 1), jax.random.key(0))
    >>> model(params, jnp.ones((3, 64)), jnp.zeros(3)).shape
    (3, 64)
  """
  params = net.init(key, jnp.zeros((1, PIXELS)), jnp.zeros(1))["params"]

  def model(params, x, time) -> Any:
    """Predicts clean images."""
    return net.apply({"params": params}, x, time)

  return model, params


def make_loss(model: Model) -> Callable[..., jax.Array]:
  """Returns the loss: the mean squared error of a model's images.

  Args:
    model: `(params, x_t, t) -> x`.

  Returns:
    `(params, x_t (n, 64), t (n,), x (n, 64)) -> ()`.

  Example:
    >>> loss = make_loss(lambda params, x, time: params * x)
    >>> loss(jnp.float32(2), jnp.ones((1, 64)), jnp.ones(1), jnp.ones((1, 64)))
    Array(1., dtype=float32)
  """

  def loss(params, x, time, clean):
    """Computes the mean squared error."""
    return jnp.mean(jnp.square(model(params, x, time) - clean))

  return loss


def make_trainer(
  loss: Callable[..., jax.Array], steps: int, rate: float, batch: int
) -> Callable[..., tuple[Any, float]]:
  """Returns a function that trains all parameters.

  Args:
    loss: of `make_loss`.
    steps: how many.
    rate: Adam's largest learning rate.
    batch: images a step.

  Returns:
    (params, data, key) -> params and the last loss.
  """
  optimiser = schedule(rate, steps)

  def step(params, state, _, *batch):
    """Takes one step."""
    *parts, _ = batch
    value, gradient = jax.value_and_grad(loss)(params, *parts)
    change, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value

  loop = make_loop(step, batch)

  def train(params, data, key):
    """Trains from given parameters."""
    return loop(params, optimiser.init(params), (), data, key, steps)

  return train


def make_program_trainer(
  loss: Callable[..., jax.Array],
  through: Callable[..., jax.Array],
  steps: int,
  rate: float,
  batch: int,
) -> Callable[..., tuple[Any, float]]:
  """Returns a function that trains programs on a frozen base.

  Args:
    loss: `(params, x_t, t, x) -> ()`.
    through: `obeying` or `unasked`.
    steps: how many.
    rate: Adam's largest learning rate.
    batch: images a step.

  Returns:
    (programs, params, data, key) -> programs and the last loss; params may be
    what `jlora.bind` gave: that is frozen too.
  """
  init, update = training.train(loss, schedule(rate, steps), through=through)
  loop = make_loop(update, batch)

  def train(programs, params, data, key):
    """Trains from given programs."""
    return loop(programs, init(programs), params, data, key, steps)

  return train


def denoise(
  model: Model, params: Any, noise: jax.Array, steps: int
) -> jax.Array:
  """Makes images from noise, with no further noise on the way.

      x = clip(model(x_t, t)),   x_s = α_s x + σ_s (x_t - α_t x) / σ_t

  Args:
    model: `(params, x_t, t) -> x`.
    params: its parameters.
    noise: (n, 64), the state at t = 1.
    steps: evaluations of the model, evenly from t = 1 to 1 / steps.

  Returns:
    (n, 64) in [-1, 1].

  Example:
    >>> ones = lambda params, x, time: jnp.ones_like(x)
    >>> float(denoise(ones, (), jnp.zeros((1, 64)), 4).min())
    1.0

  References:
    Song et al. (2021), DDIM with η = 0.
  """

  def step(i, state):
    """Goes one step towards t = 0."""
    now = 1 - i.astype(jnp.float32) / steps
    times = jnp.full(len(state), now)
    clean = jnp.clip(model(params, state, times), -1, 1)
    alpha, sigma = _levels(times)
    rest = (state - alpha * clean) / sigma
    alpha, sigma = _levels(times - 1 / steps)
    return alpha * clean + sigma * rest

  return jnp.clip(jax.lax.fori_loop(0, steps, step, noise), -1, 1)


def control(params: Any, x: jax.Array) -> jax.Array:
  """Computes what a branch writes, from what its layer reads and from the hint.

      silu(x A + hint B) C

  Args:
    params: "net" with "read" (in, h), "hear" (10, h), "write" (h, out), and
      "hint" (n, 10).
    x: (n, in).

  Returns:
    (n, out).
  """
  net = params["net"]
  heard = x @ net["read"] + params["hint"] @ net["hear"]
  return jax.nn.silu(heard) @ net["write"]


def init_control(params: Any, key: jax.Array, hidden: int = 48) -> Any:
  """Makes branches that change nothing yet, wherever a block writes.

  Args:
    params: a Denoiser's.
    key: PRNG key.
    hidden: width of each.

  Returns:
    {path: Branch} without a hint; C is zero, as ControlNet's last layer.
  """
  found = {}
  for path, leaf in jlora.paths.flatten(params).items():
    if path.startswith("down_") and path.endswith("kernel"):
      key, first, second = jax.random.split(key, 3)
      n_in, n_out = leaf.shape
      net = {
        "read": jax.random.normal(first, (n_in, hidden)) / np.sqrt(n_in),
        "hear": jax.random.normal(second, (CLASSES, hidden)),
        "write": jnp.zeros((hidden, n_out)),
      }
      found[path] = jlora.Branch(control, {"net": net})
  return found


def with_hint(branches: Mapping[str, Any], hint: jax.Array) -> dict[str, Any]:
  """Gives branches the hint of this call.

  Args:
    branches: path -> Branch whose params have a "net".
    hint: (n, 10), a row for each row of the batch.

  Returns:
    {path: Branch}.
  """
  return {
    path: dataclasses.replace(
      branch, params={"net": branch.params["net"], "hint": hint}
    )
    for path, branch in branches.items()
  }


def obeying(loss, params, programs, batch, dropout=None) -> jax.Array:
  """Computes a loss with branches; the `through` of `jlora.training.train`.

  Args:
    loss: `(params, *parts) -> ()`.
    params: its parameters.
    programs: {path: Branch} without a hint.
    batch: the parts, then the hint.
    dropout: as for `bind`.

  Returns:
    ().
  """
  *parts, hint = batch
  told = with_hint(programs, hint)
  return training.beside(loss, params, told, tuple(parts), dropout)


def unasked(loss, params, programs, batch, dropout=None) -> jax.Array:
  """Computes a loss with Loras, which see no hint; a `through` as well.

  Args:
    loss: `(params, *parts) -> ()`.
    params: its parameters.
    programs: {path: Lora}.
    batch: the parts, then the hint.
    dropout: as for `bind`.

  Returns:
    ().
  """
  return training.beside(loss, params, programs, batch[:-1], dropout)


def shuffle(loras: jlora.Loras, key: jax.Array) -> jlora.Loras:
  """Shuffles the entries of Loras, and keeps the norm of the change.

  Args:
    loras: path -> Lora.
    key: PRNG key.

  Returns:
    path -> Lora.
  """
  found = {}
  for path, lora in loras.items():
    key, first, second = jax.random.split(key, 3)
    a = jax.random.permutation(first, lora.a.ravel()).reshape(lora.a.shape)
    b = jax.random.permutation(second, lora.b.ravel()).reshape(lora.b.shape)
    other = jlora.Lora(a, b, lora.scale)
    size, now = (jnp.linalg.norm(jlora.loras.dense(x)) for x in (lora, other))
    found[path] = dataclasses.replace(other, scale=lora.scale * size / now)
  return found


def make_loop(step: Callable[..., tuple], batch: int) -> Callable[..., tuple]:
  """Returns training as one compiled program.

  Args:
    step: (trained, state, frozen, x_t, t, x, hint) -> (trained, state, loss),
      hint being one-hot labels (batch, 10).
    batch: images a step, drawn evenly.

  Returns:
    (trained, state, frozen, data, key, steps) -> trained and the mean loss of
    the last tenth of the steps.
  """

  @jax.jit
  def run(trained, state, frozen, images, labels, keys):
    """Takes all steps."""

    def body(carry, key):
      """Draws a batch and takes one step."""
      first, second = jax.random.split(key)
      at = jax.random.randint(first, (batch,), 0, len(labels))
      hint = jax.nn.one_hot(labels[at], CLASSES)
      parts = blur(second, images[at])
      trained, state, loss = step(*carry, frozen, *parts, hint)
      return (trained, state), loss

    (trained, _), losses = jax.lax.scan(body, (trained, state), keys)
    return trained, losses

  def train(trained, state, frozen, data: Digits, key, steps: int):
    """Trains, and averages the last losses."""
    keys = jax.random.split(key, steps)
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    trained, losses = run(trained, state, frozen, images, labels, keys)
    return trained, float(losses[-max(steps // 10, 1) :].mean())

  return train


def blur(key: jax.Array, images: jax.Array) -> tuple[jax.Array, ...]:
  """Adds noise to images, at times drawn evenly.

  Args:
    key: PRNG key.
    images: (n, 64).

  Returns:
    x_t (n, 64), t (n,), and the images.

  Example:
    >>> x, time, clean = blur(jax.random.key(0), jnp.ones((2, 64)))
    >>> x.shape, time.shape
    ((2, 64), (2,))
  """
  first, second = jax.random.split(key)
  time = jax.random.uniform(first, (len(images),))
  alpha, sigma = _levels(time)
  noise = jax.random.normal(second, images.shape)
  return alpha * images + sigma * noise, time, images


def blur_all(
  rng: np.random.Generator, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Adds noise to images as `blur` does, drawn by NumPy.

  Args:
    rng: generator.
    images: (..., 64) float32.

  Returns:
    x_t (..., 64) and t (...), float32.

  Example:
    >>> x, time = blur_all(np.random.default_rng(0), np.ones((3, 2, 64)))
    >>> x.shape, time.shape
    ((3, 2, 64), (3, 2))
  """
  time = rng.random(images.shape[:-1], np.float32)
  angle = np.float32(np.pi / 2) * time[..., None]
  noise = rng.standard_normal(images.shape, np.float32)
  return np.cos(angle) * images + np.sin(angle) * noise, time


def _levels(time):
  """Returns α and σ as columns."""
  angle = jnp.pi / 2 * time[:, None]
  return jnp.cos(angle), jnp.sin(angle)
