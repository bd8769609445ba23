# SPDX-License-Identifier: Apache-2.0
"""Worker processes of benches: limited to some cores, asked line by line."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
  """Limits processes started in the context to some cores, if possible."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(before)[:count])
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def answer(worker: Any) -> list[float]:
  """Reads a worker's next line."""
  line = worker.stdout.readline()
  if not line:
    raise RuntimeError(
      f"{' '.join(map(str, worker.args))} ended with {worker.wait()}; start it "
      "by hand to see why"
    )
  return json.loads(line)
