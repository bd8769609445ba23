# SPDX-License-Identifier: Apache-2.0
"""Whole extractions as a user starts them, beside mergekit's and NumPy's."""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import pairs
from experiments.bench_arrays import Row
from experiments.processes import Usage, measure

_ROOT = pathlib.Path(__file__).parents[1]

_NUMPY = """
import sys
import numpy as np
from safetensors.numpy import load_file, save_file
base, finetuned = load_file(sys.argv[1]), load_file(sys.argv[2])
found, rank = {}, int(sys.argv[4])
for name in base:
  u, s, vt = np.linalg.svd(finetuned[name] - base[name], full_matrices=False)
  found[name + ".a"] = vt[:rank].copy()
  found[name + ".b"] = u[:, :rank] * s[:rank]
save_file(found, sys.argv[3])
"""


class Runs(NamedTuple):
  """Ours on one pair, in processes of their own.

  Attributes:
    cold: with an empty compilation cache.
    warm: with what that run left there.
    compilations: of a module's step, in the cold run.
  """

  cold: Usage
  warm: Usage
  compilations: int


class Bench:
  """Extractions of synthetic pairs, one pair on disk at a time.

  Args:
    work: folder for pairs and outputs; each is removed after its use.
    mergekit: path of mergekit-extract-lora 0.1.5, or None.
    config: of the Llama, without its number of layers.
    rank: of every module.
  """

  def __init__(
    self,
    work: pathlib.Path,
    mergekit: str | None,
    config: Mapping[str, Any],
    rank: int,
  ):
    self._work, self._mergekit = work, mergekit
    self._config, self._rank = config, rank
    self._ours: dict[int, Runs] = {}
    self._theirs: dict[int, Usage] = {}

  def measure_process(self, layers: int) -> Iterator[Row]:
    """Whole runs of `layers` and twice as many layers, and mergekit's of 1, 2.

    Args:
      layers: of the model that the goal is about.

    Yields:
      Rows of seconds, and of ratios if there is a mergekit.
    """
    cold, warm, _ = self._extract(layers)
    more = self._extract(2 * layers).warm
    whole, further = f"whole, {layers} layers", "per further layer"
    note = "{:.1f} s of processor time; start-up included"
    for label, usage in (("empty", cold), ("warm", warm)):
      what = f"ours, {whole}, {label} compilation cache"
      yield Row(
        "process", what, usage.wall, "s", "", note.format(usage.processor)
      )
    step = (more.wall - warm.wall) / layers
    processor = (more.processor - warm.processor) / layers
    note = (
      f"from {layers} and {2 * layers}; {processor:.1f} s of processor time"
    )
    yield Row("process", f"ours, {further}", step, "s", "", note)
    one, two = (self._extract_theirs(count) for count in (1, 2))
    if one is None or two is None:
      for what, goal in ((whole, ">= 15"), (further, ">= 30")):
        yield Row("process", f"speed-up, {what}", None, "x", goal, "not run")
      return
    slope = two.wall - one.wall
    theirs = two.wall + (layers - 2) * slope
    note = (
      f"scaled linearly from 1 and 2 layers, {one.wall:.1f}, {two.wall:.1f} s"
    )
    yield Row("process", f"mergekit, {whole}", theirs, "s", "", note)
    slope_processor = two.processor - one.processor
    theirs_processor = two.processor + (layers - 2) * slope_processor
    for label, ours, goal in (("empty", cold, ">= 15"), ("warm", warm, "")):
      what = f"speed-up, {whole}, {label} compilation cache"
      note = f"{theirs_processor / ours.processor:.1f} x in processor time"
      yield Row("process", what, theirs / ours.wall, "x", goal, note)
    note = f"{slope_processor / processor:.1f} x in processor time"
    yield Row(
      "process", f"speed-up, {further}", slope / step, "x", ">= 30", note
    )

  def measure_memory(self, layers: Sequence[int]) -> Iterator[Row]:
    """Peak resident memory, cold, and how far it differs.

    Args:
      layers: of the models.

    Yields:
      A row per model, and one with the largest over the smallest.
    """
    peaks = []
    for count in layers:
      runs = self._extract(count)
      peaks.append(runs.cold.peak)
      note = f"compiling; {runs.warm.peak / 2**30:.2f} GiB with a warm cache"
      what = f"peak resident, {count} layers"
      peak = peaks[-1] / 2**30
      yield Row("memory", what, peak, "GiB", "<= 1.5", note)
    what = "largest over smallest peak"
    yield Row("memory", what, max(peaks) / min(peaks), "x", "<= 1.1")

  def measure_small(
    self, spec: Mapping[str, tuple[int, ...]], llama: Mapping[str, Any]
  ) -> Iterator[Row]:
    """Many small matrices: compilations, and time against the peers'.

    Args:
      spec: name -> shape, for ours and NumPy.
      llama: of config.json: mergekit takes architectures that it knows.

    Yields:
      Rows of seconds and ratios.
    """
    count = len(set(spec.values()))
    with self._folder() as work:
      base, tuned = pairs.write_matrices(work, spec)
      runs = self._run_ours(base, tuned, work)
      program = work / "plain.py"
      program.write_text(_NUMPY)
      files = [str(file) for file in (program, base, tuned, work / "plain")]
      plain = measure([sys.executable, *files, str(self._rank)])
    kind = f"{len(spec)} matrices, {count} shapes"
    yield Row(
      "small", f"compilations, {kind}", runs.compilations, "", f"<= {count}"
    )
    yield from self._beside("NumPy's svd", kind, runs, plain, ">= 1")
    kind = f"Llama of {llama['num_hidden_layers']} layers of width"
    kind += f" {llama['hidden_size']}"
    if not self._mergekit:
      yield Row(
        "small", f"mergekit over ours, {kind}", None, "x", "", "not run"
      )
      return
    with self._folder() as work:
      base, tuned = pairs.write_pair(work, llama)
      runs = self._run_ours(base, tuned, work)
      theirs = self._run_theirs(base, tuned, work)
    yield from self._beside("mergekit", kind, runs, theirs, ">= 1")

  def _beside(self, peer, kind, runs, theirs, goal) -> Iterator[Row]:
    """Whole processes of a peer over ours, cold and warm."""
    for label, ours in (("empty", runs.cold), ("warm", runs.warm)):
      what = f"{peer} over ours, {kind}, {label} compilation cache"
      note = f"{theirs.wall:.1f} s over {ours.wall:.1f} s, rank {self._rank}"
      yield Row("small", what, theirs.wall / ours.wall, "x", goal, note)

  @contextlib.contextmanager
  def _folder(self) -> Iterator[pathlib.Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=self._work) as folder:
      yield pathlib.Path(folder)

  def _extract(self, layers: int) -> Runs:
    """Ours on a pair of so many layers, run once."""
    if layers not in self._ours:
      self._measure_pair(layers, ours=True, theirs=False)
    return self._ours[layers]

  def _extract_theirs(self, layers: int) -> Usage | None:
    """Mergekit's on a pair of so many layers, run once."""
    if self._mergekit and layers not in self._theirs:
      self._measure_pair(layers, ours=False, theirs=True)
    return self._theirs.get(layers)

  def _measure_pair(self, layers: int, *, ours: bool, theirs: bool) -> None:
    config = {**self._config, "num_hidden_layers": layers}
    with self._folder() as work:
      base, tuned = pairs.write_pair(work, config)
      if ours:
        self._ours[layers] = self._run_ours(base, tuned, work)
      if theirs and self._mergekit:
        self._theirs[layers] = self._run_theirs(base, tuned, work)

  def _run_ours(self, base, tuned, work) -> Runs:
    """The script twice: its compilation cache is empty, then filled."""
    cache = work / "cache"
    usages = []
    for turn in ("cold", "warm"):
      paths = {"base": base, "finetuned": tuned, "out": work / turn}
      paths |= {"cache": cache, "rank": self._rank}
      arguments = [f"--{name}={value}" for name, value in paths.items()]
      command = [sys.executable, "-m", "experiments.extract", *arguments]
      usages.append(measure(command, {"PYTHONPATH": str(_ROOT)}))
    steps = (cache / "compilations").glob("jit_measure_parameter*-cache")
    return Runs(usages[0], usages[1], len(list(steps)))

  def _run_theirs(self, base, tuned, work) -> Usage:
    """Mergekit without the embeddings, which it would store whole."""
    command = [str(self._mergekit), "--model", str(tuned)]
    command += ["--base-model", str(base), "--out-path", str(work / "theirs")]
    command += ["--max-rank", str(self._rank)]
    command += ["-e", "embed_tokens", "-e", "lm_head"]
    return measure(command, {"HF_HUB_OFFLINE": "1"})
