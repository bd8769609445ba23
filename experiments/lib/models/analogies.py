# SPDX-License-Identifier: Apache-2.0
"""Visual analogies, a : a' :: b : ?, on digits of 8 x 8 pixels.

A task turns or mirrors a digit, thickens it or not, inverts it or not, and in
the larger set shifts it. The base reads a, a' and b, and has learned to copy b.
A frozen encoder of single images gives the query that mixes a basis of LoRAs.
Tasks that are held out are new combinations of parts that were seen.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.lib.data.digits import (
  CLASSES,
  PIXELS,
  join,
  split_digits,
  thicken,
)
from experiments.lib.models.loops import compile_steps, schedule, whole_run
from jlora.adapting import adapt, bind
from jlora.loras import Lora
from jlora.routing import (
  Basis,
  adapt_basis,
  as_basis,
  as_programs,
  coefficients,
  init_basis,
  mixed,
)
from jlora.training import train

MEASURES = {
  "seen": "seen tasks, right",
  "unseen": "new combinations, right",
  "other": "seen, with another's analogy",
  "seen error": "seen, squared error",
  "unseen error": "new, squared error",
}
#: Turned or mirrored, thickened, inverted, shifted: how many of each.
PARTS = (8, 2, 2, 3)


class Size(NamedTuple):
  """How much is computed.

  Attributes:
    shifts: 1 has no shifts and 32 tasks, 3 has 96.
    held: tasks that are held out.
    width: of the editor.
    seen: width of the encoder's answer.
    base: training steps of the editor and of the encoder.
    steps: of adapters.
    batch: analogies a step.
    rate: largest learning rate.
    count: analogies a task in the test.
  """

  shifts: int = 1
  held: int = 8
  width: int = 192
  seen: int = 64
  base: int = 1000
  steps: int = 2000
  batch: int = 64
  rate: float = 3e-3
  count: int = 60


FULL = Size()
LARGE = Size(3, 24, steps=6000)
SMOKE = Size(1, 8, 16, 8, 3, 3, 8, count=2)
LARGE_SMOKE = SMOKE._replace(shifts=3, held=24)


class Method(NamedTuple):
  """What is trained.

  Attributes:
    count: N, items of the basis; 0 is one LoRA.
    rank: r of each.
    scale: α/r.
    mix: (basis, query) -> weights.
  """

  count: int
  rank: int
  scale: float
  mix: Callable[..., Any] = coefficients


def evenly(basis: Basis, query: jax.Array) -> dict[str, jax.Array]:
  """Mixes all items alike, whatever is asked."""
  return {
    path: jnp.full((len(query), keys.shape[-2]), 1.0 / keys.shape[-2])
    for path, keys in basis.keys.items()
  }


by_tanh = functools.partial(coefficients, activation=jnp.tanh)
ONE = "one LoRA of rank 32"
EVEN = "N = 16, r = 2, uniform gates"
#: Every method has 32 units in each module.
METHODS = {
  ONE: Method(0, 32, 1.0),
  "N = 32, r = 1": Method(32, 1, 8.0),
  "N = 16, r = 2": Method(16, 2, 4.0),
  "N = 4, r = 8": Method(4, 8, 2.0),
  "N = 16, r = 2, tanh": Method(16, 2, 1.0, by_tanh),
  EVEN: Method(16, 2, 16.0, evenly),
}
#: What is compared on the larger set.
LARGE_METHODS = (ONE, "N = 32, r = 1", "N = 16, r = 2", "N = 16, r = 2, tanh")


class Editor(nn.Module):
  """A residual MLP: three images (n, 192) in, one (n, 64) out.

  Attributes:
    width: of the residual stream.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Draws b'."""
    h = nn.Dense(self.width, name="enter")(x)
    for i in range(2):
      z = nn.Dense(2 * self.width, name=f"up_{i}")(nn.LayerNorm()(h))
      h = h + nn.Dense(self.width, name=f"down_{i}")(nn.silu(z))
    return nn.Dense(PIXELS, name="exit")(nn.LayerNorm()(h))


