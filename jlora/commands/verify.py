# SPDX-License-Identifier: Apache-2.0
"""Whether PEFT makes of an adapter what its report says.

  jlora verify ADAPTER --base=DIR --finetuned=DIR

The base is built without weights, the adapter put on it by PEFT, and every
module compared with the report, and with the finetune if it is given. PEFT,
transformers and torch must be installed. The folder is not written to.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from jlora.commands import entry
from jlora.commands.help import COMMANDS, Command
from jlora.commands.openings import OPENING, define_opening, read_opening
from jlora.commands.verdicts import check, raise_if_wrong, verified
from jlora.extraction.report import Report, verified_line

_FLAGS = flags.FlagValues()  # apart from those of other commands

_BASE = flags.DEFINE_string(
  "base", None, "The base checkpoint.", required=True, flag_values=_FLAGS
)
_FINETUNED = flags.DEFINE_string(
  "finetuned",
  None,
  "The finetuned checkpoint. Without it keys, modules and sizes are checked.",
  flag_values=_FLAGS,
)
_OPENING = define_opening(_FLAGS)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", flag_values=_FLAGS)


def main(words: Sequence[str]) -> None:
  """Checks an adapter and prints what was found.

  Args:
    words: the adapter's folder.

  Raises:
    ValueError: not one folder, one that cannot be checked, or an adapter with
      which something is wrong.
  """
  if len(words) != 1:
    raise ValueError(f"one adapter must be given: {COMMANDS['verify'].example}")
  verdict = check(
    words[0], _BASE.value, _FINETUNED.value, read_opening(_OPENING)
  )
  if _JSON.value:
    print(json.dumps(verdict._asdict()))
  raise_if_wrong(verdict)
  if not _JSON.value:
    print(verified_line(Report({}, [], {}, [], verified(verdict))))


COMMAND = Command(
  "verify",
  main,
  _FLAGS,
  required=("base",),
  groups={
    "Input": {"base": "DIR", "finetuned": "DIR", **OPENING},
    "Output": {"json": ""},
  },
  more="The adapter is a PEFT folder; where it has no report.json, changes "
  "that it does not carry are wrong. Models of images are opened as its report "
  "says. PEFT and transformers must be installed. "
  "Where something is wrong the first three offenders are named, and the exit "
  "code is 1.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
