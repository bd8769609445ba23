# SPDX-License-Identifier: Apache-2.0
"""What calibration text is for: sensitivities of modules, refined factors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments import ladders
from jlora import training


def measure_sensitivity(
  ladder: ladders.Ladder, rank: int, tokens: np.ndarray
) -> dict[str, float]:
  """What a module's squared error costs: divergence over squared error.

  Args:
    ladder: the pair.
    rank: at which each module in turn is cut, all others being the finetune's.
    tokens: (rows, time).

  Returns:
    path -> nats per token for a squared Frobenius error of 1.
  """
  rows = jnp.asarray(tokens)
  student = jax.jit(
    lambda teacher, params: jnp.sum(
      jnp.exp(teacher)
      * (teacher - jax.nn.log_softmax(ladder.model(params, rows))),
      axis=-1,
    ).mean()
  )
  teacher = jax.jit(
    lambda params: jax.nn.log_softmax(ladder.model(params, rows))
  )(ladder.finetuned)
  found = {}
  for path, lora in ladder.loras.items():
    # The finetune less what truncation loses of this module alone.
    rest = ladder.rests[path] ** 2 + np.sum(
      np.square(ladder.spectra[path][rank:], dtype=np.float64)
    )
    at = ladders.with_loras(ladder.base, ladders.cut({path: lora}, rank))
    params = _exchange(ladder.finetuned, at, path)
    found[path] = max(float(student(teacher, params)), 0.0) / max(rest, 1e-12)
  # Modules whose cost drowns in rounding still cost something.
  least = float(np.median(list(found.values()))) / 100
  return {path: max(cost, least) for path, cost in found.items()}


def _exchange(params: Any, other: Any, path: str) -> Any:
  """Parameters with one leaf of another tree."""
  head, _, rest = path.partition("/")
  leaf = _exchange(params[head], other[head], rest) if rest else other[head]
  return {**params, head: leaf}


def fit(
  ladder: ladders.Ladder,
  loras: jlora.Loras,
  tokens: np.ndarray,
  steps: int,
  seed: int,
  learning_rate: float = 1e-5,
) -> jlora.Loras:
  """Loras after so many steps of refining, on the host.

  Args:
    ladder: the pair.
    loras: to start from.
    tokens: (rows, time); two rows a step, each once in every round.
    steps: updates.
    seed: of the rows' order.
    learning_rate: Adam's largest, after a tenth of the steps; it then falls to
      zero as a cosine. 1e-4, a hundredth of an entry, drove the divergence up.

  Returns:
    path -> Lora of NumPy arrays.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    learning_rate / 10, learning_rate, steps // 10 + 1, steps + 1
  )
  init, update = training.refine(ladder.model, optax.adam(schedule))
  step = jax.jit(update, donate_argnums=(0, 1))
  loras = jax.tree.map(jnp.array, loras)
  state, rng = init(loras), np.random.default_rng(seed)
  order = np.concatenate(
    [rng.permutation(len(tokens)) for _ in range(-(-2 * steps // len(tokens)))]
  )
  for at in range(steps):
    rows = jnp.asarray(tokens[order[2 * at : 2 * at + 2]])
    loras, state, value = step(
      loras, state, ladder.base, ladder.finetuned, rows
    )
    if at % max(steps // 5, 1) == 0:
      print(f"  refining: step {at}, {value:.5f} nats", flush=True)
  return jax.tree.map(np.asarray, loras)