class Encoder(nn.Module):
  """Reads one image; says what was done to it, and which digit it is.

  Attributes:
    width: of what it makes of an image.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the image's code, and logits of each part and of the digit."""
    h = nn.relu(nn.Dense(2 * self.width)(x))
    code = jnp.tanh(nn.Dense(self.width)(h))
    return code, [nn.Dense(size)(code) for size in (*PARTS, CLASSES)]


class Task(NamedTuple):
  """All images of a seed, changed in every way.

  Attributes:
    parts: (T, 4), of which parts each task is made.
    images: (T, n, 64) to learn from.
    held: (T, m, 64) held out.
    codes: the encoder's, of both.
    params: of the editor, which copies.
    seen: tasks that are trained.
    unseen: the others.
  """

  parts: np.ndarray
  images: np.ndarray
  held: np.ndarray
  codes: tuple[np.ndarray, np.ndarray]
  params: Any
  seen: np.ndarray
  unseen: np.ndarray


def change(images: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
  """Changes images (n, 64) by a task's parts.

  Example:
    >>> dot = -np.ones((1, 64), np.float32)
    >>> dot[0, 7] = 1
    >>> int(change(dot, (1, 0, 0, 0)).argmax())
    0
  """
  turn, thick, inverted, shift = parts
  square = (thicken(images) if thick else images).reshape(-1, 8, 8)
  square = np.rot90(square, turn % 4, axes=(1, 2))
  square = square[:, :, ::-1] if turn >= 4 else square
  square = np.roll(square, (0, 1, -1)[shift], axis=2)
  found = np.ascontiguousarray(-square if inverted else square)
  return found.reshape(images.shape)


def hold_out(rng: np.random.Generator, parts: np.ndarray, count: int):
  """Draws tasks to hold out, so that every part is in tasks that are left.

  Args:
    rng: generator.
    parts: (T, 4); the first task changes nothing and is never held out.
    count: how many.

  Returns:
    Numbers of seen and of unseen tasks.

  Example:
    >>> parts = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    >>> seen, unseen = hold_out(np.random.default_rng(0), parts, 1)
    >>> len(seen), len(unseen)
    (3, 1)
  """
  while True:
    unseen = np.sort(1 + rng.permutation(len(parts) - 1)[:count])
    seen = np.setdiff1d(np.arange(len(parts)), unseen)
    if all(set(x) == set(y) for x, y in zip(parts.T, parts[seen].T,
                                           strict=True)):  # fmt: skip
      return seen, unseen


@functools.cache
def open_task(seed: int, size: Size) -> Task:
  """Changes all digits, and trains the editor and the encoder of a seed."""
  one, two, held = split_digits(seed)
  data = join(one, two)
  sizes = (*PARTS[:3], size.shifts)
  parts = np.array([*itertools.product(*map(range, sizes))])
  images, others = (
    np.stack([change(x, tuple(own)) for own in parts])
    for x in (data.images, held.images)
  )
  rng = np.random.default_rng([seed, 0])
  seen, unseen = hold_out(rng, parts, size.held)
  read = _train_encoder(seed, size, parts, images, data.labels)
  params = _train_editor(seed, size, images[0])
  return Task(
    parts, images, others, (read(images), read(others)), params, seen, unseen
  )


def _train_encoder(seed, size: Size, parts, images, labels):
  """Trains the encoder; returns images (T, n, 64) -> codes."""
  rng = np.random.default_rng([seed, 1])
  shape = size.base, 2 * size.batch
  task = rng.integers(0, len(parts), shape)
  at = rng.integers(0, len(labels), shape)
  wanted = np.concatenate([parts[task], labels[at][..., None]], -1)
  net = Encoder(size.seen)
  params = net.init(jax.random.key(seed), images[0, :1])
  run = whole_run(_encoder_loss(size), 3e-3, size.base)
  params, losses = run(params, (), (images[task, at], wanted))
  last = float(np.mean(np.asarray(losses)[-10:]))
  print(f"encoder of seed {seed}: {last:.3f} nats", flush=True)
  read: Any = jax.jit(lambda x: net.apply(params, x))
  return lambda x: np.stack([np.asarray(read(own)[0]) for own in x])


@functools.cache
def _encoder_loss(size: Size):
  """Returns (params, images, (n, 5) integers) -> the sum of all losses."""
  net = Encoder(size.seen)

  def loss(params, images, wanted):
    """Computes it."""
    _, each = net.apply(params, images)
    return sum(
      _cross_entropy(logits, wanted[:, i]) for i, logits in enumerate(each)
    )

  return loss


def _cross_entropy(logits, wanted):
  """Computes the mean cross entropy."""
  places = jax.nn.one_hot(wanted, logits.shape[-1], dtype=logits.dtype)
  return -(jax.nn.log_softmax(logits) * places).sum(-1).mean()


@functools.cache
def make_functions(size: Size) -> tuple[Callable, Callable]:
  """Returns (params, x (n, 192)) -> (n, 64), and (params, x, y) -> ()."""
  net = Editor(size.width)

  def draw(params, x) -> Any:
    """Draws b'."""
    return net.apply({"params": params}, x)

  def loss(params, x, y):
    """Computes the mean squared error."""
    return jnp.mean(jnp.square(draw(params, x) - y))

  return draw, loss


def _train_editor(seed: int, size: Size, images: np.ndarray) -> Any:
  """Trains the editor to copy b, beside an a that equals a'."""
  rng = np.random.default_rng([seed, 2])
  at = rng.integers(0, len(images), (2, size.base, size.batch))
  a, b = images[at]
  net = Editor(size.width)
  params = net.init(jax.random.key(seed), np.zeros((1, 3 * PIXELS)))["params"]
  run = whole_run(make_functions(size)[1], 2e-3, size.base)
  params, losses = run(params, (), (np.concatenate([a, a, b], -1), b))
  last = float(np.mean(np.asarray(losses)[-10:]))
  print(f"editor of seed {seed}: {last:.4f}", flush=True)
  return params


@functools.cache
def _basis_run(size: Size, mix: Any):
  """Compiles the training of a basis, or of Loras where mix is None.

  Batches are numbers of tasks and of images; tables are read in the loop.
  """
  loss = make_functions(size)[1]
  rule = schedule(size.rate, size.steps)
  more: Any = (
    {} if mix is None else {"through": functools.partial(mixed, mix=mix)}
  )
  init, update = train(loss, rule, **more)

  def step(programs, state, params, images, codes, task, i, j):
    """Looks a batch up, and takes a step."""
    x, y, query = look_up(images, codes, task, i, j)
    asked = () if mix is None else (query,)
    return update(programs, state, params, *asked, x, y)

  return compile_steps(init, step)


def look_up(images, codes, task, i, j) -> tuple[Any, Any, Any]:
  """Looks up analogies of tasks (n,) on images i and j.

  Args:
    images: (T, n, 64).
    codes: (T, n, d).
    task: (n,) integers.
    i: (n,) of a.
    j: (n,) of b.

  Returns:
    a, a' and b (n, 192), b' (n, 64), and their codes (n, 3 d).
  """
  places = ((0, i), (task, i), (0, j))
  x, query = (
    jnp.concatenate([table[at] for at in places], axis=-1)
    for table in (images, codes)
  )
  return x, images[task, j], query


def make_start(
  task: Task, size: Size, method: Method, seed: int
) -> dict[str, Any]:
  """Makes a basis, or one LoRA whose units are those of a basis.

  Args:
    task: for the editor.
    size: for the encoder.
    method: sizes.
    seed: of the start: bases of the same sizes begin alike.

  Returns:
    path -> Lora or Gated.
  """
  count = method.count or 16
  basis = init_basis(
    task.params, jax.random.key(seed), n=count, rank=32 // count,
    d_query=3 * size.seen, d_key=64, alpha=method.scale * (32 // count),
  )  # fmt: skip
  if method.count:
    return as_programs(basis)
  flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
  one = jnp.float32(method.scale)
  return {
    path: Lora(flat(x.a), flat(x.b), one) for path, x in basis.loras.items()
  }


def train_method(
  task: Task, size: Size, method: Method, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
  """Trains a method on the seen tasks; returns its programs and losses."""
  rng = np.random.default_rng([seed, 3])
  shape = size.steps, size.batch
  batches = (
    task.seen[rng.integers(0, len(task.seen), shape)].astype(np.int32),
    *rng.integers(0, task.images.shape[1], (2, *shape), np.int32),
  )
  run = _basis_run(size, method.mix if method.count else None)
  frozen = task.params, jnp.asarray(task.images), jnp.asarray(task.codes[0])
  start = make_start(task, size, method, seed)
  programs, losses = run(start, frozen, batches)
  return programs, np.asarray(losses)


@functools.cache
def _drawing(size: Size, mix: Any):
  """Compiles the drawing of many analogies."""
  draw = make_functions(size)[0]
  if mix is None:
    return jax.jit(
      lambda params, loras, _, x: adapt(draw)(bind(params, loras), x)
    )
  return jax.jit(adapt_basis(draw, mix=mix))


def examine(
  task: Task,
  size: Size,
  method: Method,
  programs: Any,
  seed: int,
  *,
  is_other: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws held-out digits by all tasks.

  Args:
    task: of the seed.
    size: how many.
    method: for its mix.
    programs: trained.
    seed: of the digits.
    is_other: whether the query is that of another analogy, of a seen task.

  Returns:
    (T,) squared errors, and the shares of drawings to which, of what all tasks
    make of the digit, the right one is nearest.
  """
  rng = np.random.default_rng([seed, 4])
  count, digits = len(task.parts), task.held.shape[1]
  which = np.repeat(np.arange(count), size.count)
  i, j = rng.integers(0, digits, (2, len(which)))
  x, y, query = look_up(task.held, task.codes[1], which, i, j)
  if is_other:
    others = np.stack([rng.permutation(task.seen[task.seen != t])[0]
                       for t in which])  # fmt: skip
    k = rng.integers(0, digits, len(which))
    query = look_up(task.held, task.codes[1], others, k, i)[2]
  mix = method.mix if method.count else None
  parts = as_basis(programs) if method.count else programs
  drawn = np.asarray(_drawing(size, mix)(task.params, parts, query, x))
  errors = np.mean((drawn - y) ** 2, axis=-1).reshape(count, -1)
  away = ((drawn[None] - task.held[:, j]) ** 2).sum(-1)
  right = (away.argmin(0) == which).reshape(count, -1)
  return errors.mean(1), right.mean(1)


@functools.cache
def _trained(seed: int, size: Size, name: str):
  """Trains a method of METHODS once."""
  return train_method(open_task(seed, size), size, METHODS[name], seed)


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Trains a method, and computes its figures.

  Args:
    name: of METHODS.
    seed: of digits, tasks held out, starts and batches.
    size: how much is computed.

  Returns:
    "figures"; "tasks", the share right of every seen and unseen task; for
    uniform gates "apart", how far losses are from those of one LoRA at most.
  """
  task, method = open_task(seed, size), METHODS[name]
  programs, losses = _trained(seed, size, name)
  errors, right = examine(task, size, method, programs, seed)
  figures = {
    "seen": float(right[task.seen].mean()),
    "unseen": float(right[task.unseen].mean()),
    "seen error": float(errors[task.seen].mean()),
    "unseen error": float(errors[task.unseen].mean()),
  }
  more: dict[str, Any] = {
    "tasks": {
      "seen": right[task.seen].tolist(), "unseen": right[task.unseen].tolist()
    }
  }  # fmt: skip
  if method.count and method.mix is not evenly:
    _, other = examine(task, size, method, programs, seed, is_other=True)
    figures["other"] = float(other[task.seen].mean())
  if name == EVEN:
    apart = np.abs(losses / _trained(seed, size, ONE)[1] - 1)
    more["apart"] = float(apart.max())
  return {"figures": figures, **more}
