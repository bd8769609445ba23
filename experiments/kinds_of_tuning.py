# SPDX-License-Identifier: Apache-2.0
"""Prompt, norms, LoRA or everything: what is learned for how many bytes?

  python -m experiments.kinds_of_tuning [--seeds=3] [--steps=60]

A byte-level Llama of four layers and 128 channels, trained on Python's help,
learns the King James Bible, each kind at a few learning rates. The best rate is
chosen on one half of the held-out rows and reported on the other. Prints
trained parameters, bytes to store and of the optimiser's state, and held-out
loss.

Takes 2 minutes on an H100. Expect loss to fall with parameters, norms to be
worth most for their bytes and a prompt least.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib.data import texts
from experiments.lib.models import lessons
from jlora.adapting import Rows, Shift, adapt, bind, prepend
from jlora.commands import keep_compilations
from jlora.paths import flatten
from jlora.training import by_root, init_lora, trained_part


def shift_norms(params: Any, key: jax.Array) -> dict[str, Shift]:
  """Makes a Shift of zero on every norm's scale.

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
  """Makes a Shift of zero on every parameter: full finetuning.

  Args:
    params: nested dict.
    key: not used.

  Returns:
    path -> Shift.
  """
  del key
  return {
    path: Shift(jnp.zeros_like(leaf)) for path, leaf in flatten(params).items()
  }


def lora_of(rank: int) -> Callable[[Any, jax.Array], dict[str, Any]]:
  """Returns a function that makes an adapter of a rank on all linear layers.

  Args:
    rank: of every module.

  Returns:
    (params, key) -> path -> Lora.
  """

  def start(params: Any, key: jax.Array) -> dict[str, Any]:
    """Makes the adapter."""
    return init_lora(params, rank, key, alpha=4.0, scaling=by_root)

  return start


def prompt_of(count: int) -> Callable[[Any, jax.Array], dict[str, Rows]]:
  """Returns a function that makes a prompt of random bytes' embeddings.

  Args:
    count: its length.

  Returns:
    (params, key) -> path -> Rows.
  """

  def start(params: Any, key: jax.Array) -> dict[str, Rows]:
    """Makes the prompt."""
    table = flatten(params)[_TABLE]
    return {_TABLE: Rows(jax.random.choice(key, table, (count,)))}

  return start


def prompted(model: Callable, count: int) -> Callable:
  """Wraps a model to read a prompt before its tokens.

  Args:
    model: `(params, tokens) -> logits`.
    count: length of the prompt; 0 is the model itself.

  Returns:
    `(params, tokens) -> logits` of the tokens alone.
  """
  if not count:
    return model

  def run(params: Any, tokens: jax.Array) -> jax.Array:
    """Runs the model; drops the prompt's logits."""
    table = flatten(params)[_TABLE]
    return model(params, prepend(tokens, table, count))[:, count:]

  return run


class Kind(NamedTuple):
  """One way to tune: its programs, learning rates and prompt.

  Attributes:
    start: (params, key) -> programs to begin with.
    rates: learning rates to try.
    prompt: rows of the prompt that the model reads first.
  """

  start: Callable[[Any, jax.Array], Any]
  rates: tuple[float, ...]
  prompt: int = 0


_TABLE = "embed/embedding"
_THIN = (1e-2, 3e-2, 1e-1)
KINDS = {
  "prompt of 16": Kind(prompt_of(16), (*_THIN, 3e-1), 16),
  "norms": Kind(shift_norms, (*_THIN, 3e-1)),
  "LoRA, rank 1": Kind(lora_of(1), (3e-3, 1e-2, 3e-2)),
  "LoRA, rank 8": Kind(lora_of(8), (3e-3, 1e-2, 3e-2)),
  "everything": Kind(shift_everything, (1e-3, 3e-3, 1e-2)),
}


def measure_kind(
  school: lessons.School, name: str, steps: int, seeds: int
) -> dict[str, Any]:
  """Measures what a kind reaches at its best learning rate.

  Args:
    school: base and text.
    name: of KINDS.
    steps: updates.
    seeds: runs at every rate.

  Returns:
    name, rate (the best on the first half of the exam), losses (by seed, on the
    other half), parameters, state (bytes).
  """
  kind = KINDS[name]
  school = school._replace(model=prompted(school.model, kind.prompt))
  tuned = adapt(school.model)
  halves = np.array_split(school.exam, 2)
  best: dict[str, Any] = {}
  least = np.inf
  for rate in kind.rates:
    trainer, losses = lessons.hire(school, rate, steps), []
    for seed in range(seeds):
      programs = kind.start(school.params, jax.random.key(seed))
      taught = lessons.teach(school, trainer, programs, steps, seed)
      params = bind(school.params, taught)
      losses.append([lessons.examine(tuned, params, half) for half in halves])
    chosen, told = np.mean(losses, axis=0)[0], [pair[1] for pair in losses]
    print(f"  {name}, {rate:g}: {chosen:.3f} to choose by, {told}", flush=True)
    if not chosen < least:
      continue
    least, leaves = chosen, jax.tree.leaves(trained_part(programs))
    best = {
      "name": name,
      "rate": rate,
      "losses": told,
      "parameters": sum(leaf.size for leaf in leaves),
      "state": sum(
        leaf.nbytes for leaf in jax.tree.leaves(trainer.init(programs))
      ),
    }
  return best


def as_table(rows: Iterable[Mapping[str, Any]], base: float) -> str:
  """Formats all kinds as a Markdown table.

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
  print(texts.pydoc_source())
  steps = values.steps
  school = lessons.open_school(128, 200, 4 * steps, values.cache)
  told = np.array_split(school.exam, 2)[1]
  base = lessons.examine(school.model, school.params, told)
  rows = [measure_kind(school, name, steps, values.seeds) for name in KINDS]
  print(as_table(rows, base))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("seeds", 3, "Runs at every learning rate.")
  flags.DEFINE_integer("steps", 60, "Updates of 4 x 128 bytes.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  app.run(main)
