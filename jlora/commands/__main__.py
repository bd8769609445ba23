# SPDX-License-Identifier: Apache-2.0
"""`jlora COMMAND`: finds the command and hands over; alone it lists them."""

import sys
from importlib import metadata

from jlora.commands.entry import leave_pipe, nearest, start
from jlora.commands.help import COMMANDS, overview

_HELP = ("help", "--help", "-h", "--helpfull", "--helpshort")


def main() -> None:
  """Runs the command that the first word names."""
  name, *words = sys.argv[1:] or ["help"]
  if name == "--version":
    print(metadata.version("jlora"))
  elif name in COMMANDS:
    start(name, words)
  elif name in _HELP and words and words[0] in COMMANDS:
    start(words[0], ["--help"])
  elif name in _HELP:
    try:
      print(overview(), flush=True)
    except BrokenPipeError:
      sys.exit(leave_pipe())
  else:
    near = nearest(name, COMMANDS)
    print(
      f"error: there is no command {name}{near} `jlora` lists all.",
      file=sys.stderr,
    )
    sys.exit(1)


if __name__ == "__main__":
  main()
