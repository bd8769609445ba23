# SPDX-License-Identifier: Apache-2.0
"""Walks the model types of the installed transformers; `make test-families`.

  python -m tests.families --jobs=2 --out=docs/families.md

Each type runs in a process of its own, with limits of time and memory. Rows go
to a file as they come; types that are there already are not walked again.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= {
  "HF_HUB_OFFLINE": "1",
  "JAX_PLATFORMS": "cpu",
  "OPENBLAS_NUM_THREADS": "1",
  "TOKENIZERS_PARALLELISM": "false",
  "TRANSFORMERS_VERBOSITY": "error",
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
warnings.simplefilter("ignore")

import torch  # noqa: E402  after what it reads
import transformers  # noqa: E402

from tests.families import build, table  # noqa: E402
from tests.families.walk import (  # noqa: E402
  NOT_BUILT,
  WRONG,
  as_json,
  summary,
  walk,
)

_FORK = multiprocessing.get_context("fork")


def main(words: list[str] | None = None) -> int:
  """Walks, writes rows and the table; 1 if the promise is not kept."""
  parser = argparse.ArgumentParser(prog="python -m tests.families")
  add = parser.add_argument
  add("--only", default="", help="A regex of whole model types.")
  add("--again", default="", help="A regex of verdicts to walk again.")
  add("--jobs", type=int, default=2, help="Processes at a time.")
  add("--seconds", type=int, default=60, help="The most for a type.")
  add("--gibibytes", type=int, default=12, help="Address space of a type.")
  add("--rows", type=Path, default=Path("build/families.jsonl"))
  add("--out", type=Path, help="A page of Markdown to write.")
  asked = parser.parse_args(words)

  asked.rows.parent.mkdir(parents=True, exist_ok=True)
  rows = read_rows(asked.rows)
  todo = [
    name
    for name in ordered(build.model_types())
    if re.fullmatch(asked.only or ".*", name)
    if name not in rows
    or (asked.again and re.fullmatch(asked.again, rows[name]["verdict"]))
  ]
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.set_num_threads(1)
  with asked.rows.open("a") as file:
    for done, row in enumerate(walk_all(todo, asked), 1):
      rows[row["type"]] = row
      print(as_json(row), file=file, flush=True)
      print(f"{done}/{len(todo)} {table.line(row)}", flush=True)
  if asked.out:
    asked.out.write_text(table.page(list(rows.values())), encoding="utf-8")
  faults = table.faults(list(rows.values()))
  print("\n".join(faults) or "all is well")
  return int(bool(faults))


def ordered(names: list[str]) -> list[str]:
  """Whole models before their parts, so that a short walk shows most."""
  part = re.compile(r".*_(model|encoder|decoder|text|vision|audio|tokenizer)")
  return sorted(names, key=lambda name: (bool(part.fullmatch(name)), name))


def read_rows(path: Path) -> dict[str, dict]:
  """The last row of each type; half a line at the end is no row."""
  rows = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    rows[row["type"]] = row
  return rows


def walk_all(names, asked):
  """Rows as they are done."""
  waiting, running = list(names)[::-1], []
  while waiting or running:
    while waiting and len(running) < asked.jobs:
      running.append(Worker(waiting.pop(), asked))
    for worker in list(running):
      row = worker.row()
      if row is not None:
        running.remove(worker)
        yield row
    time.sleep(0.05)


class Worker:
  """A type in a process of its own."""

  def __init__(self, name, asked):
    self.name, self.asked = name, asked
    self.folder = tempfile.TemporaryDirectory()
    self.started = time.monotonic()
    self.process = _FORK.Process(target=self._run)
    self.process.start()

  def _run(self):
    most = self.asked.gibibytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    folder = Path(self.folder.name)
    try:
      row = walk(self.name, folder)
    except Exception as error:
      why = f"the walk itself: {summary(error)}"
      row = {"type": self.name, "verdict": WRONG, "why": why}
    (folder / "row.tmp").write_text(as_json(row))
    (folder / "row.tmp").rename(folder / "row.json")

  def row(self):
    """The row, once there is one."""
    late = time.monotonic() - self.started > self.asked.seconds
    if self.process.is_alive() and not late:
      return None
    folder, why = Path(self.folder.name), f"over {self.asked.seconds} s"
    if not self.process.is_alive():
      why = f"the process ended with {self.process.exitcode}"
    self.process.kill()
    self.process.join()
    done, stage = folder / "row.json", folder / "stage"
    if done.exists():
      row = json.loads(done.read_text())
    else:
      at = stage.read_text() if stage.exists() else "starting"
      verdict = WRONG if at == "extracting" else NOT_BUILT
      row = {
        "type": self.name, "verdict": verdict, "why": f"{why} while {at}"
      }  # fmt: skip
    self.folder.cleanup()
    return row


if __name__ == "__main__":
  sys.exit(main())
