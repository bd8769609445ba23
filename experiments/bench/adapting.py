# SPDX-License-Identifier: Apache-2.0
"""What does `adapt` cost beside LoRAs written by hand: to trace, compile, run?

  python -m experiments.bench.adapting [--layers=12] [--quick]

A Llama of unrolled layers in plain JAX, LoRAs on all seven matrices of each.
The programs take turns in one process: the base alone; the products written by
hand, x w + ((x aᵀ) g) b; `bind` and `adapt`, which know nothing of the model;
and qwix's LoRA on the same layers in Flax, if it is installed. Each is traced
and compiled with JAX's caches cleared. Values and gradients by a and b must
agree before anything is timed.

Takes 4 minutes on two cores. Expect to trace in less than twice the base's
time, and to run in the time of the products by hand.
"""

import functools
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jlora

BASE, HAND, OURS = "the base alone", "by hand", "bind and adapt"
Program = Callable[[Any, Any, jax.Array], Any]
Product = Callable[[jax.Array, str], jax.Array]


class Sizes(NamedTuple):
  """The sizes of the model, of its batch and of the adapter.

  Attributes:
    layers: unrolled.
    width: of the stream.
    inner: of the feed-forward part.
    heads: of queries; keys and values have half as many.
    vocabulary: number of tokens.
    rows: of the batch.
    length: of a row.
    rank: of every LoRA.
    turns: timed runs.
  """

  layers: int = 12
  width: int = 256
  inner: int = 688
  heads: int = 8
  vocabulary: int = 512
  rows: int = 4
  length: int = 128
  rank: int = 8
  turns: int = 15


QUICK = Sizes(2, 32, 48, 4, 64, 2, 8, 2, 2)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, int]]:
  """Returns the shape of every matrix of the layers by its name."""
  d, f = sizes.width, sizes.inner
  own = {
    "q": (d, d), "k": (d, d // 2), "v": (d, d // 2), "o": (d, d),
    "gate": (d, f), "up": (d, f), "down": (f, d),
  }  # fmt: skip
  return {
    f"{i}_{name}": shape
    for i in range(sizes.layers)
    for name, shape in own.items()
  }


def draw(sizes: Sizes) -> tuple[dict[str, jax.Array], jlora.Loras]:
  """Draws parameters, and LoRAs on all matrices of the layers."""
  keys = iter(jax.random.split(jax.random.key(0), 3 * 7 * sizes.layers + 1))

  def normal(*shape):
    """Draws one array."""
    return jax.random.normal(next(keys), shape) / shape[-1] ** 0.5

  params = {"embed": normal(sizes.vocabulary, sizes.width)}
  loras = {}
  for name, (rows, columns) in shapes_of(sizes).items():
    params[name] = normal(rows, columns)
    a, b = normal(sizes.rank, rows), normal(sizes.rank, columns)
    loras[name] = jlora.Lora(a, b, jnp.float32(0.5))
  return params, loras


def forward(
  sizes: Sizes, embed: jax.Array, tokens: jax.Array, product: Product
) -> jax.Array:
  """Runs the model; returns logits.

  Args:
    sizes: of the model.
    embed: (vocabulary, width), also the head.
    tokens: (rows, length).
    product: multiplies by the matrix of a name.

  Returns:
    (rows, length, vocabulary).
  """
  x, heads = embed[tokens], sizes.heads
  lead = tokens.shape
  mask = jnp.tril(jnp.ones((lead[1], lead[1]), bool))
  for i in range(sizes.layers):
    h = _normed(x)
    q, k, v = (
      product(h, f"{i}_{name}").reshape(*lead, -1, sizes.width // heads)
      for name in "qkv"
    )
    q, k = _turned(q), _turned(k)
    k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e9))
    mixed = jnp.einsum("bhts,bshd->bthd", scores, v).reshape(*lead, -1)
    x = x + product(mixed, f"{i}_o")
    h = _normed(x)
    inner = jax.nn.silu(product(h, f"{i}_gate")) * product(h, f"{i}_up")
    x = x + product(inner, f"{i}_down")
  return _normed(x) @ embed.T


def _normed(x):
  """Divides by the root of the mean square."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _turned(x):
  """Turns queries or keys by their place."""
  half = x.shape[-1] // 2
  places, steps = (jnp.arange(n, dtype=jnp.float32) for n in (x.shape[1], half))
  angles = places[:, None] * 1e4 ** -(steps / half)[None]
  cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
  one, two = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], -1)


def list_programs(sizes: Sizes) -> dict[str, Program]:
  """Returns `(loras, params, tokens) -> logits` of each kind, by name."""

  def base(params, tokens):
    """The model, which knows no LoRA."""
    product = lambda x, name: x @ params[name]  # noqa: E731
    return forward(sizes, params["embed"], tokens, product)

  def by_hand(loras, params, tokens):
    """The model with LoRAs in its products."""

    def product(x, name):
      """Multiplies by a matrix and its LoRA."""
      lora = loras[name]
      return x @ params[name] + ((x @ lora.a.T) * lora.scale) @ lora.b

    return forward(sizes, params["embed"], tokens, product)

  def adapted(loras, params, tokens):
    """The model as it is, adapted."""
    return jlora.adapt(base, strict=True)(jlora.bind(params, loras), tokens)

  found: dict[str, Program] = {
    BASE: lambda loras, params, tokens: base(params, tokens),
    HAND: by_hand,
    OURS: adapted,
  }
  if importlib.util.find_spec("qwix"):
    found["qwix"] = _by_qwix(sizes)
  return found


class _InFlax(nn.Module):
  """The same model, its matrices in Dense layers."""

  sizes: Sizes

  @nn.compact
  def __call__(self, embed, tokens):
    """Runs the model; the embedding is given."""
    columns = {name: s[1] for name, s in shapes_of(self.sizes).items()}
    product = lambda x, name: nn.Dense(  # noqa: E731
      columns[name], use_bias=False, name=name
    )(x)
    return forward(self.sizes, embed, tokens, product)


def _by_qwix(sizes: Sizes) -> Program:
  """Returns the model with qwix's LoRA on its Dense layers."""
  qwix: Any = importlib.import_module("qwix")
  rule = qwix.LoraProvider(
    module_path=".*", rank=sizes.rank, alpha=sizes.rank / 2
  )
  model = qwix.apply_lora_to_model(_InFlax(sizes), rule)

  def run(loras, params, tokens):
    """Runs it with our factors under its names."""
    own = {
      name: {
        "kernel": params[name], "kernel_lora_a": lora.a.T,
        "kernel_lora_b": lora.b,
      }
      for name, lora in loras.items()
    }  # fmt: skip
    return model.apply({"params": own}, params["embed"], tokens)

  return run


