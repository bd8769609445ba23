# SPDX-License-Identifier: Apache-2.0
"""Walks the model types of the installed transformers; `make test-families`.

  python -m tests.families --jobs=2 --out=docs/families.md

Processes with limits of time and memory walk them. Rows go to a file as they
come; types that are there already are walked again once jlora has changed.
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
import zlib
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
  add("--seconds", type=int, default=120, help="Processor time of a type.")
  add("--each", type=int, default=25, help="Types that a process walks.")
  add("--gibibytes", type=int, default=12, help="Address space of a type.")
  add("--rows", type=Path, default=Path("build/families.jsonl"))
  add("--out", type=Path, help="A page of Markdown to write.")
  asked = parser.parse_args(words)

  asked.rows.parent.mkdir(parents=True, exist_ok=True)
  rows, now = read_rows(asked.rows), table.commit()
  todo = [
    name
    for name in ordered(build.model_types())
    if re.fullmatch(asked.only or ".*", name)
    if rows.get(name, {}).get("jlora") != now
    or (asked.again and re.fullmatch(asked.again, rows[name]["verdict"]))
  ]
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.set_num_threads(1)
  with asked.rows.open("a") as file:
    for done, row in enumerate(walk_all(todo, asked), 1):
      rows[row["type"]] = row = row | {"jlora": now}
      print(as_json(row), file=file, flush=True)
      print(f"{done}/{len(todo)} {table.line(row)}", flush=True)
  if asked.out:
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(table.page(list(rows.values())), encoding="utf-8")
  faults = table.faults(list(rows.values()))
  print("\n".join(faults) or "all is well")
  return int(bool(faults))


def ordered(names: list[str]) -> list[str]:
  """Whole models before their parts, mixed, so that a short walk shows most."""
  part = re.compile(r".*_(model|encoder|decoder|text|vision|audio|tokenizer)")

  def place(name):
    return bool(part.fullmatch(name)), zlib.crc32(name.encode())

  return sorted(names, key=place)


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
  waiting = list(names)[::-1]
  workers = [Worker(asked) for _ in range(asked.jobs)]
  while True:
    for worker in workers:
      if worker.name is None and waiting:
        worker.begin(waiting.pop())
      elif worker.name is not None and (row := worker.row()) is not None:
        yield row
    if not waiting and all(worker.name is None for worker in workers):
      break
    time.sleep(0.1)
  for worker in workers:
    worker.end()


class Worker:
  """A process that walks types one by one, so that it compiles a shape once.

  It is replaced after some types, and when one takes too long or ends it.
  """

  def __init__(self, asked):
    self.asked, self.process, self.name = asked, None, None

  def begin(self, name):
    """Starts a type."""
    if self.process is None or self.left == 0 or not self.process.is_alive():
      self.end()
      self.pipe, theirs = _FORK.Pipe()
      self.process = _FORK.Process(target=self._run, args=(theirs,))
      self.process.start()
      self.left = self.asked.each
    self.left -= 1
    self.name, self.folder = name, tempfile.TemporaryDirectory()
    self.started = self._processor_seconds()
    self.began = time.monotonic()
    self.pipe.send((name, self.folder.name))

  def row(self):
    """The row of the type, once there is one."""
    spent = self._processor_seconds() - self.started
    waited = time.monotonic() - self.began
    most = self.asked.seconds
    if self.pipe.poll():
      try:
        row = json.loads(self.pipe.recv())
      except EOFError:
        self.process.join()
        row = self._lost(f"the process ended with {self.process.exitcode}")
    elif not self.process.is_alive():
      row = self._lost(f"the process ended with {self.process.exitcode}")
    elif spent > most or waited > 10 * most:
      row = self._lost(f"over {most} s of processor time", NOT_BUILT)
    else:
      return None
    self.folder.cleanup()
    self.name = None
    return row

  def end(self):
    """Ends the process."""
    if self.process is not None:
      self.process.kill()
      self.process.join()
      self.process = None

  def _lost(self, why, verdict=WRONG):
    stage = Path(self.folder.name) / "stage"
    at = stage.read_text() if stage.exists() else "starting"
    self.end()
    verdict = verdict if at == "extracting" else NOT_BUILT
    return {"type": self.name, "verdict": verdict, "why": f"{why}, {at}"}

  def _processor_seconds(self):
    try:
      stat = Path(f"/proc/{self.process.pid}/stat").read_text()
    except OSError:
      return 0.0  # no such file on other systems: only waiting is limited
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def _run(self, pipe):
    most = self.asked.gibibytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while True:
      name, folder = pipe.recv()
      try:
        row = walk(name, Path(folder))
      except Exception as error:
        why = f"the walk itself: {summary(error)}"
        row = {"type": name, "verdict": WRONG, "why": why}
      pipe.send(as_json(row))


if __name__ == "__main__":
  sys.exit(main())
