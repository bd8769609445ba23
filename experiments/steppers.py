# SPDX-License-Identifier: Apache-2.0
"""Steps of training that are timed: an adapter's, ours and PEFT's, and full."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import finetune
from jlora import models
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.training import init_lora, train

# A stepper: takes a step on (rows, length + 1) tokens, says the loss before it.
Stepper = Callable[[np.ndarray], float]

_RATE = 1e-3
PRODUCTS = "the base's bare products"


class Sizes(NamedTuple):
  """What is timed.

  Attributes:
    rows: of a batch.
    length: tokens predicted in a row.
    turns: timed steps of each; one more is not counted.
    threads: cores that either may use.
    rank: of every module.
  """

  rows: int = 4
  length: int = 128
  turns: int = 5
  threads: int = 2
  rank: int = 16


QUICK = Sizes(rows=2, length=32, turns=3, rank=4)


def _start_of(folder: str, rank: int) -> dict[str, np.ndarray]:
  """Path -> a, the same in every process; b is zero and the scale one."""
  config = models.read_config(folder)
  shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0))[1])
  rng = np.random.default_rng(0)
  shapes = {
    path: lora.a.shape
    for path, lora in jax.eval_shape(lambda: init_lora(shapes, rank)).items()
  }
  return {
    path: rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
    for path, shape in sorted(shapes.items())
  }


def _ours(folder: str, sizes: Sizes) -> Stepper:
  """Ours, compiled; the cores it was started on are its threads."""
  model, params = models.load(folder)
  leaves = flatten(params)

  def loss(params, tokens):
    return finetune.nll(model, params, tokens)

  loras: Any = {
    path: Lora(
      jnp.asarray(a),
      jnp.zeros((sizes.rank, leaves[path].shape[-1])),
      jnp.float32(1),
    )
    for path, a in _start_of(folder, sizes.rank).items()
  }
  init, update = train(loss, optax.adamw(_RATE, weight_decay=0.0))
  compiled = jax.jit(update, donate_argnums=(0, 1))
  kept = [loras, init(loras)]

  def step(tokens: np.ndarray) -> float:
    *kept[:], value = compiled(*kept, params, jnp.asarray(tokens))
    return float(value)

  return step


def _full(folder: str, sizes: Sizes) -> Stepper:
  """Full finetuning of every parameter, ours."""
  del sizes
  model, params = models.load(folder)
  optimiser = optax.adamw(_RATE, weight_decay=0.0)

  def update(params, state, tokens):
    value, gradient = jax.value_and_grad(
      lambda params: finetune.nll(model, params, tokens)
    )(params)
    change, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value

  compiled = jax.jit(update, donate_argnums=(0, 1))
  kept = [params, optimiser.init(params)]
  del params

  def step(tokens: np.ndarray) -> float:
    *kept[:], value = compiled(*kept, jnp.asarray(tokens))
    return float(value)

  return step


def _products(folder: str, sizes: Sizes) -> Stepper:
  """The base's own products of a step, one by one: what no step can go below.

  Of every matrix x w, and dy wᵀ for the gradient of x; of an embedding those of
  a tied head. The loss it says is 0.
  """
  _, params = models.load(folder)
  count = sizes.rows * sizes.length
  matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
  times = jax.jit(jnp.matmul)
  back = jax.jit(lambda dy, w: dy @ w.T)
  sides = {side for w in matrices for side in w.shape}
  rows = {
    side: jax.random.normal(jax.random.key(side), (count, side))
    for side in sides
  }

  def step(_: np.ndarray) -> float:
    for w in matrices:
      jax.block_until_ready(times(rows[w.shape[0]], w))
      jax.block_until_ready(back(rows[w.shape[1]], w))
    return 0.0

  return step


def _peft(folder: str, sizes: Sizes) -> Stepper:
  """PEFT's model as it comes, with torch's fused AdamW."""
  import peft  # peers, not dependencies
  import torch
  import transformers

  torch.set_num_threads(sizes.threads)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  config = peft.LoraConfig(
    r=sizes.rank, lora_alpha=sizes.rank, target_modules="all-linear"
  )
  model = peft.get_peft_model(base, config).train()
  modules = dict(model.named_modules())
  start = _start_of(folder, sizes.rank)
  for path, a in start.items():
    name = models.hf_name(path).removesuffix(".weight")
    layer: Any = modules[f"base_model.model.{name}"]
    layer.lora_A.default.weight.data = torch.from_numpy(a)
  moving = [p for p in model.parameters() if p.requires_grad]
  if len(moving) != 2 * len(start):
    raise RuntimeError(f"{len(moving)} of PEFT's, {len(start)} modules of ours")
  optimiser = torch.optim.AdamW(moving, _RATE, weight_decay=0.0, fused=True)

  def step(tokens: np.ndarray) -> float:
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())

  return step


STEPPERS = {
  "ours": _ours,
  "PEFT": _peft,
  "full": _full,
  PRODUCTS: _products,
}


def serve(name: str, folder: str, sizes: Sizes) -> None:
  """Nothing; takes a step for every line of input and prints how long.

  Two steps are taken before any line is read, and none is read for no turns.

  Args:
    name: of STEPPERS.
    folder: the model.
    sizes: of the batch.
  """
  step = STEPPERS[name](folder, sizes)
  vocabulary = models.read_config(folder)["vocab_size"]
  shape = (sizes.rows, sizes.length + 1)
  tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
  step(tokens)
  print(json.dumps([0.0, 0.0, step(tokens)]), flush=True)
  for _ in sys.stdin if sizes.turns else ():
    began, used = time.perf_counter(), time.process_time()
    loss = step(tokens)
    seconds = time.perf_counter() - began
    processor = time.process_time() - used
    print(json.dumps([seconds, processor, loss]), flush=True)
