# SPDX-License-Identifier: Apache-2.0
"""Where is a fixed number of trained parameters best spent?

  python -m experiments.which_modules [--seeds=3] [--steps=60]

The LoRA paper's table 5 on a byte-level Llama of four layers and 128 channels,
trained on Python's help: adapters of exactly as many parameters on q, k, v, o
or the MLP, alone or together, learn the King James Bible. Prints held-out loss.

Takes 10 minutes on two cores beside other jobs. Expect many modules at a low
rank to beat one at a high rank.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from absl import app, flags

from experiments.lib.data import texts
from experiments.lib.models import lessons
from jlora.adapting import apply
from jlora.commands import keep_compilations
from jlora.paths import matching
from jlora.training import by_root, init_lora

#: name -> (regex of the paths, rank); width 128, 15,360 parameters a layer.
CHOICES = {
  "q": (r".*/attn/q/kernel", 60),
  "k": (r".*/attn/k/kernel", 60),
  "v": (r".*/attn/v/kernel", 60),
  "o": (r".*/attn/o/kernel", 60),
  "q, v": (r".*/attn/[qv]/kernel", 30),
  "q, k, v, o": (r".*/attn/[qkvo]/kernel", 15),
  "MLP": (r".*/mlp/(gate|up|down)/kernel", 10),
  "all": (r".*/(attn|mlp)/\w+/kernel", 6),
}
WIDTH = 128


def measure_choice(
  school: lessons.School,
  trainer: Any,
  name: str,
  steps: int,
  seed: int,
) -> dict[str, Any]:
  """Trains one choice of modules; returns the loss it reaches.

  Args:
    school: base and text, of WIDTH channels.
    trainer: as `lessons.hire` gives it.
    name: of CHOICES.
    steps: updates.
    seed: of the adapter's start and of the order of texts.

  Returns:
    name, rank, seed, parameters, loss.
  """
  paths, rank = CHOICES[name]
  loras = init_lora(
    school.params, rank, jax.random.key(seed), select=matching(paths),
    alpha=4.0, scaling=by_root,
  )  # fmt: skip
  taught = lessons.teach(school, trainer, loras, steps, seed)
  loss = lessons.examine(
    school.model, apply(school.params, taught), school.exam
  )
  count = sum(lora.a.size + lora.b.size for lora in loras.values())
  return {
    "name": name, "rank": rank, "seed": seed, "parameters": count, "loss": loss
  }  # fmt: skip


def as_table(rows: Iterable[Mapping[str, Any]], base: float) -> str:
  """Formats means and standard deviations over seeds, by choice.

  Args:
    rows: of `measure_choice`.
    base: loss without an adapter.

  Returns:
    A Markdown table.
  """
  lines = [
    "| trained | rank | parameters | held-out loss |", "|---|---|---|---|",
    f"| nothing | | 0 | {base:.3f} |",
  ]  # fmt: skip
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["name"], []).append(row)
  for name, own in groups.items():
    cell = lessons.mean_and_spread(row["loss"] for row in own)
    first = own[0]
    lines.append(
      f"| {name} | {first['rank']} | {first['parameters']:,} | {cell} |"
    )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Measures all choices and prints the table."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  steps = values.steps
  school = lessons.open_school(WIDTH, 200, 4 * steps, values.cache)
  base = lessons.examine(school.model, school.params, school.exam)
  trainer = lessons.hire(school, values.learning_rate, steps)
  rows = []
  for name in CHOICES:
    for seed in range(values.seeds):
      rows.append(measure_choice(school, trainer, name, steps, seed))
      print(f"  {rows[-1]}", flush=True)
  print(as_table(rows, base))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("seeds", 3, "Runs of every choice.")
  flags.DEFINE_integer("steps", 60, "Updates of 4 x 128 bytes.")
  flags.DEFINE_float("learning_rate", 1e-2, "The largest.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  app.run(main)
