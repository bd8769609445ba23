# SPDX-License-Identifier: Apache-2.0
"""What beats truncated SVD at the same bytes: one table with every variant.

  python -m experiments.equal_bytes [--rank=16] [--steps=100] [--smoke]

The finetune is SmolLM2 on the King James Bible (`experiments.finetune`); an
adapter's distance is KL(finetuned ‖ base + adapter) on text held out of the
finetune's domain and of another. Whatever is fitted is fitted to training text
of the first domain. The bytes are those of plain SVD at `--rank` in bfloat16;
every variant stays within them.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from absl import app, flags

import jlora
from experiments import finetune, ladders, smollm2, texts
from experiments.caches import keep_compilations
from jlora import packing, ranks, refinement
from jlora.divergences import mean_kl


@dataclasses.dataclass
class Trial:
  """A pair, its budget and its texts; what is costly is made once.

  Attributes:
    ladder: the pair, factored.
    rank: of plain SVD, which sets the budget.
    calibration: (rows, time) tokens that fitting may see.
    steps: of refining.
    seed: of the order in which refining sees them.
  """

  ladder: ladders.Ladder
  rank: int
  calibration: np.ndarray
  steps: int
  seed: int

  @property
  def max_bytes(self) -> int:
    """Of plain SVD in bfloat16."""
    return ladders.bytes_of(self.ladder.shapes, self.rank)

  @functools.cached_property
  def sensitivity(self) -> dict[str, float]:
    """Divergence for each unit of squared error, by module, at `rank`."""
    return measure_sensitivity(self.ladder, self.rank, self.calibration[:2])

  def refined(self, rank: int) -> jlora.Loras:
    """The first units, refined; kept from variant to variant."""
    if rank not in self._refined:
      start = ladders.cut(self.ladder.loras, rank)
      self._refined[rank] = fit(
        self.ladder, start, self.calibration, self.steps, self.seed
      )
    return self._refined[rank]

  def __post_init__(self):
    self._refined: dict[int, jlora.Loras] = {}


Made = tuple[Mapping[str, jlora.Lora], int]


def in_bfloat16(loras: Mapping[str, jlora.Lora]) -> Made:
  """Loras rounded to bfloat16, and their bytes."""
  made = {path: jax.tree.map(_rounded, lora) for path, lora in loras.items()}
  return made, sum(lora.nbytes for lora in made.values())


def _rounded(x: Any) -> Any:
  """Factors in bfloat16; a scale stays."""
  x = np.asarray(x)
  return x.astype(ml_dtypes.bfloat16) if x.ndim else x


def in_bits(loras: Mapping[str, jlora.Lora], bits: Mapping[str, Any]) -> Made:
  """Loras packed and unpacked, and their packed bytes."""
  packed = {
    path: packing.pack(lora, bits[path]) for path, lora in loras.items()
  }
  size = sum(x.nbytes for x in packed.values())
  return {path: packing.unpack(x) for path, x in packed.items()}, size


def plain(trial: Trial) -> Made:
  """Truncated SVD of every module at one rank, in bfloat16."""
  return in_bfloat16(ladders.cut(trial.ladder.loras, trial.rank))


def spread(trial: Trial, spectra: Mapping[str, np.ndarray]) -> Made:
  """Uneven ranks from the byte budget, in bfloat16."""
  units = {path: 2 * sum(shape) for path, shape in trial.ladder.shapes.items()}
  chosen = ranks.budget(spectra, units, trial.max_bytes)
  return in_bfloat16(ladders.cut(trial.ladder.loras, chosen))


def even_bits(trial: Trial, bits: int) -> Made:
  """One width for all and as many more units as the bytes allow."""
  rank = trial.rank
  while True:
    loras = ladders.cut(trial.ladder.loras, rank + 1)
    size = sum(
      lora.rank * (-(-bits * (lora.a.shape[1] + lora.b.shape[1]) // 8) + 9)
      for lora in loras.values()
    )
    if size > trial.max_bytes:
      loras = ladders.cut(trial.ladder.loras, rank)
      return in_bits(loras, dict.fromkeys(loras, bits))
    rank += 1


def spread_bits(trial: Trial, spectra: Mapping[str, np.ndarray]) -> Made:
  """Rank and widths chosen together, by squared error for each byte."""
  ladder = trial.ladder
  bits = packing.bits_within(spectra, ladder.shapes, trial.max_bytes)
  return in_bits(ladder.loras, bits)


def weighted(trial: Trial) -> dict[str, np.ndarray]:
  """Singular values in units of divergence."""
  return {
    path: s * np.sqrt(trial.sensitivity[path])
    for path, s in trial.ladder.spectra.items()
  }


def refined_bits(trial: Trial, rank: int, sensitive: bool) -> Made:
  """More units, refined, taken apart anew, then packed into the bytes."""
  factors = {
    path: jlora.recompress(lora.a, lora.b, lora.rank)
    for path, lora in trial.refined(rank).items()
  }
  loras = {path: jlora.from_factors(f) for path, f in factors.items()}
  spectra = {path: f.s for path, f in factors.items()}
  if sensitive:
    weights = {path: np.sqrt(trial.sensitivity[path]) for path in spectra}
    spectra = {path: s * weights[path] for path, s in spectra.items()}
  shapes = {path: trial.ladder.shapes[path] for path in loras}
  bits = packing.bits_within(spectra, shapes, trial.max_bytes)
  return in_bits(loras, bits)


_PLAIN = "plain SVD in bfloat16"

#: name -> trial -> (Loras, bytes).
VARIANTS: dict[str, Callable[[Trial], Made]] = {
  "no adapter": lambda _: ({}, 0),
  _PLAIN: plain,
  "ranks by squared error": lambda t: spread(t, t.ladder.spectra),
  "ranks by sensitivity": lambda t: spread(t, weighted(t)),
  "8 bits": lambda t: even_bits(t, 8),
  "4 bits": lambda t: even_bits(t, 4),
  "2 bits": lambda t: even_bits(t, 2),
  "bits by squared error": lambda t: spread_bits(t, t.ladder.spectra),
  "bits by sensitivity": lambda t: spread_bits(t, weighted(t)),
  "refined in bfloat16": lambda t: in_bfloat16(t.refined(t.rank)),
  "refined at 4 x rank in bits by squared error": lambda t: refined_bits(
    t, 4 * t.rank, sensitive=False
  ),
  "refined at 4 x rank in bits by sensitivity": lambda t: refined_bits(
    t, 4 * t.rank, sensitive=True
  ),
}


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
    rest = np.square(ladder.norms[path]) - np.sum(
      np.square(ladder.spectra[path][:rank], dtype=np.float64)
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
  init, update = refinement.refine(ladder.model, optax.adam(schedule))
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


def compare_variants(
  trial: Trial,
  texts_: Mapping[str, np.ndarray],
  variants: Mapping[str, Callable[[Trial], Made]] = VARIANTS,
) -> Iterator[dict[str, Any]]:
  """A row of the table for every variant, as soon as it is measured.

  Args:
    trial: the pair and its budget.
    texts_: name -> (rows, time) tokens, held out.
    variants: name -> what makes the adapter.

  Yields:
    variant, bytes, seconds to make, and for each text `kl` and `kl_error`.
  """
  ladder = trial.ladder
  for name, make in variants.items():
    began = time.perf_counter()
    loras, nbytes = make(trial)
    seconds = time.perf_counter() - began
    params = ladders.with_loras(ladder.base, loras)
    row = {"variant": name, "bytes": nbytes, "seconds": round(seconds, 1)}
    for text, tokens in texts_.items():
      found = mean_kl(
        ladder.model,
        ladder.finetuned,
        params,
        tokens.reshape(-1, 1, tokens.shape[1]),
      )
      row[text] = {"kl": found.kl, "kl_error": found.kl_error}
    yield row


def as_line(row: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
  """A row of the table, with each divergence over plain SVD's.

  Args:
    row: as measured.
    reference: plain SVD's row.

  Returns:
    A Markdown table's line.

  Example:
    >>> row = {"variant": "x", "bytes": 2**20, "seconds": 1.0,
    ...        "kjv": {"kl": 0.5, "kl_error": 0.1}}
    >>> as_line(row, row)
    '| x | 1.00 | 0.50000 ± 0.10000 | 1.000 | 1.0 |'
  """
  cells = [row["variant"], f"{row['bytes'] / 2**20:.2f}"]
  for name, value in row.items():
    if isinstance(value, Mapping):
      cells += [f"{value['kl']:.5f} ± {value['kl_error']:.5f}"]
      cells += [f"{value['kl'] / reference[name]['kl']:.3f}"]
  return "| " + " | ".join([*cells, f"{row['seconds']:.1f}"]) + " |"


def make_trial(
  cache: str | None, rank: int, steps: int, seed: int, rows: int
) -> tuple[Trial, dict[str, np.ndarray]]:
  """The SmolLM2 pair with its texts.

  Args:
    cache: as `caches.cache_folder`.
    rank: of plain SVD.
    steps: of refining.
    seed: of refining.
    rows: of held-out text, 128 tokens each.

  Returns:
    Trial, and name -> (rows, 128) held-out tokens.
  """
  base, tuned = finetune.kjv_pair(cache)
  encode = smollm2.tokenizer(base)
  train, held = texts.split(smollm2.kjv(cache))
  take = functools.partial(texts.excerpts, encode=encode, length=127)
  # Rows between those that the finetune saw, of the same nine tenths.
  calibration = take(train, rows=160)
  held_out = {
    "kjv": take(held, rows=rows),
    "pydoc": take(texts.split(texts.pydoc())[1], rows=rows),
  }
  ladder = ladders.load_ladder(base, tuned, 256)
  return Trial(ladder, rank, calibration, steps, seed), held_out


def tiny_trial(work: str, seed: int) -> tuple[Trial, dict[str, np.ndarray]]:
  """The tiny pair: does it run?"""
  pair = finetune.tiny_pair(work, jax.random.key(seed))
  train, held = texts.split(texts.pydoc())
  take = functools.partial(texts.excerpts, encode=texts.encode_bytes, length=63)
  ladder = ladders.load_ladder(*pair, 32)
  trial = Trial(ladder, 2, take(train, rows=24), 20, seed)
  return trial, {"pydoc": take(held, rows=4)}


def main(_: list[str]) -> None:
  """Prints the table and writes it as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  with tempfile.TemporaryDirectory() as work:
    trial, held_out = (
      tiny_trial(work, values.seed)
      if values.smoke
      else make_trial(
        values.cache, values.rank, values.steps, values.seed, values.rows
      )
    )
  names = "".join(f" KL on {name} | x plain |" for name in held_out)
  print(
    f"| variant | MiB |{names} s |\n|---|---|{'---|---|' * len(held_out)}---|"
  )
  chosen = {name: VARIANTS[name] for name in values.only or VARIANTS}
  rows: list[dict[str, Any]] = []
  for row in compare_variants(trial, held_out, chosen):
    rows.append(row)
    reference = next((r for r in rows if r["variant"] == _PLAIN), row)
    print(as_line(row, reference), flush=True)
    if values.out:
      settings = {"rank": trial.rank, "steps": trial.steps, "seed": trial.seed}
      text = json.dumps({"settings": settings, "rows": rows}, indent=1)
      pathlib.Path(values.out).write_text(text + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("rank", 16, "Of plain SVD, whose bytes are the budget.")
  flags.DEFINE_integer("steps", 100, "Of refining.")
  flags.DEFINE_integer("seed", 0, "Of refining.")
  flags.DEFINE_integer("rows", 16, "Held-out rows of 128 tokens, each text.")
  flags.DEFINE_list("only", None, "Some variants by name; all without it.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file for the rows.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
