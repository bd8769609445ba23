# SPDX-License-Identifier: Apache-2.0
"""Which rank does a finetune need? Error, divergence and bytes by rank, advice.

  python -m experiments.rank_sweep --base=DIR --finetuned=DIR --text=FILE
  python -m experiments.rank_sweep [--domain=kjv] [--tuning_steps=25]
    [--learning_rate=1e-4] [--cache=FOLDER]            (of SmolLM2)

One factorisation serves every rank. The advice is the smallest adapter with
uneven ranks that reaches `--max_kl`, `--max_error` or `--recover` on other rows
than those of the table; its figures on the table's rows stand beside it.
`--controls=RANK` measures other errors of the size of that rank's.

Takes under 5 minutes on two loaded cores, 2 with `--controls`.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments.lib.adapters import error_controls, ladders
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import ranks as advice
from jlora.commands import keep_compilations
from jlora.evaluation import mean_kl, recovered

RANKS = (8, 16, 32, 64, 128, 256, 512)
_ITEM = 2  # bytes of bfloat16, in which adapters are served


class Step(NamedTuple):
  """The figures of an adapter with one rank throughout.

  Attributes:
    rank: of every module, clipped to its short side.
    nbytes: in bfloat16.
    error: of all changes as one vector, relative.
    kl: KL(finetuned ‖ base + adapter), nats per token.
    kl_error: its standard error.
    agreement: share of tokens with the same likeliest successor.
    kept: 1 - kl / KL(finetuned ‖ base).
  """

  rank: int
  nbytes: int
  error: float
  kl: float
  kl_error: float
  agreement: float
  kept: float


def sweep(
  ladder: ladders.Ladder, tokens: np.ndarray, ranks: tuple[int, ...] = RANKS
) -> Iterator[Step]:
  """Yields the figures at each rank; the first is the base alone, rank 0.

  Args:
    ladder: the pair.
    tokens: (rows, time), held out.
    ranks: ascending; those above what was factored are left out.

  Yields:
    Step.
  """
  measure = advice.error_of(ladder.spectra, ladder.norms, ladder.rests)
  highest = max(len(s) for s in ladder.spectra.values())
  alone = None
  for rank in (0, *(rank for rank in ranks if rank <= highest)):
    found = divergence(ladder, dict.fromkeys(ladder.loras, rank), tokens)
    alone = found.kl if alone is None else alone
    clipped = {path: min(rank, len(s)) for path, s in ladder.spectra.items()}
    yield Step(
      rank,
      ladders.bytes_of(ladder.shapes, clipped, _ITEM),
      measure(clipped),
      found.kl,
      found.kl_error,
      found.agreement,
      recovered(found.kl, alone),
    )


def divergence(
  ladder: ladders.Ladder, ranks: Mapping[str, int], tokens: np.ndarray
) -> Any:
  """Computes the `mean_kl` of the finetune against base + adapter.

  Args:
    ladder: the pair.
    ranks: path -> rank.
    tokens: (rows, time); a row at a time bounds the memory.

  Returns:
    Divergence.
  """
  params = ladders.with_loras(ladder.base, ladders.cut(ladder.loras, ranks))
  batches = tokens[:, None]
  return mean_kl(ladder.model, ladder.finetuned, params, batches)


def advise(
  ladder: ladders.Ladder,
  tokens: np.ndarray,
  *,
  max_kl: float | None = None,
  max_error: float | None = None,
  held_out: np.ndarray | None = None,
) -> advice.Advice:
  """Finds the smallest adapter of uneven ranks that stays within one limit.

  Args:
    ladder: the pair.
    tokens: (rows, time), for a limit of divergence: ranks are chosen on them.
    max_kl: nats per token.
    max_error: relative error of all changes as one vector.
    held_out: other rows, for the divergence that is reported; with `max_error`
      there is none, that is of the weights.

  Returns:
    Advice; `held_out` is a Divergence.

  Raises:
    ValueError: not exactly one limit.
  """
  if (max_kl is None) == (max_error is None):
    raise ValueError(
      f"one limit is needed, got max_kl {max_kl} and max_error {max_error}."
    )
  units = {path: _ITEM * sum(shape) for path, shape in ladder.shapes.items()}
  if max_error is not None:
    measure = advice.error_of(ladder.spectra, ladder.norms, ladder.rests)
    return advice.advise(ladder.spectra, units, measure, max_error)
  assert max_kl is not None
  other = None
  if held_out is not None:
    other = functools.partial(divergence, ladder, tokens=held_out)
  return advice.advise(
    ladder.spectra,
    units,
    lambda ranks: divergence(ladder, ranks, tokens).kl,
    max_kl,
    held_out=other,
  )


def as_table(steps: list[Step]) -> str:
  """Formats the steps as a Markdown table.

  Args:
    steps: as `sweep` yields them.

  Returns:
    Lines.

  Example:
    >>> print(as_table([Step(8, 2**20, 0.5, 0.01, 0.001, 0.9, 0.98)]))
    | rank | MiB | relative error | KL, nats | agreement | effect kept |
    |---|---|---|---|---|---|
    | 8 | 1.0 | 0.5000 | 0.01000 ± 0.00100 | 90.0% | 98.00% |
  """
  header = ("rank", "MiB", "relative error", "KL, nats", "agreement",
            "effect kept")  # fmt: skip
  lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
  for step in steps:
    lines.append(
      f"| {step.rank} | {step.nbytes / 2**20:.1f} | {step.error:.4f} | "
      f"{step.kl:.5f} ± {step.kl_error:.5f} | {step.agreement:.1%} | "
      f"{step.kept:.2%} |"
    )
  return "\n".join(lines)


def report_advice(
  found: advice.Advice,
  steps: list[Step],
  share: float,
  model_bytes: int,
  chosen_on: float | None = None,
  goal: str | None = None,
) -> str:
  """Describes the advice in words.

  Args:
    found: the advice.
    steps: of the sweep, rank 64 or the nearest among them; of the rows that
      `found.held_out` is of, where it has that.
    share: of the effect that was asked for.
    model_bytes: of the model in bfloat16.
    chosen_on: KL(finetuned ‖ base) on the rows that ranks were chosen on.
    goal: what was asked for, if it was not that share.

  Returns:
    Lines.
  """
  usual = min(steps[1:], key=lambda step: abs(step.rank - 64))
  spread = sorted(found.ranks.values())
  lines = [
    advice.verdict(
      usual.rank, usual.kept, share, found.nbytes, model_bytes, found.met, goal
    ),
    f"ranks {spread[0]} to {spread[-1]}, median {spread[len(spread) // 2]}; "
    f"measured {found.value:.5f}, {len(found.tried)} adapters tried",
  ]
  if found.held_out is not None and chosen_on is not None:
    here = recovered(found.value, chosen_on)
    there = recovered(found.held_out.kl, steps[0].kl)
    lines.append(
      f"on the rows it was chosen with it keeps {here:.2%}; on those of the "
      f"table, which had no part in that, {there:.2%} "
      f"({found.held_out.kl:.5f} ± {found.held_out.kl_error:.5f} nats)"
      f"{', less than was asked for' if goal is None and there < share else ''}"
    )
  return "\n".join(lines)


def _pair(values: Any, work: str) -> tuple[Any, Any, dict[str, str]]:
  """Returns base and finetune folders, and held-out texts, its own first."""
  if values.smoke:
    pair = finetunes.tiny_pair(work, jax.random.key(0))
    return *pair, {texts.pydoc_source(): texts.split(texts.pydoc())[1]}
  if values.base:
    if not (values.finetuned and values.text):
      raise app.UsageError("--base needs --finetuned and --text")
    path = pathlib.Path(values.text)
    return values.base, values.finetuned, {path.name: path.read_text()}
  pair = finetunes.smollm2_pair(
    values.cache,
    values.domain,
    steps=values.tuning_steps,
    learning_rate=values.learning_rate,
  )
  names = sorted(texts.CORPORA, key=lambda name: name != values.domain)
  return *pair, {
    texts.label(name): texts.parts(name, values.cache)[1] for name in names
  }


def _print_controls(
  ladder: ladders.Ladder, tokens: Mapping[str, np.ndarray], values: Any
) -> list[error_controls.Outcome]:
  """Prints the table of control errors; returns its rows."""
  found = list(
    error_controls.measure_controls(
      ladder, tokens, values.controls, range(values.seeds)
    )
  )
  print(f"\n{error_controls.as_table(found, list(tokens))}")
  return found


def main(_: list[str]) -> None:
  """Prints the sweep and the advice, or controls, and writes them as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  with tempfile.TemporaryDirectory() as work:
    base, tuned, held = _pair(values, work)
    encode = texts.encode_bytes if values.smoke else smollm2.tokenizer(base)
    take = functools.partial(
      texts.excerpts_apart, encode=encode, rows=values.rows, length=127
    )
    tokens, to_choose = take(next(iter(held.values())))
    ladder = ladders.load_ladder(base, tuned, values.highest)
  print(f"held-out text: {next(iter(held))}")
  data: dict[str, Any] = {"text": next(iter(held))}
  if values.controls:
    rows = {name: take(text)[0] for name, text in held.items()}
    found = _print_controls(ladder, rows, values)
    data["controls"] = [one._asdict() for one in found]
  else:
    data |= _sweep_and_advise(ladder, tokens, to_choose, values)
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(data, indent=1) + "\n")


