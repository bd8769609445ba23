# SPDX-License-Identifier: Apache-2.0
"""Does `jlora serve` say what each adapter says alone, and how fast is it?

  python -m experiments.bench.serving [--quick] [--json=FILE] [--part=NAME]

Storm: 200 adapters of a small random model through a room of 32, asked 2,000
times by 50 clients in random order over loopback, while some clients go away
and a damaged adapter is asked for, too; then SIGTERM while all of them wait.
Every answer is compared with two others, token for token: the same server asked
for one thing at a time, and `jlora.models.generate` on weights that the
adapter was summed into. Nothing may be compiled after the start.

Speed: a larger random model with 32 rows of a batch, each with an adapter of
its own, beside a server of the base alone, in turns; tokens a second and the
servers' processor time. The goal is at least 0.8 of the base's speed. Where
others use the machine, read the processor time.
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import jlora
from experiments.lib.machines.servers import Answered, Asked, ask_all, serving
from jlora import models
from jlora.loras import Lora, Loras
from jlora.paths import flatten

_QUICK = flags.DEFINE_bool("quick", False, "Few of everything.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_PART = flags.DEFINE_enum("part", "both", ["both", "storm", "speed"], "Which.")

_PROMPT = 24  # tokens of a prompt, at most
_DAMAGED = "damaged"


class Storm(NamedTuple):
  """The sizes of the storm.

  Attributes:
    count: tokens of an answer.
    leaving: further requests whose clients go away.
  """

  adapters: int = 200
  requests: int = 2000
  clients: int = 50
  room: int = 32
  rows: int = 16
  count: int = 12
  leaving: int = 60


class Speed(NamedTuple):
  """The sizes of the race.

  Attributes:
    turns: timed ones; one more is not counted.
  """

  hidden: int = 512
  rows: int = 32
  rank: int = 8
  layers: int = 2
  count: int = 33
  turns: int = 5


QUICK_STORM = Storm(6, 40, 5, 2, 3, 6, 4)
QUICK_SPEED = Speed(64, 4, 2, 1, 9, 2)


def config_of(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
  """Returns the config of a Llama."""
  heads = max(hidden // 64, 2)
  return {
    "model_type": "llama",
    "vocab_size": vocabulary,
    "hidden_size": hidden,
    "intermediate_size": hidden * 11 // 4,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
  }


def write_models(
  folder: pathlib.Path, config: dict[str, Any], ranks: Sequence[int]
) -> dict[str, Loras]:
  """Writes a random base, and an adapter of each rank for all its layers.

  Args:
    folder: gets `base` and `adapters`.
    config: of the base.
    ranks: of the adapters, whose names are their numbers.

  Returns:
    name -> Loras.
  """
  _, params = models.init(config, jax.random.key(0))
  models.save(folder / "base", params, config)
  shapes = {
    path: leaf.shape
    for path, leaf in flatten(params).items()
    if path.startswith("layers") and path.endswith("kernel")
  }
  found = {}
  for i, rank in enumerate(ranks):
    draw = np.random.default_rng(i).standard_normal
    found[f"lora-{i}"] = {
      path: Lora(
        jnp.asarray(draw((rank, into), np.float32)),
        jnp.asarray(draw((rank, out), np.float32) / np.float32(into**0.5)),
        jnp.float32(0.5),
      )
      for path, (into, out) in shapes.items()
    }
    jlora.save_peft(
      folder / "adapters" / f"lora-{i}",
      found[f"lora-{i}"],
      like=flatten(params),
      rename=models.hf_name,
      model_type="llama",
    )
  return found


def draw_requests(sizes: Storm, names: Sequence[str]) -> list[Asked]:
  """Draws requests, as many for each adapter, in random order."""
  rng = np.random.default_rng(0)
  found = []
  for i in range(sizes.requests):
    prompt = rng.integers(0, 256, rng.integers(1, _PROMPT + 1))
    found.append(
      Asked(names[i % len(names)], tuple(prompt.tolist()), sizes.count)
    )
  for i in range(sizes.leaving):
    found.append(found[i]._replace(leaves=True))
    found.append(found[i]._replace(model=_DAMAGED))
  return [found[i] for i in rng.permutation(len(found))]


def answer_apart(
  folder: pathlib.Path, loras: dict[str, Loras], asked: Sequence[Asked]
) -> dict[Asked, list[int]]:
  """Answers requests with adapters that are summed into the weights."""
  model, params = models.load(folder / "base")
  by_name: dict[str, list[Asked]] = {}
  for one in asked:
    by_name.setdefault(one.model, []).append(one)
  most = max(map(len, by_name.values()))
  found = {}
  for name, own in by_name.items():
    summed = jlora.apply(params, jax.tree.map(jnp.asarray, loras[name]))
    padded = np.zeros((most, _PROMPT), np.int32)
    lengths = np.ones(most, np.int32)
    for row, one in enumerate(own):
      lengths[row] = len(one.prompt)
      padded[row, : len(one.prompt)] = one.prompt
    said = models.generate(
      model, summed, jnp.asarray(padded), own[0].count,
      lengths=jnp.asarray(lengths),
    )  # fmt: skip
    found |= dict(zip(own, np.asarray(said).tolist(), strict=False))
  return found


def storm(sizes: Storm, folder: pathlib.Path) -> dict[str, Any]:
  """Asks a server for everything at once, and counts what is wrong."""
  ranks = [1 + i % 8 for i in range(sizes.adapters)]
  loras = write_models(folder, config_of(64, 2, 256), ranks)
  broken = folder / "adapters" / _DAMAGED
  broken.mkdir()
  (broken / "adapter_config.json").write_text("{")
  asked = draw_requests(sizes, list(loras))
  # By adapter, so that each is read from its folder once where one is asked.
  plain = [x for x in asked if not x.leaves and x.model != _DAMAGED]
  plain.sort(key=lambda one: one.model)
  last = plain[:: max(len(plain) // sizes.clients, 1)][: sizes.clients] * 2
  flags_ = (f"--room={sizes.room}", f"--rows={sizes.rows}", "--length=96")
  flags_ += (f"--queue={2 * sizes.clients}", "--host_mib=4")
  with serving(folder / "base", folder / "adapters", *flags_) as server:
    began = time.perf_counter()
    answers = ask_all(server, asked, sizes.clients)
    seconds = time.perf_counter() - began
    print(f"storm: {seconds:.0f} s, {len(asked)} requests", flush=True)
    after = server.health()
    alone = ask_all(server, plain, 1)
    print("storm: asked again, one at a time", flush=True)
    ending = ask_all(
      server, last, sizes.clients,
      lambda done: server.process.terminate() if done == 3 else None,
    )  # fmt: skip
    code = server.process.wait(600)
  got = list(zip(asked, answers, strict=True))
  one_by_one = dict(zip(plain, (x.tokens for x in alone), strict=True))
  return {
    "sizes": sizes._asdict(),
    "seconds": seconds,
    **_compared(got, one_by_one, answer_apart(folder, loras, plain)),
    "compilations after the start": after["compilations"],
    "running or waiting in the end": after["running"] + after["waiting"],
    "damaged, asked": sum(x.model == _DAMAGED for x in asked),
    "damaged, told": _told(got, "is damaged"),
    "at SIGTERM": _ending(last, ending, one_by_one),
    "exit code": code,
  }


def _compared(got, one_by_one, apart) -> dict[str, int]:
  """Counts answers, and those that differ from what each adapter says alone."""
  said = [(one, found.tokens) for one, found in got if one in apart]
  return {
    "asked": len(said),
    "answered": sum(tokens is not None for _, tokens in said),
    "differ from one at a time": sum(x != one_by_one[one] for one, x in said),
    "differ from summed weights": sum(x != apart[one] for one, x in said),
    "distinct answers": len({tuple(x or ()) for _, x in said}),
  }


def _told(got: Sequence[tuple[Asked, Answered]], words: str) -> int:
  """Counts requests for the damaged adapter that were told of it."""
  return sum(x.model == _DAMAGED and words in y.error for x, y in got)


def _ending(asked, answers: Sequence[Answered], wanted) -> dict[str, int]:
  """Counts what requests got while the server was stopped."""
  right = [x.tokens == wanted[a] for a, x in zip(asked, answers, strict=True)]
  is_told = [
    "shutting down" in x.error or "Connection" in x.error for x in answers
  ]
  return {
    "right": sum(right),
    "told": sum(is_told),
    "else": len(right) - sum(right) - sum(is_told),
  }


def speed(sizes: Speed, folder: pathlib.Path) -> dict[str, Any]:
  """Times a batch of adapters and a batch of the base, in turns."""
  config = config_of(sizes.hidden, sizes.layers, 2048)
  names = list(write_models(folder, config, [sizes.rank] * sizes.rows))
  rng = np.random.default_rng(0)
  prompts = [
    tuple(rng.integers(0, 2048, 16).tolist()) for _ in range(sizes.rows)
  ]
  common = (f"--rows={sizes.rows}", "--length=128", "--piece=16", "--steps=8")
  kinds = {
    "base": ("--room=0", ["base"] * sizes.rows),
    "adapters": (f"--room={sizes.rows}", names),
  }
  figures: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
  places = folder / "base", folder / "adapters"
  own = f"--rank={sizes.rank}"
  with (
    serving(*places, *common, own, kinds["base"][0]) as base,
    serving(*places, *common, own, kinds["adapters"][0]) as adapters,
  ):
    servers = {"base": base, "adapters": adapters}
    for turn in range(sizes.turns + 1):
      for kind, (_, asked) in kinds.items():
        found = _timed(servers[kind], asked, prompts, sizes)
        print(f"speed: turn {turn}, {kind}: {found}", flush=True)
        if turn:  # the first one is not counted
          figures[kind].append(found)
  return {"sizes": sizes._asdict(), **_ratios(figures)}


def _timed(server, names, prompts, sizes: Speed) -> tuple[float, float]:
  """Returns tokens a second, and a second of the processors."""
  asked = [
    Asked(name, prompt, sizes.count)
    for name, prompt in zip(names, prompts, strict=True)
  ]
  before = server.health()["processor_seconds"]
  began = time.perf_counter()
  answers = ask_all(server, asked, len(asked))
  seconds = time.perf_counter() - began
  used = server.health()["processor_seconds"] - before
  wrong = [x.error for x in answers if x.error]
  if wrong:
    raise RuntimeError(wrong[0])
  tokens = sizes.count * len(asked)
  return tokens / seconds, tokens / used


def _ratios(figures: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
  """Summarises the turns: medians, and the mean ratio with its error."""
  found: dict[str, Any] = {}
  for i, unit in enumerate(("second", "processor second")):
    each = {kind: [x[i] for x in own] for kind, own in figures.items()}
    ratios = [
      a / b for a, b in zip(each["adapters"], each["base"], strict=True)
    ]
    for kind, own in each.items():
      found[f"{kind}, tokens a {unit}"] = statistics.median(own)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    found[f"ratio by {unit}s"] = statistics.mean(ratios)
    found[f"its standard error by {unit}s"] = error
  return found


def main(argv: Sequence[str]) -> None:
  """Runs the parts and prints their figures."""
  if len(argv) > 1:
    raise app.UsageError(f"only flags are taken, got {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # a line for each request
  found = {}
  parts = {
    "storm": lambda at: storm(QUICK_STORM if _QUICK.value else Storm(), at),
    "speed": lambda at: speed(QUICK_SPEED if _QUICK.value else Speed(), at),
  }
  for name, run in parts.items():
    if _PART.value in ("both", name):
      with tempfile.TemporaryDirectory() as folder:
        found[name] = run(pathlib.Path(folder))
      for what, value in found[name].items():
        print(f"{name}: {what}: {value}", flush=True)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
