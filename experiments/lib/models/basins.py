# SPDX-License-Identifier: Apache-2.0
"""Trains small networks from different starts; walks the line between two."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib.data import digits, texts
from experiments.lib.models import finetunes
from jlora import models
from jlora.alignment import Symmetry, chain, decoder
from jlora.models import Model

Params = Any


class Task(NamedTuple):
  """A network to train from several starts, and how it is judged.

  Attributes:
    name: in tables.
    start: seed -> parameters.
    train: (parameters, seed, steps) -> parameters.
    loss: parameters -> nats, on what was held out.
    activate: parameters -> path of a kernel or norm -> what comes out of it,
      (samples, out), on what was trained on.
    symmetry: of the network.
    steps: of training; finetuning takes a third of them.
  """

  name: str
  start: Callable[[int], Params]
  train: Callable[[Params, int, int], Params]
  loss: Callable[[Params], float]
  activate: Callable[[Params], dict[str, np.ndarray]]
  symmetry: Symmetry
  steps: int


def digits_task(width: int, steps: int) -> Task:
  """Makes the task of an MLP that classifies scikit-learn's digits.

  Args:
    width: of both.
    steps: updates of 128 images.

  Returns:
    Task.

  Example:
    >>> task = digits_task(8, 2)
    >>> params = task.train(task.start(0), 0, 2)
    >>> task.activate(params)["b/kernel"].shape
    (256, 8)
  """
  one, two, held = digits.split_digits(0)
  data = digits.join(one, two)
  images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
  test = jnp.asarray(held.images), jnp.asarray(held.labels)
  layers = ("a", "b", "c")

  def start(seed):
    """Draws parameters."""
    sizes = (digits.PIXELS, width, width, digits.CLASSES)
    rng = np.random.default_rng(seed)
    return {
      name: {
        "kernel": np.float32((2 / shape[0]) ** 0.5)
        * rng.standard_normal(shape, np.float32),
        "bias": np.zeros(shape[1], np.float32),
      }
      for name, shape in zip(layers, itertools.pairwise(sizes), strict=True)
    }

  def hidden(params, x):
    """Returns the outputs of both hidden layers."""
    found = []
    for name in layers[:-1]:
      x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
      found.append(x)
    return found

  @jax.jit
  def loss(params, x, y):
    """Computes the cross entropy."""
    logits = hidden(params, x)[-1] @ params["c"]["kernel"] + params["c"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def train(params, seed, steps):
    """Trains on all but the held-out images."""
    keys = jax.random.split(jax.random.key(seed), steps)
    return _fit(loss, params, keys, images, labels)

  return Task(
    f"MLP of width {width}",
    start,
    train,
    lambda params: float(loss(params, *test)),
    lambda params: {
      f"{name}/kernel": np.asarray(x)
      for name, x in zip(layers, hidden(params, images[:256]), strict=False)
    },
    chain(layers),
    steps,
  )


def text_task(
  config: dict[str, Any], steps: int, domain: str, cache: str | None
) -> Task:
  """Makes the task of a byte-level Llama that continues a text.

  Args:
    config: content of config.json.
    steps: updates of 8 x 128 bytes.
    domain: of `texts.CORPORA`.
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    Task.
  """
  read, held = texts.parts(domain, cache)
  rows = functools.partial(texts.excerpts, encode=texts.encode_bytes)
  held_rows = jnp.asarray(rows(held, rows=32, length=128))
  model = models.init(config, jax.random.key(0))[0]

  def train(params, seed, steps):
    """Finetunes all parameters on excerpts."""
    # The seed determines where excerpts begin, and their order.
    lessons = rows(read, rows=8 * steps, length=128, seed=seed)
    return finetunes.finetune(
      model, params, texts.batches(lessons, 8, seed),
      steps=steps, learning_rate=3e-3, train=lambda path: True,
    )  # fmt: skip

  run = jax.jit(functools.partial(outputs, model))
  sample = jnp.asarray(rows(read, rows=8, length=128)[:, :-1])
  return Task(
    f"Llama of width {config['hidden_size']}",
    lambda seed: models.init(config, jax.random.key(seed))[1],
    train,
    lambda params: float(_text_loss(model, params, held_rows)),
    lambda params: jax.tree.map(np.asarray, run(params, sample)),
    decoder(config["num_attention_heads"], config["num_key_value_heads"]),
    steps,
  )


_text_loss = jax.jit(finetunes.nll, static_argnums=0)


def outputs(
  model: Model, params: Params, tokens: jax.Array
) -> dict[str, jax.Array]:
  """Returns the outputs of a decoder's modules that permutations act on.

  Args:
    model: of the Llama family.
    params: nested dict.
    tokens: (batch, time) int32.

  Returns:
    path of the kernel, scale or embedding -> (batch * time, out). Of MLPs the
    two factors of the gated product, of attention q, k and v before they are
    turned, of the stream what the norms let through.
  """
  _, kept = model.network.apply(
    {"params": params}, tokens, capture_intermediates=True,
    mutable=["intermediates"],
  )  # fmt: skip
  found = {}

  def gather(tree, path, own):
    """Collects the outputs under the paths of their parameters."""
    for name, value in tree.items():
      if name != "__call__":
        gather(value, f"{path}{name}/", own[name])
      elif leaf := next((n for n in ("kernel", "scale") if n in own), None):
        found[path + leaf] = value[0].reshape(-1, value[0].shape[-1])

  gather(kept["intermediates"], "", params)
  return {
    path: x
    for path, x in found.items()
    if not path.endswith(("o/kernel", "down/kernel", "head/kernel"))
  }


def walk(
  loss: Callable[[Params], float], a: Params, b: Params, points: int
) -> list[float]:
  """Computes the loss at evenly spaced points of the line from a to b.

      L((1 - λ) a + λ b),   λ = 0, 1 / (points - 1), ..., 1

  Args:
    loss: of parameters.
    a: a pytree.
    b: the same structure.
    points: how many, both ends included.

  Returns:
    As many numbers.

  Example:
    >>> walk(lambda w: float(w**2), np.float32(-1), np.float32(1), 3)
    [1.0, 0.0, 1.0]
  """
  return [
    loss(jax.tree.map(lambda x, y, t=t: (1 - t) * x + t * y, a, b))
    for t in np.linspace(0, 1, points, dtype=np.float32)
  ]


def barrier(losses: Sequence[float]) -> float:
  """Computes how far the loss on a line rises above the mean of its ends.

      max_λ L(λ) - (L(0) + L(1)) / 2

  Args:
    losses: of `walk`.

  Returns:
    nats; negative only if the ends differ and nothing between is higher.

  Example:
    >>> barrier([1.0, 4.0, 2.0])
    2.5

  References:
    Ainsworth et al. (2022), definition 2.2.
  """
  return max(losses) - (losses[0] + losses[-1]) / 2


@functools.partial(jax.jit, static_argnums=0)
def _fit(loss, params, keys, images, labels):
  """Trains parameters by Adam on random batches of 128."""
  optimiser = optax.adam(optax.cosine_decay_schedule(1e-3, len(keys)))

  def step(carry, key):
    """Takes one step."""
    params, state = carry
    at = jax.random.randint(key, (128,), 0, len(labels))
    gradient = jax.grad(loss)(params, images[at], labels[at])
    change, state = optimiser.update(gradient, state)
    return (optax.apply_updates(params, change), state), None

  carry = (params, optimiser.init(params))
  return jax.lax.scan(step, carry, keys)[0][0]
