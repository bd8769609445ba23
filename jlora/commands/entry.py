# SPDX-License-Identifier: Apache-2.0
"""How every command begins and ends: flags read, mistakes told in one line."""

import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from absl import flags

from jlora.commands.help import COMMANDS, Command, help_of

# What the library calls its arguments, as flags.
_AS_FLAGS = (
  ("resume=True", "--resume"),
  ("overwrite=True", "--overwrite"),
  ("another out.", "another --out."),
)
_HELP = ("--help", "-help", "--helpshort", "-h", "-?")
_FULL = ("--helpfull", "-helpfull")


def start(name: str, words: Sequence[str] | None = None) -> NoReturn:
  """Runs a command and ends the process with its exit code.

  Args:
    name: of a command.
    words: of its command line, without its name; None: this process's own.

  Raises:
    SystemExit: with 0, or 1 after an error in one line.

  Example:
    >>> start("show", ["--help"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
  """
  command = importlib.import_module(f"jlora.commands.{name}").COMMAND
  sys.exit(run(command, sys.argv[1:] if words is None else words))


def run(command: Command, words: Sequence[str]) -> int:
  """Runs a command; what is wrong with its input is one line.

  Args:
    command: of a command's file.
    words: of the command line, without its name.

  Returns:
    The exit code.
  """
  # That a machine has no TPU is no news.
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    if asked := [word for word in words if word in (*_HELP, *_FULL)]:
      print(help_of(command, full=asked[0] in _FULL))
    else:
      command.main(_parse(command, words))
    sys.stdout.flush()
  except BrokenPipeError:
    return leave_pipe()
  except OSError as error:
    return _fail(_told(error))
  except ValueError as error:
    text = str(error)
    for ours, flag in _AS_FLAGS:
      text = text.replace(ours, flag)
    return _fail(text)
  return 0


def leave_pipe() -> int:
  """Stops printing where `jlora show DIR | head` has read enough.

  Returns:
    The exit code.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 1


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns the known word that was probably meant, as a sentence's end.

  Args:
    word: not known.
    known: all that are.

  Returns:
    Text, "" if none is near.
  """
  found = difflib.get_close_matches(word, list(known), 1)
  return f"; did you mean {found[0]}?" if found else "."


def _parse(command: Command, words: Sequence[str]) -> list[str]:
  """Sets the command's flags; returns the words that are none."""
  values = command.values
  values.set_gnu_getopt(True)
  values.unparse_flags()
  for name in values:
    values[name].unparse()  # of another run in this process
  try:
    rest = values([command.name, *words], known_only=True)
    return flags.FLAGS(rest)[1:]
  except flags.Error as error:
    raise ValueError(_explain(command, words, error)) from error


def _explain(command: Command, words: Sequence[str], error: flags.Error) -> str:
  """Says what is wrong with flags: one not known, one lacking, or else."""
  values = command.values
  known = [f"--{name}" for name in (*values, *flags.FLAGS)]
  named = [w.partition("=")[0] for w in words if re.match("--[a-zA-Z]", w)]
  odd = [n for n in named if n not in known and "--" + n[4:] not in known]
  if odd:
    near = nearest(odd[0], [f"--{name}" for name in values])
    lists = f"`jlora {command.name} --help` lists all."
    return f"there is no flag {odd[0]}{near} {lists}"
  lacking = [f"--{n}" for n in command.required if values[n].value is None]
  if lacking and values.is_parsed():  # all of the line was read
    *first, last = lacking
    both = f"{', '.join(first)} and {last}" if first else last
    return f"{both} must be given: {COMMANDS[command.name].example}"
  return str(error)


def _told(error: OSError) -> str:
  """Returns an error of the system in one line, with the file's name."""
  reason = error.strerror or str(error)
  if error.filename is None:
    return reason
  return f"{error.filename}: {reason}"


def _fail(text: str) -> int:
  print(f"error: {text}", file=sys.stderr)
  return 1
