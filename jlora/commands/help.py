# SPDX-License-Identifier: Apache-2.0
"""Help as it is printed: all commands at a glance, one with its flags."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import flags

_WIDTH = 80
_MARGIN = 26  # where the words begin that say what a flag does


class Glance(NamedTuple):
  """A command in two lines.

  Attributes:
    line: what it makes.
    example: a command line with all that is required.
  """

  line: str
  example: str


#: Every command; its file has its name.
COMMANDS = {
  "adapter": Glance(
    "An adapter of any tool shown, converted, resized, or joined with others.",
    "jlora adapter convert IN --format=kohya --out=FILE",
  ),
  "extract": Glance(
    "A LoRA from two checkpoints, with the loss of every module.",
    "jlora extract --base=DIR --finetuned=DIR --out=DIR --rank=64",
  ),
  "merge": Glance(
    "A model from several, by a recipe in mergekit's form.",
    "jlora merge --config=recipe.yml --out=DIR",
  ),
  "plan": Glance(
    "What an extraction would take elsewhere, and what would bound it.",
    "jlora plan --model=config.json --chip=v5e --devices=16",
  ),
  "port": Glance(
    "An adapter for another base of the same shapes, such as an update.",
    "jlora port ADAPTER --from=DIR --to=DIR --out=DIR",
  ),
  "serve": Glance(
    "A base and many adapters behind an HTTP server, as OpenAI's clients ask.",
    "jlora serve --base=DIR --adapters=DIR",
  ),
  "show": Glance(
    "A checkpoint, adapter or report at a glance, from its headers.",
    "jlora show DIR",
  ),
  "verify": Glance(
    "Whether PEFT makes of an adapter what its report says.",
    "jlora verify ADAPTER --base=DIR --finetuned=DIR",
  ),
}


class Command(NamedTuple):
  """What a command's file tells of it.

  Attributes:
    name: a key of `COMMANDS`.
    main: takes the words that are no flags; prints its results.
    values: its flags, known to no other command.
    required: those of them that must be given.
    groups: title -> {flag: what stands for its value}, in the order of the
      help; "" for a switch, and for one of few words, which are listed.
    more: a paragraph for the help.
  """

  name: str
  main: Callable[[Sequence[str]], None]
  values: flags.FlagValues
  required: tuple[str, ...]
  groups: Mapping[str, Mapping[str, str]]
  more: str = ""


def overview() -> str:
  """Lists the commands, a line and an example each.

  Returns:
    Text.
  """
  width = max(map(len, COMMANDS))
  lines = ["jlora COMMAND [FLAGS]", ""]
  for name, (line, example) in COMMANDS.items():
    lines += [f"  {name:{width}}  {line}", f"  {'':{width}}  {example}", ""]
  return "\n".join([*lines, "`jlora COMMAND --help` has its flags."])


def help_of(command: Command, *, full: bool = False) -> str:
  """Formats a command's help: an example, what it does, its flags by purpose.

  Args:
    command: which.
    full: whether to list absl's own flags too.

  Returns:
    Text.
  """
  line, example = COMMANDS[command.name]
  parts = [example, "", line]
  if command.more:
    parts += ["", textwrap.fill(command.more, _WIDTH)]
  for title, group in command.groups.items():
    parts += ["", f"{title}:"]
    # The sort is stable: what is required comes first.
    for name in sorted(group, key=lambda name: name not in command.required):
      parts.extend(_flag_lines(command, name, group[name]))
  if full:
    parts += ["", "absl's own:", flags.FLAGS.get_help("  ").strip("\n")]
  else:
    parts += ["", "--helpfull lists absl's own flags too."]
  return "\n".join(parts)


def _flag_lines(command: Command, name: str, shown: str) -> Iterator[str]:
  """Yields a flag and what it does, beside it or below if its name is long."""
  flag = command.values[name]
  head = f"  --{name}={shown}" if shown else f"  --{name}"
  choices = getattr(flag.parser, "enum_values", None)
  text = str(flag.help).partition(">: ")[2] or str(flag.help)
  if choices:
    head = f"  --{name}={'|'.join(choices)}"
    if len(head) > _WIDTH:
      head = f"  --{name}=WORD"
      text = f"{', '.join(choices)}. {text}"
  if name in command.required:
    text = f"Required. {text}"
  elif flag.default not in (None, False, ""):
    default = flag.default
    if isinstance(default, float):
      default = f"{default:g}"
    text = f"{text} Default: {default}."
  margin = " " * _MARGIN
  lines = textwrap.wrap(text, _WIDTH - _MARGIN)
  if len(head) + 2 <= _MARGIN:
    yield head.ljust(_MARGIN) + lines.pop(0)
  else:
    yield head
  yield from (margin + line for line in lines)
