# SPDX-License-Identifier: Apache-2.0
"""Several processes of one `jax.distributed` run: agreed at its start.

Whoever calls this has initialised `jax.distributed`, or there is one process,
for which nothing here asks JAX for anything.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora.messages import name_some
from jlora.runs.fingerprints import describe_versions
from jlora.runs.watchdog_process import HINT

T = TypeVar("T")
_BLOCK = 2**12  # bytes: texts of about one length share a compilation


class LostProcess(RuntimeError):
  """Another process of the run ended or was killed; the run can be resumed.

  JAX's runtime cannot go on without it. A program that gets this error should
  end by `os._exit`: at an ordinary exit JAX waits for the lost process, and
  then aborts.

  Example:
    >>> raise LostProcess("process 2 ended or was killed")
    Traceback (most recent call last):
    ...
    jlora.runs.processes.LostProcess: process 2 ended or was killed
  """


def process_count() -> int:
  """Returns how many take part; 1 unless `jax.distributed` is initialised.

  Returns:
    The number. No backend is started to tell that it is 1.

  Example:
    >>> process_count()
    1
  """
  return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
  """Returns which process this is; 0 without `jax.distributed`.

  Returns:
    0..count - 1.

  Example:
    >>> process_index()
    0
  """
  return jax.process_index() if jax.distributed.is_initialized() else 0


def gather(value: Any) -> list[Any]:
  """Returns what each process has; all must call it.

  Args:
    value: for JSON.

  Returns:
    The values, by process.

  Raises:
    LostProcess: another one ended meanwhile.

  Example:
    >>> gather({"rank": 8})
    [{'rank': 8}]
  """
  if process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  try:
    sizes = multihost_utils.process_allgather(np.uint32(len(text)))
    room = -(-int(sizes.max()) // _BLOCK) * _BLOCK
    padded = np.frombuffer(text.ljust(room), np.uint8)
    texts = multihost_utils.process_allgather(padded)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    raise LostProcess(
      f"Another process ended or was killed while all compared what they have "
      f"({error}). See what it said. {HINT}."
    ) from error
  return [json.loads(row.tobytes()) for row in np.asarray(texts)]


def everywhere(work: Callable[[], T]) -> T:
  """Calls a function on every process, which all must; returns its result.

  Args:
    work: without arguments; it takes no part in anything that all must call.

  Returns:
    This process's result. With one process simply `work()`.

  Raises:
    ValueError: on all, whatever it raised on any, naming where; a process that
      fails keeps nobody waiting.

  Example:
    >>> everywhere(lambda: 3)
    3
  """
  if process_count() == 1:
    return work()
  result: Any = None
  failure: Exception | None = None
  try:
    result = work()
  except Exception as error:  # told to all, and raised again
    failure = error
  errors = gather(None if failure is None else _text_of(failure))
  if any(errors):
    raise ValueError(tell_errors(errors)) from failure
  return result


def from_first(work: Callable[[], Any]) -> Any:
  """Calls a function on the first process; returns its result on all.

  All must call this.

  Args:
    work: without arguments, its result for JSON; called on process 0 alone.

  Returns:
    The result.

  Raises:
    ValueError: on all, if it raised anything.

  Example:
    >>> from_first(lambda: [1, 2])
    [1, 2]
  """
  is_first = process_index() == 0
  return gather(everywhere(work if is_first else lambda: None))[0]


def check_same_facts(facts: Mapping[str, Any]) -> None:
  """Raises unless all processes have the same facts; all must call it.

  Args:
    facts: versions, options, inputs: {name: value}, for JSON.

  Raises:
    ValueError: on all, naming up to three facts with the values and whose.

  Example:
    >>> check_same_facts({"rank": 64})
  """
  if differing := tell_differences(gather(facts)):
    raise ValueError(
      f"The processes differ: {name_some(differing)}. Start all with the same "
      "command, packages and files; copies of files keep their times with "
      "cp -p or rsync -t."
    )


def tell_differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
  """Lists the facts that are not the same on all processes.

  Args:
    facts: of every process.

  Returns:
    A line for each.

  Example:
    >>> tell_differences([{"rank": 64}, {"rank": 32}, {"rank": 64}])
    ['rank is 64 on processes 0 and 2, 32 on process 1']
  """
  lines = []
  for name in sorted({name for each in facts for name in each}):
    owners: dict[Any, list[int]] = {}
    for index, each in enumerate(facts):
      owners.setdefault(json.dumps(each.get(name)), []).append(index)
    if len(owners) > 1:
      said = [
        f"{json.loads(value)} on {name_processes(which)}"
        for value, which in owners.items()
      ]
      lines.append(f"{name} is {', '.join(said)}")
  return lines


def tell_errors(errors: Sequence[str | None]) -> str:
  """Joins each process's message to one for all.

  Args:
    errors: of every process, None where all went well.

  Returns:
    The message alone, where all have the same.

  Example:
    >>> tell_errors([None, "/ft does not exist"])
    'process 1: /ft does not exist. It went well on process 0: all must see \
the same files.'
  """
  owners: dict[str, list[int]] = {}
  for index, error in enumerate(errors):
    owners.setdefault(error or "", []).append(index)
  fine = owners.pop("", [])
  if len(owners) == 1 and not fine:
    return next(iter(owners))
  said = "; ".join(
    f"{name_processes(which)}: {error.removesuffix('.')}"
    for error, which in owners.items()
  )
  if not fine:
    return f"{said}."
  return (
    f"{said}. It went well on {name_processes(fine)}: all must see the same "
    "files."
  )


def name_processes(which: Sequence[int]) -> str:
  """Names processes by number.

  Args:
    which: at least one.

  Returns:
    Text; the first three, and how many more.

  Example:
    >>> name_processes([0]), name_processes([0, 2]), name_processes(range(9))
    ('process 0', 'processes 0 and 2', 'processes 0, 1, 2 and 6 more')
  """
  if len(which) == 1:
    return f"process {which[0]}"
  told = [str(index) for index in which[:3]]
  rest = len(which) - len(told)
  last = f"{rest} more" if rest else told.pop()
  return f"processes {', '.join(told)} and {last}"


def is_of_collective(error: Exception) -> bool:
  """Returns whether JAX failed where processes work together.

  On CPU that is a ValueError if a call fails before it is dispatched.

  Args:
    error: what was raised.

  Example:
    >>> is_of_collective(ValueError("UNKNOWN: Gloo AllGather failed: ..."))
    True
    >>> is_of_collective(ValueError("NaN in w"))
    False
  """
  is_of_gloo = isinstance(error, ValueError) and "Gloo" in str(error)
  return is_of_gloo or isinstance(error, jax.errors.JaxRuntimeError)


def _text_of(error: Exception) -> str:
  """Returns an error's text, with its kind unless it is for the user."""
  if isinstance(error, ValueError):
    return str(error)
  return f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
  """Returns what must be installed alike everywhere, for `check_same_facts`.

  Returns:
    Versions by package, with a hash of jlora's own files, and of Python.

  Example:
    >>> sorted(versions())
    ['jax', 'jaxlib', 'jlora', 'jlora files', 'numpy', 'python']
  """
  python = ".".join(map(str, sys.version_info[:3]))
  return {**describe_versions(), "python": python}