def with_gradient(program: Program) -> Program:
  """Returns the gradient of a loss by a and b of every LoRA."""

  def run(loras, params, tokens):
    """Computes the gradient."""

    def loss(factors):
      """A smooth function of all logits."""
      own = {
        name: jlora.Lora(a, b, loras[name].scale)
        for name, (a, b) in factors.items()
      }
      return jnp.mean(jnp.sin(program(own, params, tokens)))

    return jax.grad(loss)({name: (x.a, x.b) for name, x in loras.items()})

  return run


def with_gradient_of_base(program: Program) -> Program:
  """Returns the gradient of the same loss by the base's matrices."""

  def run(loras, params, tokens):
    """Computes the gradient."""
    rest = {k: v for k, v in params.items() if k not in loras}

    def loss(own):
      """A smooth function of all logits."""
      return jnp.mean(jnp.sin(program(loras, {**rest, **own}, tokens)))

    return jax.grad(loss)({name: params[name] for name in loras})

  return run


def measure(
  programs: dict[str, Program], args: tuple[Any, ...], turns: int
) -> dict[str, dict[str, list[float]]]:
  """Times tracing, compiling and running of programs, in turns.

  Args:
    programs: by name.
    args: of each.
    turns: timed runs; tracing and compiling have four at most.

  Returns:
    name -> {"trace", "compile", "run"} in seconds, of processor time for the
    first two.
  """
  spent: dict[str, dict[str, list[float]]] = {
    name: {"trace": [], "compile": [], "run": []} for name in programs
  }
  compiled = {}
  for _ in range(min(turns, 4)):
    for name, program in programs.items():
      jax.clear_caches()
      gc.collect()
      # A function of its own, which JAX has not seen.
      own = functools.partial(program)
      start = time.process_time()
      traced = jax.jit(own).trace(*args)
      spent[name]["trace"].append(time.process_time() - start)
      lowered = traced.lower()
      start = time.process_time()
      compiled[name] = lowered.compile()
      spent[name]["compile"].append(time.process_time() - start)
  for _ in range(turns + 1):
    for name, program in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*args))
      spent[name]["run"].append(time.perf_counter() - start)
  for own in spent.values():
    del own["run"][0]  # the first of a program is not counted
  return spent


def compare(
  spent: dict[str, dict[str, list[float]]], name: str, other: str, kind: str
) -> float:
  """Returns how many times as long one program takes as another.

  Args:
    spent: as `measure` returns it.
    name: of a program.
    other: of the other.
    kind: "trace", "compile" or "run".

  Returns:
    The ratio of the least times; of runs, the median ratio of neighbours.
  """
  one, two = spent[name][kind], spent[other][kind]
  if kind == "run":
    return statistics.median(x / y for x, y in zip(one, two, strict=True))
  return min(one) / min(two)


def check(programs: dict[str, Program], args: tuple[Any, ...]) -> None:
  """Raises RuntimeError unless all but the base compute the same."""
  names = list(programs)[1:]
  found = [jax.jit(programs[name])(*args) for name in names]
  for name, other in zip(names[1:], found[1:], strict=True):
    pairs = zip(*map(jax.tree.leaves, (found[0], other)), strict=True)
    far = max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs)
    if not far < 1e-3:
      raise RuntimeError(f"{name} is off by {far:.1e} from {names[0]}")


def main(_: list[str]) -> None:
  """Prints a table for values and one for gradients."""
  values = flags.FLAGS
  sizes = QUICK if values.quick else Sizes(layers=values.layers)
  params, loras = draw(sizes)
  shape = sizes.rows, sizes.length
  tokens = jax.random.randint(jax.random.key(1), shape, 0, sizes.vocabulary)
  programs = list_programs(sizes)
  gradients = {n: with_gradient(p) for n, p in programs.items()}
  gradients[BASE] = with_gradient_of_base(programs[BASE])
  for title, own in (("values", programs), ("gradients", gradients)):
    args = loras, params, tokens
    check(own, args)
    found = measure(own, args, sizes.turns)
    print(f"| {title}, {sizes.layers} layers | trace | compile | run |")
    print("|---|---|---|---|")
    for name, times in found.items():
      cells = [
        f"{min(own):.3f} s, {compare(found, name, HAND, kind):.2f} x"
        for kind, own in times.items()
      ]
      print(f"| {name} | {' | '.join(cells)} |")
    ratio = compare(found, OURS, BASE, "trace")
    print(f"\n{OURS} trace in {ratio:.2f} x the base's time\n")


if __name__ == "__main__":
  flags.DEFINE_integer("layers", 12, "Of the model, unrolled.", lower_bound=1)
  flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")
  app.run(main)
