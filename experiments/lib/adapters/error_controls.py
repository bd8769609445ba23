# SPDX-License-Identifier: Apache-2.0
"""Does the size of an error tell its harm? Other errors of truncation's size.

`python -m experiments.rank_sweep --controls=RANK` prints what is measured here.
Truncation is compared with the change scaled down, all of it by one factor or
each module by its own, and with noise added to the finetune. All miss the same
norm of the change, and of each module's change except with the one factor.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from experiments.lib.adapters import ladders, teachers
from experiments.lib.figures.summaries import write_with_error
from jlora import ranks as advice
from jlora.evaluation import recovered
from jlora.numerics import norm_of


class Outcome(NamedTuple):
  """What one way of missing a part of the change does to the model.

  Attributes:
    way: its name.
    error: of all changes as one vector, relative, of the parameters measured.
    kl: text -> KL(finetuned ‖ these), nats per token, and its standard error
      over rows.
    kept: text -> 1 - kl / KL(finetuned ‖ base).
  """

  way: str
  error: float
  kl: dict[str, tuple[float, float]]
  kept: dict[str, float]


def measure_controls(
  ladder: ladders.Ladder,
  texts: Mapping[str, np.ndarray],
  rank: int,
  seeds: Sequence[int],
) -> Iterator[Outcome]:
  """Measures how each way of missing a part changes what the model says.

  Args:
    ladder: the pair, factored to `rank` or higher.
    texts: name -> (rows, time) tokens, held out.
    rank: of the truncation, clipped to what modules have.
    seeds: of the noise, each a way.

  Yields:
    Outcome: truncated, made smaller in two ways, with noise.
  """
  heard = {
    name: teachers.listen(ladder.model, ladder.finetuned, tokens)
    for name, tokens in texts.items()
  }
  alone = {
    name: teachers.distance_from(teacher, ladder.base)[0]
    for name, teacher in heard.items()
  }
  for way, params in alike(ladder, rank, seeds):
    kl = {
      name: teachers.distance_from(teacher, params)
      for name, teacher in heard.items()
    }
    kept = {name: recovered(kl[name][0], alone[name]) for name in kl}
    yield Outcome(way, error_in(ladder, params), kl, kept)


def as_table(outcomes: Sequence[Outcome], texts: Sequence[str]) -> str:
  """Formats the outcomes as a Markdown table.

  Args:
    outcomes: as `measure_controls` yields them.
    texts: names, in the order of columns.

  Returns:
    Lines.

  Example:
    >>> one = Outcome("x", 0.5, {"kjv": (0.01, 0.001)}, {"kjv": 0.98})
    >>> print(as_table([one], ["kjv"]))
    | what is missing | relative error | KL on kjv | effect kept |
    |---|---|---|---|
    | x | 0.5000 | 0.0100 ± 0.0010 | 98.00% |
  """
  heads = "".join(f" KL on {name} | effect kept |" for name in texts)
  lines = [
    f"| what is missing | relative error |{heads}",
    "|---|---|" + "---|---|" * len(texts),
  ]
  for one in outcomes:
    cells = "".join(
      f" {write_with_error(*one.kl[name])} | {one.kept[name]:.2%} |"
      for name in texts
    )
    lines.append(f"| {one.way} | {one.error:.4f} |{cells}")
  return "\n".join(lines)


def alike(
  ladder: ladders.Ladder, rank: int, seeds: Sequence[int]
) -> Iterator[tuple[str, Any]]:
  """Yields parameters that miss as much of the change as truncation does.

  Args:
    ladder: the pair.
    rank: of the truncation.
    seeds: of the noise.

  Yields:
    What was done, and the nested dict of parameters.
  """
  missing = module_errors(ladder, rank)
  ranks = {path: min(rank, len(s)) for path, s in ladder.spectra.items()}
  measure = advice.error_of(ladder.spectra, ladder.norms, ladder.rests)
  share = 1 - measure(ranks)
  cut = ladders.cut(ladder.loras, ranks)
  yield f"truncated to rank {rank}", ladders.with_loras(ladder.base, cut)
  yield (
    f"all of it x {share:.4f}",
    _changed(ladder, lambda _, base, delta: base + np.float32(share) * delta),
  )

  def smaller(path, base, delta):
    """Scales a module's change down to miss what truncation misses."""
    return base + np.float32(1 - missing[path] / ladder.norms[path]) * delta

  yield "each module smaller", _changed(ladder, smaller)
  for seed in seeds:
    rng = np.random.default_rng(seed)

    def noisy(path, base, delta, rng=rng):
      """Adds noise of the norm that truncation misses to the finetune."""
      noise = rng.standard_normal(delta.shape, np.float32)
      noise *= np.float32(missing[path] / norm_of(noise))
      return base + delta + noise

    yield f"finetune and noise, seed {seed}", _changed(ladder, noisy)


def module_errors(ladder: ladders.Ladder, rank: int) -> dict[str, float]:
  """Returns the norm of what truncation misses in every module.

  Args:
    ladder: the pair.
    rank: clipped to what modules have.

  Returns:
    path -> norm.
  """
  return {
    path: float(
      np.hypot(ladder.rests[path], np.linalg.norm(s[rank:].astype(np.float64)))
    )
    for path, s in ladder.spectra.items()
  }


def error_in(ladder: ladders.Ladder, params: Any) -> float:
  """Computes the distance of parameters from the finetune, over its change.

  Args:
    ladder: the pair.
    params: of the same structure.

  Returns:
    Of all modules as one vector.
  """
  tuned, found = _flat(ladder.finetuned), _flat(params)
  lost2 = sum(norm_of(found[p] - tuned[p]) ** 2 for p in ladder.loras)
  return float(lost2 / sum(x**2 for x in ladder.norms.values())) ** 0.5


def _changed(ladder: ladders.Ladder, make: Any) -> Any:
  """Remakes every changed module of the base by `make`."""
  base, tuned = _flat(ladder.base), _flat(ladder.finetuned)
  new = {
    path: make(path, base[path], tuned[path] - base[path])
    for path in ladder.loras
  }
  return traverse_util.unflatten_dict(base | new, sep="/")


def _flat(params: Any) -> dict[str, np.ndarray]:
  """Flattens parameters to {path: float32 array}."""
  flat = traverse_util.flatten_dict(params, sep="/")
  return {path: np.asarray(leaf, np.float32) for path, leaf in flat.items()}
