# SPDX-License-Identifier: Apache-2.0
"""How commands begin and end: the list, helps, flags, one line for mistakes."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from jlora.commands import __main__ as dispatcher
from jlora.commands import entry, extract, help, merge
from jlora.commands.help import COMMANDS, Command

ROOT = pathlib.Path(__file__).parents[3]
ALL = [
  importlib.import_module(f"jlora.commands.{name}").COMMAND for name in COMMANDS
]


def start(*words, module="jlora.commands"):
  """A command in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", module, *map(str, words)],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def main(monkeypatch, capsys, *words):
  """The dispatcher in this process: its exit code, and what it said."""
  monkeypatch.setattr(sys, "argv", ["jlora", *words])
  code = 0
  try:
    dispatcher.main()
  except SystemExit as ended:
    code = ended.code
  return code, capsys.readouterr()


@pytest.fixture
def probe():
  """A command with flags of its own, whose work a test chooses."""
  values = flags.FlagValues()
  flags.DEFINE_string("base", None, "It.", required=True, flag_values=values)
  flags.DEFINE_integer("rank", 4, "How many.", 1, flag_values=values)
  flags.DEFINE_bool("resume", False, "Whether.", flag_values=values)

  def make(work=print):
    groups = {"Input": {"rank": "N", "base": "PATH"}, "Run": {"resume": ""}}
    return Command("extract", work, values, ("base",), groups)

  return make


def test_alone_it_lists_all_commands_and_loads_nothing_for_that():
  code = (
    "import sys; from jlora.commands import __main__ as m; m.main(); "
    "print(*{'jax', 'numpy'} & sys.modules.keys())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr
  *lines, loaded = done.stdout.splitlines()
  assert loaded == ""
  for name, (line, example) in COMMANDS.items():
    at = lines.index(f"  {name:7}  {line}")
    assert lines[at + 1].strip() == example
    assert example.startswith(f"jlora {name} ")


def test_every_file_that_is_a_command_is_listed():
  files = (ROOT / "jlora" / "commands").glob("*.py")
  found = {f.stem for f in files if "COMMAND = Command(" in f.read_text()}
  assert found == set(COMMANDS)


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_every_flag_is_in_one_group_and_every_example_is_read(command):
  grouped = [name for group in command.groups.values() for name in group]
  assert sorted(grouped) == sorted(command.values)
  words = COMMANDS[command.name].example.split()[2:]
  given = {word.partition("=")[0] for word in words if word[0] == "-"}
  assert given <= {f"--{name}" for name in grouped}
  assert {f"--{name}" for name in command.required} <= given
  assert max(map(len, help.help_of(command).splitlines())) <= 80


def test_the_door_defines_no_flags():
  code = (
    "import jlora.commands as door; from absl import flags; "
    "door.cache_folder, door.keep_compilations, door.start; "
    "import jlora.commands.extract, jlora.commands.merge; "
    "assert not {'base', 'out', 'config'} & set(flags.FLAGS)"
  )
  subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def test_a_help_begins_with_an_example_and_groups_by_purpose(
  monkeypatch, capsys
):
  code, said = main(monkeypatch, capsys, "extract", "--help")
  lines = said.out.splitlines()
  assert code == 0
  assert lines[0] == COMMANDS["extract"].example
  titles = [line for line in lines if line.endswith(":") and line[0] != " "]
  assert titles == ["Input:", "Rank:", "Output:", "Run:"]
  first = [lines[lines.index(title) + 1] for title in ("Input:", "Output:")]
  assert [line.split()[:2] for line in first] == [
    ["--base=PATH", "Required."],
    ["--out=DIR", "Required."],
  ]
  assert "--flagfile" not in said.out
  assert "--helpfull" in lines[-1]


def test_a_full_help_has_the_flags_of_absl(monkeypatch, capsys):
  code, said = main(monkeypatch, capsys, "help", "merge")
  assert (code, "--flagfile" in said.out) == (0, False)
  code, said = main(monkeypatch, capsys, "merge", "--helpfull")
  assert (code, "--flagfile" in said.out) == (0, True)


def test_what_is_required_comes_first_in_its_group(probe):
  lines = help.help_of(probe()).splitlines()
  at = lines.index("Input:")
  assert lines[at + 1].startswith("  --base=PATH ")
  assert " ".join(lines[at + 2].split()) == "--rank=N How many. Default: 4."


@pytest.mark.parametrize(
  ("words", "says"),
  [
    (["extrakt"], "no command extrakt; did you mean extract? `jlora` lists"),
    (["zzz"], "there is no command zzz. `jlora` lists all."),
    (["extract", "--rnk=3"], "no flag --rnk; did you mean --rank? `jlora extr"),
    (["merge", "--base=x"], "there is no flag --base"),
    (["extract", "--base=x"], "--finetuned and --out must be given: jlora ext"),
    (["extract", "--rank=x"], "flag --rank=x: invalid literal"),
    (["extract", "--rank"], "Missing value for flag --rank"),
    (["show"], "a path must be given: jlora show DIR"),
  ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, words, says):
  code, said = main(monkeypatch, capsys, *words)
  assert code == 1
  (line,) = said.err.splitlines()
  assert line.startswith("error: ")
  assert says in line
  assert said.out == ""


def test_flags_that_belong_to_absl_are_taken(probe, capsys):
  assert entry.run(probe(), ["--base=x", "--undefok=more", "--more=1"]) == 0


def test_flags_of_one_run_are_gone_in_the_next(probe, capsys):
  command = probe(lambda words: print(words, command.values.rank))
  entry.run(command, ["--base=x", "--rank=7", "word"])
  entry.run(command, ["word", "--base=x"])
  assert capsys.readouterr().out == "['word'] 7\n['word'] 4\n"
  assert entry.run(command, ["--rank=7"]) == 1


@pytest.mark.parametrize(
  ("error", "says"),
  [
    (ValueError("x is not empty. Use resume=True or another out."),
     "x is not empty. Use --resume or another --out."),
    (PermissionError(13, "Permission denied", "/x/y"),
     "/x/y: Permission denied"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (OSError("a text alone"), "a text alone"),
  ],
)  # fmt: skip
def test_what_is_raised_is_told(probe, capsys, error, says):
  def work(words):
    raise error

  assert entry.run(probe(work), ["--base=x"]) == 1
  assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.parametrize(
  "words", [["show", "merge.json"], ["show", "--help"], [], ["help"]]
)
def test_a_reader_that_has_enough_is_told_nothing(tmp_path, words):
  """As in `jlora show DIR | head`."""
  settings = {"base": None, "method": "linear", "slices": []}
  report = {"settings": settings, "tensors": 1, "nbytes": 4, "notes": []}
  (tmp_path / "merge.json").write_text(json.dumps(report))
  code = (
    "import os; from jlora.commands.__main__ import main; "
    "read, write = os.pipe(); os.close(read); os.dup2(write, 1); main()"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *words],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stderr) == (1, "")


def test_what_nobody_expects_keeps_its_traceback(probe):
  def work(words):
    raise RuntimeError("a mistake of ours")

  with pytest.raises(RuntimeError):
    entry.run(probe(work), ["--base=x"])


@pytest.mark.parametrize(
  "module", ["jlora.commands.extract", "experiments.extract"]
)
def test_a_command_has_a_module_and_a_door(module):
  done = start("--help", module=module)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(COMMANDS["extract"].example)
  assert done.stderr == ""


def test_flags_of_two_commands_do_not_meet():
  shared = set(extract.COMMAND.values) & set(merge.COMMAND.values)
  assert {"out", "resume", "vocabulary"} <= shared
