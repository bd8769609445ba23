# SPDX-License-Identifier: Apache-2.0
"""Norms alone, a LoRA, or everything: what is learned for how many bytes?

  python -m experiments.kinds_of_tuning [--seeds=2] [--steps=60]

A byte-level Llama of four layers and 128 channels, trained on Python's help,
learns the King James Bible, each kind at a few learning rates of which the best
mean is told. Prints trained parameters, bytes to store and of the optimiser's
state, and held-out loss.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import lessons
from experiments.caches import keep_compilations
from jlora.application import apply
from jlora.initialisation import by_root, init_lora
from jlora.paths import flatten
from jlora.programs import Shift
from jlora.training import trained_part


def shift_norms(params: Any, key: jax.Array) -> dict[str, Shift]:
  """A Shift of zero on every norm's scale.

  Args:
    params: nested dict.
    key: not looked at.

  Returns:
    path -> Shift.
  """
  del key
  return {
    path: Shift(jnp.zeros_like(leaf))
    for path, leaf in flatten(params).items()
    if path.endswith("/scale")
  }


def shift_everything(params: Any, key: jax.Array) -> dict[str, Shift]:
  """A Shift of zero on every parameter: full finetuning.

  Args:
    params: nested dict.
    key: not looked at.

  Returns:
    path -> Shift.
  """
  del key
  return {
    path: Shift(jnp.zeros_like(leaf)) for path, leaf in flatten(params).items()
  }


def lora_of(rank: int) -> Callable[[Any, jax.Array], dict[str, Any]]:
  """The function that makes an adapter of a rank on every linear layer.

  Args:
    rank: of every module.

  Returns:
    (params, key) -> path -> Lora.
  """

  def start(params: Any, key: jax.Array) -> dict[str, Any]:
    return init_lora(params, rank, key, alpha=4.0, scaling=by_root)

  return start


#: name -> (what it begins with, learning rates).
KINDS: dict[str, tuple[Callable[[Any, jax.Array], Any], tuple[float, ...]]] = {
  "norms": (shift_norms, (1e-2, 3e-2)),
  "LoRA, rank 1": (lora_of(1), (1e-2, 3e-2)),
  "LoRA, rank 8": (lora_of(8), (3e-3, 1e-2)),
  "everything": (shift_everything, (1e-3, 3e-3)),
}


def measure_kind(
  school: lessons.School, name: str, steps: int, seeds: int
) -> dict[str, Any]:
  """What a kind reaches at its best learning rate.

  Args:
    school: base and text.
    name: of KINDS.
    steps: updates.
    seeds: runs at every rate.

  Returns:
    name, rate, losses by seed, parameters, state (bytes).
  """
  start, rates = KINDS[name]
  best: dict[str, Any] = {}
  for rate in rates:
    trainer, losses = lessons.hire(school, rate, steps), []
    for seed in range(seeds):
      programs = start(school.params, jax.random.key(seed))
      taught = lessons.teach(school, trainer, programs, steps, seed)
      tuned = apply(school.params, taught)
      losses.append(lessons.examine(school.model, tuned, school.exam))
    if not best or np.mean(losses) < np.mean(best["losses"]):
      leaves = jax.tree.leaves(trained_part(programs))
      state = jax.tree.leaves(trainer.init(programs))
      best = {
        "name": name,
        "rate": rate,
        "losses": losses,
        "parameters": sum(leaf.size for leaf in leaves),
        "state": sum(leaf.nbytes for leaf in state),
      }
  return best


def as_table(rows: Iterable[Mapping[str, Any]], base: float) -> str:
  """The kinds beside each other.

  Args:
    rows: of `measure_kind`.
    base: loss before.

  Returns:
    A Markdown table.
  """
  lines = [
    "| trained | parameters | KiB to store | KiB of Adam's state "
    "| learning rate | held-out loss |",
    "|---" * 6 + "|",
    f"| nothing | 0 | 0 | 0 | | {base:.3f} |",
  ]
  for row in rows:
    cell = lessons.mean_and_spread(row["losses"])
    lines.append(
      f"| {row['name']} | {row['parameters']:,} | "
      f"{4 * row['parameters'] / 1024:.1f} | {row['state'] / 1024:.1f} | "
      f"{row['rate']:g} | {cell} |"
    )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Measures all kinds and prints the table."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  steps = values.steps
  school = lessons.open_school(128, 200, 4 * steps, values.cache)
  base = lessons.examine(school.model, school.params, school.exam)
  rows = []
  for name in KINDS:
    rows.append(measure_kind(school, name, steps, values.seeds))
    print(f"  {rows[-1]}", flush=True)
  print(as_table(rows, base))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("seeds", 2, "Runs at every learning rate.")
  flags.DEFINE_integer("steps", 60, "Updates of 4 x 128 bytes.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  app.run(main)
