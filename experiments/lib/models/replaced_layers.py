# SPDX-License-Identifier: Apache-2.0
"""A layer of a transformer left out, or replaced by a map of low rank.

    x + (x - mean) M_r + c,   M = argmin |(x - mean) M - (y - mean)|²

x is what the layer reads and y what it adds on text, at every position; M_r
keeps the r leading directions of what M makes of x. The map is one Lora on the
residual stream, beside the identity.
"""

import functools
import time
from typing import Any

import jax
import numpy as np

from experiments.lib.adapters.ports import Case, distilled
from experiments.lib.models.loops import compile_steps, schedule
from experiments.lib.models.updated_strings import (
  TASKS,
  Size,
  make_model,
  merged,
  open_exam,
  source_of,
  start_loras,
  train_base,
  train_skill,
)
from jlora.extraction import port_adapter
from jlora.loras import Loras
from jlora.training import distil

#: In a layer's place: nothing, and maps of some ranks.
KINDS = {"nothing": 0, "a map of rank 16": 16, "a map of rank 64": 64}


def replaced(
  params: Any, layer: str, tokens: np.ndarray, rank: int, size: Size
) -> Any:
  """Replaces a layer by the map of a rank that fits what it did on text.

  Args:
    params: of the transformer.
    layer: its name, "0" for the first.
    tokens: (n, time), the text.
    rank: of the map, at most the width; 0 leaves the layer out.
    size: of the transformer.

  Returns:
    Params in which the layer has a "map" of a (width, width), b (width, width)
    and a bias, zero beyond the rank, so that all ranks share compiled programs.
  """
  names = sorted(params["h"])
  at = names.index(layer)
  read, written = (
    np.asarray(_stream(size, tuple(names[:end]))(params, tokens), np.float64)
    for end in (at, at + 1)
  )
  x = read.reshape(-1, size.width)
  y = (written - read).reshape(-1, size.width)
  a, b, bias = fit(x, y, rank)
  more = size.width - a.shape[1]
  own = {
    "a": np.pad(a, ((0, 0), (0, more))),
    "b": np.pad(b, ((0, more), (0, 0))),
    "bias": bias if rank else np.zeros_like(bias),
  }
  return {**params, "h": {**params["h"], layer: {"map": own}}}


def compact(params: Any, layer: str, rank: int) -> Any:
  """Cuts what is zero off a map; without a rank leaves the layer out."""
  layers = dict(params["h"])
  own = layers.pop(layer)["map"]
  if rank:
    low = {"a": own["a"][:, :rank], "b": own["b"][:rank], "bias": own["bias"]}
    layers[layer] = {"map": low}
  return {**params, "h": layers}


@functools.cache
def _stream(size: Size, names: tuple[str, ...]):
  """Compiles the residual stream after some layers."""
  model = make_model(size)
  return jax.jit(lambda params, tokens: model.stream(params, tokens, names))


def fit(
  x: np.ndarray, y: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Fits y by a map of a rank and a bias (reduced-rank regression).

      y ≈ x a b + bias

  Args:
    x: (n, in).
    y: (n, out).
    rank: of the map, at most min(in, out).

  Returns:
    a (in, rank), b (rank, out) and the bias (out,), float32.

  Example:
    >>> x = np.float64([[1, 0], [0, 1], [2, 1]])
    >>> a, b, bias = fit(x, 3 * x + 1, 2)
    >>> (a @ b).round(4).tolist(), bias.round(4).tolist()
    ([[3.0, 0.0], [0.0, 3.0]], [1.0, 1.0])
  """
  x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
  whole = np.linalg.lstsq(x - x_mean, y - y_mean, rcond=None)[0]
  out = np.linalg.svd((x - x_mean) @ whole, full_matrices=False)[2][:rank]
  a, b = whole @ out.T, out
  bias = y_mean - x_mean @ a @ b
  a, b, bias = (part.astype(np.float32) for part in (a, b, bias))
  return a, b, bias


def changed(kind: str, layer: str, seed: int, size: Size) -> Any:
  """Returns the base of a seed with something in a layer's place.

  Args:
    kind: of KINDS.
    layer: its name.
    seed: of the base.
    size: how much is computed.
  """
  rng = np.random.default_rng([seed, 10])
  tokens = source_of("known", seed, size)(rng, 1, size.count)[0][0, :, :-1]
  params, rank = train_base(seed, size), min(KINDS[kind], size.width)
  return replaced(params, layer, tokens, rank, size)


def carried(loras: Loras, params: Any, target: Any, layer: str) -> Loras:
  """Carries an adapter to a base that lacks a layer's matrices, by adding."""
  gone = {path: None for path in loras if path.startswith(f"h/{layer}/")}
  return port_adapter(loras, params, target, paths=gone).loras


def healed(seed: int, size: Size, target: Any) -> Any:
  """Trains a Lora on what is left to answer as the base, and adds it."""
  params = train_base(seed, size)
  rng = np.random.default_rng([seed, 11])
  batches = source_of("known", seed, size)(rng, size.short, size.batch)[:1]
  start = start_loras(target, jax.random.key(seed + 900), size.rank)
  run = _heal_run(size)
  return merged(target, run(start, (target, params, {}), batches)[0])


@functools.cache
def _heal_run(size: Size):
  """Compiles the distillation of a base."""
  optimiser = schedule(size.brisk, size.short)
  return compile_steps(*distil(make_model(size).predict, optimiser))


def measure(kind: str, layer: str, seed: int, size: Size) -> dict[str, Any]:
  """Measures the base and its programs with a layer replaced.

  Args:
    kind: of KINDS.
    layer: name of the layer.
    seed: of the base.
    size: how much is computed.

  Returns:
    "base" and "healed", (right, nats) on what the base knows; task -> "source",
    "add" on the changed base, "add, healed" and "distil" on the healed one,
    each (right, nats); and "speed", the base's seconds over the changed one's.
  """
  params, target = train_base(seed, size), changed(kind, layer, seed, size)
  exam, better = open_exam(seed, size), healed(seed, size, target)
  fast = compact(target, layer, min(KINDS[kind], size.width))
  found: dict[str, Any] = {
    "base": exam.examined(target, "known"),
    "healed": exam.examined(better, "known"),
    "speed": _seconds(params, seed, size) / _seconds(fast, seed, size),
  }
  for task in TASKS:
    loras = train_skill(task, seed, size)
    moved = carried(loras, params, target, layer)
    case = Case(task, seed, size, params, better, loras)
    trained = merged(better, distilled(case, moved))
    found[task] = {
      "source": exam.examined(merged(params, loras), task),
      "add": exam.examined(merged(target, moved), task),
      "add, healed": exam.examined(merged(better, moved), task),
      "distil": exam.examined(trained, task),
    }
  return found


def _seconds(params: Any, seed: int, size: Size, turns: int = 7) -> float:
  """Times the answers to texts that the base knows, the least of some turns."""
  rng = np.random.default_rng([seed, 12])
  tokens = source_of("known", seed, size)(rng, 1, 2 * size.count)[0][0]
  run = _predict(size)
  jax.block_until_ready(run(params, tokens))
  spent = []
  for _ in range(turns):
    began = time.perf_counter()
    jax.block_until_ready(run(params, tokens))
    spent.append(time.perf_counter() - began)
  return min(spent)


@functools.cache
def _predict(size: Size):
  """Compiles predictions."""
  return jax.jit(make_model(size).predict)
