# SPDX-License-Identifier: Apache-2.0
"""Commands of the pages exist and know their flags; tables agree with the tree.

Flags are read from the sources: nothing is started.
"""

import ast
import functools
import importlib
import re

import pytest

from jlora.commands.help import COMMANDS
from tests.test_imports import PAGES, ROOT, ROW_OF, imports, name_of

# After "\\" or "&&" another command begins; "#" is what is said about it.
_ENDS = re.compile(r"&&|;|\||#")
_COMMAND = re.compile(
  r"python -m (?P<module>[\w.]+)"
  r"|(?<![\w./-])(?:\.venv/bin/)?jlora (?P<command>\w+)"
  r"|^make (?P<target>[\w-]+)"
)
_FLAG = re.compile(r"(?<![\w-])--(?:no)?(\w+)")
# Of absl and of argparse.
_OWN = {"help", "helpfull", "helpshort", "flagfile"}


def snippets(page):
  """What a page shows in code, each command in a line."""
  text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
  # In pairs: what ends one block does not begin the next.
  both = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
  fenced = [block for language, block in both if language in ("", "sh")]
  prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
  lines = [line for block in fenced for line in block.splitlines()]
  lines += re.findall(r"^ {4}(\S.*)", prose, re.M)
  spans = [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose)]
  for whole in lines + spans:
    yield from (part.strip(" \"'") for part in _ENDS.split(whole))


def asked(page):
  """(module or command of jlora, its flags) of every command of a page."""
  for text in snippets(page):
    for found in _COMMAND.finditer(text):
      flags = _FLAG.findall(text[found.end() :])
      if target := found["target"]:
        yield from ((m, flags) for m in modules_of(target))
      elif found["command"]:
        yield f"jlora {found['command']}", flags
      else:
        yield found["module"], flags


@functools.cache
def makefile():
  return (ROOT / "Makefile").read_text(encoding="utf-8")


def modules_of(target):
  """The modules of ours that a target of the Makefile starts."""
  rule = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile(), re.M)
  assert rule, f"the Makefile has no {target}"
  found = re.findall(r"-m ([\w.]+)", rule[1])
  return [name for name in found if name.split(".")[0] in OURS]


OURS = ("experiments", "pallas_kernels", "jlora")


def file_of(module):
  """The file that `python -m` runs, or that an import reads."""
  path = ROOT.joinpath(*module.split("."))
  for file in (path.with_suffix(".py"), path / "__main__.py"):
    if file.exists():
      return file
  return None


@functools.cache
def flags_of(module):
  """Flags that a module defines, and the experiments' files it imports."""
  if module.startswith("jlora "):
    name = module.split()[1]
    assert name in COMMANDS, f"there is no `{module}`"
    command = importlib.import_module(f"jlora.commands.{name}").COMMAND
    return _OWN | set(command.values)
  file = file_of(module)
  assert file is not None, f"there is no module {module}"
  tree = ast.parse(file.read_text(encoding="utf-8"))
  found = set(_OWN)
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and node.args:
      called = getattr(node.func, "attr", getattr(node.func, "id", ""))
      first = getattr(node.args[0], "value", None)
      if called.startswith("DEFINE_"):
        found.add(first)
      elif called in ("add", "add_argument") and isinstance(first, str):
        found.add(first.removeprefix("--"))
      elif called == "start" and first in COMMANDS:
        found |= flags_of(f"jlora {first}")
  for _, dotted in imports(tree):
    if dotted.startswith("experiments.") and (file_of(dotted) or "") != file:
      found |= flags_of(dotted) if file_of(dotted) else set()
  return found


@pytest.mark.parametrize(
  "page", [*PAGES, ROOT / "pallas_kernels" / "README.md"], ids=name_of
)
def test_commands_exist_and_know_their_flags(page):
  wrong = []
  for module, flags in asked(page):
    if module.split()[0].split(".")[0] not in OURS or module.endswith("NAME"):
      continue
    wrong += [
      f"{module} --{flag}"
      for flag in flags
      if not {flag, f"no{flag}"} & flags_of(module)
    ]
    flags_of(module)
  assert not wrong


def test_every_page_has_commands():
  """So that the test above sees what it is to judge."""
  seen = {name_of(page): len({m for m, _ in asked(page)}) for page in PAGES}
  assert seen["README.md"] >= 3
  assert seen["docs/start.md"] >= 2
  assert seen["BUILD.md"] >= 5
  assert seen["experiments/README.md"] >= 20


@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]], ids=name_of)
def test_flags_named_alone_belong_to_some_command(page):
  commands = {f"jlora {name}" for name in COMMANDS}
  commands |= {
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "experiments").rglob("[a-z]*.py")
  }
  known = set().union(*map(flags_of, commands))
  known.add("xla_cpu_multi_thread_eigen")  # of XLA_FLAGS
  named = [flag for text in snippets(page) for flag in _FLAG.findall(text)]
  assert not {flag for flag in named if flag not in known}


def test_the_table_of_experiments_has_all_of_them():
  page = PAGES[-1].read_text(encoding="utf-8")
  named = set(re.findall(r"^\| `([\w. ]+)` \|", page, re.M))
  here = ROOT / "experiments"
  files = {f.stem for f in here.glob("[a-z]*.py")} - set(COMMANDS)
  files |= {
    f"bench.{file.stem}"
    for file in here.glob("bench/[a-z]*.py")
    if "__main__" in file.read_text(encoding="utf-8")
  }
  assert files - named == set()
  wrong = named - files - {f"jlora {name}" for name in COMMANDS}
  assert not wrong


def test_the_table_of_packages_is_that_of_the_imports():
  page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| (\d+) \| `([\w/]+)` \|", page, re.M)
  found = {name: int(row) for row, name in rows}
  assert found == {n: row for n, row in ROW_OF.items() if n != "jlora"}


def moved():
  """(new home, names) of the CHANGELOG's table."""
  page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  table = page.partition("| now in | names |")[2].partition("\n\n")[0]
  for home, names in re.findall(
    r"^\| `(jlora[\w.]*)` \| (.*) \|$", table, re.M
  ):
    yield home, re.findall(r"`(\w+)`", names)


def test_every_name_that_moved_is_where_the_changelog_says():
  gone = [
    f"{home}.{name}"
    for home, names in moved()
    for name in names
    if not hasattr(importlib.import_module(home), name)
  ]
  assert not gone
  assert sum(len(names) for _, names in moved()) == 123
