# SPDX-License-Identifier: Apache-2.0
"""Shows how far a run is, in bytes: a bar on a terminal, lines elsewhere."""

import math
import sys
import time
from typing import IO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10


class Progress:
  """A bar over the bytes of a run, with the last module and the error so far.

  Args:
    total: bytes of the run.
    file: where it is shown; None is standard error.
    errors: whether the run has errors to show.
    who: index of this one among several processes; None: there is only one.
      Only a first or only process draws a bar.

  Example:
    >>> import io
    >>> log = io.StringIO()
    >>> with Progress(100, log) as progress:
    ...   progress.update(100, "mlp.up_proj", 64, error=3.0, norm=5.0)
    >>> log.getvalue().strip()
    '100% mlp.up_proj rank 64, relative error so far 0.6000, 0 s left'
  """

  def __init__(
    self,
    total: int,
    file: IO[str] | None = None,
    *,
    errors: bool = True,
    who: int | None = None,
  ):
    self._file = sys.stderr if file is None else file
    self._errors = errors
    self._who = "" if who is None else f"process {who}: "
    self._total, self._done = total, 0
    self._error2 = self._norm2 = 0.0
    self._began = self._said = time.monotonic()
    self._bar = None
    if not who and self._file.isatty():
      self._bar = tqdm(
        total=total, unit="B", unit_scale=True, file=self._file, leave=False
      )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()

  def update(
    self,
    nbytes: int,
    path: str,
    rank: int | None = None,
    *,
    error: float = 0.0,
    norm: float = 0.0,
  ) -> None:
    """Counts a finished module, and shows it.

    Args:
      nbytes: bytes of both of its tensors.
      path: the module.
      rank: its rank; None if it was not factored.
      error: Frobenius norm of what its adapter misses.
      norm: Frobenius norm of its delta.
    """
    self._done += nbytes
    self._error2 += error**2
    self._norm2 += norm**2
    relative = math.sqrt(self._error2 / self._norm2) if self._norm2 else 0.0
    module = f"{path} rank {rank}" if rank else path
    if self._bar is not None:
      told = f", error {relative:.4f}" if self._errors else ""
      self._bar.set_postfix_str(f"{module}{told}", refresh=False)
      self._bar.update(nbytes)
      return
    now, last = time.monotonic(), self._done >= self._total
    if not last and now - self._said < _SECONDS_BETWEEN_LINES:
      return
    self._said = now
    share = self._done / self._total if self._total else 1.0
    left = (now - self._began) * (1 / share - 1) if share else math.inf
    told = f", relative error so far {relative:.4f}" if self._errors else ""
    print(
      f"{self._who}{share:.0%} {module}{told}, {left:.0f} s left",
      file=self._file,
      flush=True,
    )
