# SPDX-License-Identifier: Apache-2.0
"""Which merge of two skills keeps both?

  python -m experiments.merge_skills [--only=METHOD,...] [--cache=FOLDER]
    [--rows=FILE] [--out=FOLDER] [--smoke]

SmolLM2-135M's finetunes on the King James Bible and on pydoc, merged by every
method of `jlora.merging` at a few settings: as whole checkpoints, as adapters
of rank 64 extracted from them, and as a mixture of their MLPs. Held-out losses
on both texts, beside the base, each finetune and adapter alone, the plain
average, and adapters of random factors of the same standard deviations. --rows
keeps what was measured, and a second run goes on with it; --out writes the
figure.

Takes over 30 minutes on two loaded cores.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import jlora
from experiments.lib.adapters.merge_settings import (
  LOW_RANK,
  NEAR,
  RANDOM,
  SHRUNK,
  WHOLE,
  Merge,
)
from experiments.lib.data import texts
from experiments.lib.figures import merges, plots
from experiments.lib.models import mixtures, skills
from experiments.lib.models.skills import Skills
from jlora import models
from jlora.commands import keep_compilations
from jlora.loras import Lora, Loras
from jlora.paths import flatten, key_for

Model = tuple[str, str, str, Callable[[], Any]]
Row = dict[str, Any]


def randomise(loras: Loras, seed: int) -> Loras:
  """Replaces factors by Gaussian ones of the same standard deviations.

  Args:
    loras: path -> Lora.
    seed: of the draw.

  Returns:
    path -> Lora.

  Example:
    >>> lora = Lora(np.ones((1, 2)), np.eye(2)[:1], np.float32(1))
    >>> float(abs(randomise({"w": lora}, 0)["w"].a).max())
    0.0
  """

  def drawn(path: str, part: str, factor: Any) -> jax.Array:
    """Draws one factor."""
    key = key_for(jax.random.key(seed), f"{path}.{part}")
    return float(np.std(factor)) * jax.random.normal(key, factor.shape)

  return {
    path: Lora(drawn(path, "a", x.a), drawn(path, "b", x.b), x.scale)
    for path, x in loras.items()
  }


def merges_of(found: Skills, rank: int) -> Iterator[Model]:
  """Yields every model of the table: kind, method, setting, how to make it.

  Args:
    found: base, finetunes and texts.
    rank: of the adapters.

  Yields:
    What takes nothing to make first, then merges of whole checkpoints, then
    those of adapters, which are extracted when the first is made.
  """
  base, pair = found.base, list(found.finetuned.values())
  yield "beside", "base", "", lambda: base
  for name, tree in found.finetuned.items():
    title = skills.TITLES[name]
    yield "beside", "finetune", f"{title} alone", lambda x=tree: x
    yield (
      "beside",
      "finetune",
      f"{title}'s MLPs alone",
      lambda x=tree: mixtures.with_mlps_of(base, x),
    )
  for kind, rows in (("beside", SHRUNK), ("whole", WHOLE)):
    for one in rows:
      yield kind, one.method, one.setting, lambda x=one: run(x, pair, base)
  for one in NEAR:
    yield (
      "whole",
      one.method,
      one.setting,
      lambda x=one: run(x, pair[:1], pair[1]),
    )
  kept: list[list[Loras]] = []

  def adapted(one: Merge, column: int) -> Any:
    """Merges adapters and applies the result; extracts them at first."""
    if not kept:
      own = [jlora.extract(base, tree, rank=rank) for tree in pair]
      kept.extend([own, [randomise(x, i) for i, x in enumerate(own)]])
    return jlora.apply(base, run(one, kept[column]))

  for kind, rows, column in (("adapters", LOW_RANK, 0), ("beside", RANDOM, 1)):
    for one in rows:
      yield kind, one.method, one.setting, lambda x=one, i=column: adapted(x, i)


def run(one: Merge, trees: Sequence[Any], base: Any = None) -> Any:
  """Runs one merge.

  Args:
    one: which.
    trees: models, or adapters.
    base: of models.

  Returns:
    A tree like the first.
  """
  return jlora.merge(
    trees,
    method=one.call,
    base=base,
    weights=one.weights,
    settings=one.options,
  )


def relative_change(base: Any, tree: Any) -> float:
  """Computes ‖tree - base‖ / ‖base‖ over all parameters."""
  pairs = [(x, flatten(tree)[path]) for path, x in flatten(base).items()]
  square = lambda x: float(np.sum(np.square(x, dtype=np.float64)))  # noqa: E731
  moved = sum(square(np.asarray(y) - np.asarray(x)) for x, y in pairs)
  return float(np.sqrt(moved / sum(square(x) for x, _ in pairs)))


def front(rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
  """Returns rows that no other row beats on both texts, by loss on the first.

  Args:
    rows: text -> loss of each row of tokens.
    texts: the two.

  Returns:
    Some of the rows.

  Example:
    >>> points = [{"a": [x], "b": [y]} for x, y in ((1, 3), (2, 2), (3, 2))]
    >>> [row["a"][0] for row in front(points, ["a", "b"])]
    [1, 2]
  """
  points = [tuple(np.mean(row[name]) for name in texts) for row in rows]
  best, kept = np.inf, []
  for i in sorted(range(len(rows)), key=lambda i: points[i]):
    if points[i][1] < best:
      best = points[i][1]
      kept.append(rows[i])
  return kept


def as_table(rows: Sequence[Row], texts: Sequence[str]) -> str:
  """Formats rows as a Markdown table; a star is on the Pareto front.

  Args:
    rows: as measured.
    texts: the two.

  Returns:
    Lines.
  """
  stars = [(row["method"], row["setting"]) for row in front(rows, texts)]
  heads = " | ".join(f"loss on {skills.TITLES[name]}" for name in texts)
  lines = [f"| of | method | setting | change | {heads} | mean | front |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
  for row in rows:
    losses = [float(np.mean(row[name])) for name in texts]
    star = "*" if (row["method"], row["setting"]) in stars else ""
    cells = " | ".join(f"{x:.3f}" for x in (*losses, float(np.mean(losses))))
    change = "" if row["change"] is None else f"{row['change']:.4f}"
    lines.append(
      f"| {row['kind']} | {row['method']} | {row['setting']} | {change} | "
      f"{cells} | {star} |"
    )
  return "\n".join(lines)


def measure_all(
  found: Skills, rank: int, only: Sequence[str], done: list[Row]
) -> Iterator[Row]:
  """Measures each merge that has no row yet.

  Args:
    found: base, finetunes and texts.
    rank: of the adapters.
    only: methods; none is all.
    done: rows of an earlier run.

  Yields:
    kind, method, setting, change, and for each text the loss of every row; of
    mixtures no change, but "routed", as `mixtures.routed` gives it.
  """
  apply = models.load(found.folders["base"])[0]
  known = {(row["method"], row["setting"]) for row in done}

  def is_wanted(method: str, setting: str) -> bool:
    """Returns whether a merge is asked for and not yet measured."""
    return (method, setting) not in known and (not only or method in only)

  for kind, method, setting, make in merges_of(found, rank):
    if is_wanted(method, setting):
      tree = make()
      yield {
        "kind": kind, "method": method, "setting": setting,
        "change": relative_change(found.base, tree),
        **skills.measure(apply, tree, found.held_out),
      }  # fmt: skip
      del tree  # or both would be in memory while the next is made
  for setting, mix in mixtures.mixtures_of(found):
    if is_wanted("mixture", setting):
      mixed, tree = mix()
      yield {
        "kind": "mixture", "method": "mixture", "setting": setting,
        "change": None, "routed": mixtures.routed(mixed, tree, found.held_out),
        **skills.measure(mixed, tree, found.held_out),
      }  # fmt: skip
      del tree


def main(_: list[str]) -> None:
  """Measures every merge, prints the table and draws the figure."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  kept = pathlib.Path(values.rows) if values.rows else None
  rows = json.loads(kept.read_text()) if kept and kept.exists() else []
  few = ["base", "linear", "concat", "mixture"]
  only = few if values.smoke else values.only
  with tempfile.TemporaryDirectory() as work:
    found = (
      skills.tiny_skills(work)
      if values.smoke
      else skills.smollm2_skills(values.cache)
    )
    rank = 2 if values.smoke else values.rank
    for row in measure_all(found, rank, only, rows):
      rows.append(row)
      print(as_table([row], list(found.held_out)).splitlines()[-1], flush=True)
      if kept:
        kept.write_text(json.dumps(rows, indent=1) + "\n")
  names = list(skills.TITLES)
  print(f"\n{as_table(rows, names)}\n")
  for row in rows:
    if shares := row.get("routed"):
      said = [f"{x:.3f} of {skills.TITLES[name]}" for name, x in shares.items()]
      print(f"{row['setting']}: to their own expert {', '.join(said)}")
  if values.out:
    best = front(rows, names)
    path = pathlib.Path(values.out) / "merge_skills.png"
    plots.save_figure(
      path, lambda: merges.draw_losses(rows, best, skills.TITLES)
    )


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("rank", 64, "Of the adapters.")
  flags.DEFINE_list("only", [], "Some methods; all without it.")
  flags.DEFINE_string("rows", None, "JSON file of what was measured.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "Folder of the figure.")
  flags.DEFINE_bool("smoke", False, "Tiny random models, in seconds.")
  app.run(main)