def _sweep_and_advise(
  ladder: ladders.Ladder, tokens: np.ndarray, to_choose: np.ndarray, values: Any
) -> dict[str, Any]:
  """Prints the table and the advice; returns both for JSON."""
  chosen = tuple(rank for rank in RANKS if rank <= values.highest)
  steps = list(sweep(ladder, tokens, chosen))
  print(as_table(steps))
  goal, alone, said = values.max_kl, None, None
  if values.max_error is not None:
    said = f"an error of {values.max_error:g}"
  else:
    said = goal and f"a KL of {goal:g}"
    nothing = dict.fromkeys(ladder.loras, 0)
    alone = divergence(ladder, nothing, to_choose).kl
    goal = (1 - values.recover) * alone if goal is None else goal
  found = advise(
    ladder, to_choose, max_kl=goal, max_error=values.max_error, held_out=tokens
  )
  size = _ITEM * sum(leaf.size for leaf in jax.tree.leaves(ladder.base))
  print(report_advice(found, steps, values.recover, size, alone, said))
  held = found.held_out and found.held_out._asdict()
  return {
    "steps": [step._asdict() for step in steps],
    "advice": found._asdict() | {"held_out": held},
    "model_bytes": size,
  }


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("base", None, "Model folder; SmolLM2 without it.")
  flags.DEFINE_string("finetuned", None, "Model folder of the same config.")
  flags.DEFINE_string("text", None, "Held-out text file, with --base.")
  flags.DEFINE_string("domain", "kjv", "Text of SmolLM2's finetune.")
  flags.DEFINE_integer("tuning_steps", 25, "Of that finetune.")
  flags.DEFINE_float("learning_rate", 1e-4, "Of that finetune.")
  flags.DEFINE_integer("highest", 512, "Rank up to which is factored.")
  flags.DEFINE_integer("rows", 16, "Held-out rows of 128 tokens.")
  flags.DEFINE_float("max_kl", None, "Goal: nats per token at the most.")
  flags.DEFINE_float("max_error", None, "Goal: relative error at the most.")
  flags.DEFINE_float("recover", 0.95, "Goal without the others: effect kept.")
  flags.DEFINE_integer("controls", None, "Instead: errors as at this rank.")
  flags.DEFINE_integer("seeds", 3, "Of the controls' noise.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
