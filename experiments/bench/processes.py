# SPDX-License-Identifier: Apache-2.0
"""Measures whole extractions as a user starts them, mergekit's and NumPy's."""

import contextlib
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.bench.arrays import Row
from experiments.lib.data import pairs
from experiments.lib.machines.processes import Usage, measure

_TURNS = 3  # runs of which each figure is the median
_ROOT = pathlib.Path(__file__).parents[2]

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


class Bench:
  """Extractions of synthetic pairs; one pair is on disk at a time.

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
    """Notes what to measure."""
    self._work, self._mergekit = work, mergekit
    self._config, self._rank = config, rank
    self._ours: dict[int, Usage] = {}
    self._theirs: dict[int, Usage] = {}

  def measure_process(self, layers: int) -> Iterator[Row]:
    """Times whole runs of ours on two depths, and of mergekit.

    Args:
      layers: of the model that the goal is about.

    Yields:
      Rows of seconds, and of ratios if there is a mergekit: medians of three.
    """
    self._take_turns([layers, 2 * layers], [1, 2] if self._mergekit else [])
    ours, more = self._ours[layers], self._ours[2 * layers]
    whole, further = f"whole, {layers} layers", "per further layer"
    note = f"{ours.processor:.1f} s of processor time; start-up included"
    yield Row("process", f"ours, {whole}", ours.wall, "s", "", note)
    step = (more.wall - ours.wall) / layers
    processor = (more.processor - ours.processor) / layers
    note = (
      f"from {layers} and {2 * layers}; {processor:.1f} s of processor time"
    )
    yield Row("process", f"ours, {further}", step, "s", "", note)
    one, two = (self._theirs.get(count) for count in (1, 2))
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
    note = f"{theirs_processor / ours.processor:.1f} x in processor time"
    what = f"speed-up, {whole}"
    yield Row("process", what, theirs / ours.wall, "x", ">= 15", note)
    note = f"{slope_processor / processor:.1f} x in processor time"
    yield Row(
      "process", f"speed-up, {further}", slope / step, "x", ">= 30", note
    )

  def measure_memory(self, layers: Sequence[int]) -> Iterator[Row]:
    """Measures peak resident memory at several depths, and its spread.

    Args:
      layers: of the models.

    Yields:
      A row per model, and one with the largest over the smallest.
    """
    peaks = []
    for count in layers:
      peaks.append(self._extract(count).peak)
      what, peak = f"peak resident, {count} layers", peaks[-1] / 2**30
      yield Row("memory", what, peak, "GiB", "<= 1.5")
    what = "largest over smallest peak"
    yield Row("memory", what, max(peaks) / min(peaks), "x", "<= 1.1")

  def measure_small(
    self, spec: Mapping[str, tuple[int, ...]], llama: Mapping[str, Any]
  ) -> Iterator[Row]:
    """Counts compilations for many small matrices; times ours and peers.

    Args:
      spec: name -> shape, for ours and NumPy.
      llama: of config.json: mergekit takes architectures that it knows.

    Yields:
      Rows of seconds and ratios.
    """
    count = len(set(spec.values()))
    with self._folder() as work:
      base, tuned = pairs.write_matrices(work, spec)
      ours = self._often(self._run_ours, base, tuned, work)
      steps = (work / "cache/compilations").glob("jit_measure_parameter*-cache")
      compilations = len(list(steps))
      program = work / "plain.py"
      program.write_text(_NUMPY)
      files = [str(file) for file in (program, base, tuned, work / "plain")]
      plain = measure([sys.executable, *files, str(self._rank)])
    kind = f"{len(spec)} matrices, {count} shapes"
    yield Row("small", f"compilations, {kind}", compilations, "", f"<= {count}")
    yield self._beside("NumPy's svd", kind, ours, plain)
    kind = f"Llama of {llama['num_hidden_layers']} layers of width"
    kind += f" {llama['hidden_size']}"
    if not self._mergekit:
      yield Row(
        "small", f"mergekit over ours, {kind}", None, "x", "", "not run"
      )
      return
    with self._folder() as work:
      base, tuned = pairs.write_pair(work, llama)
      ours = self._often(self._run_ours, base, tuned, work)
      theirs = self._often(self._run_theirs, base, tuned, work)
    yield self._beside("mergekit", kind, ours, theirs)

  def _beside(self, peer, kind, ours, theirs) -> Row:
    """Makes the row of a peer's time over ours."""
    note = f"{theirs.wall:.1f} s over {ours.wall:.1f} s, rank {self._rank}"
    ratio = theirs.wall / ours.wall
    return Row("small", f"{peer} over ours, {kind}", ratio, "x", ">= 1", note)

  @contextlib.contextmanager
  def _folder(self) -> Iterator[pathlib.Path]:
    """Makes a folder for the duration of the context."""
    with tempfile.TemporaryDirectory(dir=self._work) as folder:
      yield pathlib.Path(folder)

  def _extract(self, layers: int) -> Usage:
    """Measures ours on a pair of some depth, once."""
    if layers not in self._ours:
      self._take_turns([layers], [])
    return self._ours[layers]

  def _take_turns(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
    """Measures both tools in turns, so that all see the same machine."""
    found = {("ours", n): [] for n in ours}
    found |= {("theirs", n): [] for n in theirs}
    run = {"ours": self._run_ours, "theirs": self._run_theirs}
    with self._folder() as work:
      folders = {
        n: pairs.write_pair(
          work / str(n), {**self._config, "num_hidden_layers": n}
        )
        for n in {*ours, *theirs}
      }
      for turn in range(_TURNS):
        for (side, n), usages in found.items():
          out = work / f"{side}{n}-{turn}"
          usages.append(run[side](*folders[n], out, work / "cache"))
    middle = {key: _median(usages) for key, usages in found.items()}
    self._ours |= {n: middle["ours", n] for n in ours}
    self._theirs |= {n: middle["theirs", n] for n in theirs}

  def _often(self, run, base, tuned, work) -> Usage:
    """Measures one tool a few times; returns the median."""
    outs = (work / f"{run.__name__}{turn}" for turn in range(_TURNS))
    return _median([run(base, tuned, out, work / "cache") for out in outs])

  def _run_ours(self, base, tuned, out, cache) -> Usage:
    """Runs the command as a user starts it."""
    paths = {"base": base, "finetuned": tuned, "out": out, "cache": cache}
    arguments = [f"--{name}={value}" for name, value in paths.items()]
    arguments.append(f"--rank={self._rank}")
    command = [sys.executable, "-m", "jlora.commands.extract", *arguments]
    return measure(command, {"PYTHONPATH": str(_ROOT)})

  def _run_theirs(self, base, tuned, out, _) -> Usage:
    """Runs mergekit without the embeddings, which it would store whole."""
    command = [str(self._mergekit), "--model", str(tuned)]
    command += ["--base-model", str(base), "--out-path", str(out)]
    command += ["--max-rank", str(self._rank)]
    command += ["-e", "embed_tokens", "-e", "lm_head"]
    return measure(command, {"HF_HUB_OFFLINE": "1"})


def _median(usages: Sequence[Usage]) -> Usage:
  """Returns the median of each figure."""
  return Usage(*map(statistics.median, zip(*usages, strict=True)))
