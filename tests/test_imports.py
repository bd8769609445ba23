# SPDX-License-Identifier: Apache-2.0
"""Packages import from lower ones alone, and outsiders by the packages' doors.

Reads the sources, so a file that is never imported is checked as well.
"""

import ast
import functools
import graphlib
import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Each imports only from rows above its own; inside a package, without a circle.
ROWS = (
  "messages numerics",
  "loras paths views",
  "selection declared_views",
  "tree_views",
  "sharding ranks checkpoints editing",
  "pairing runs factoring alignment",
  "adapting formats merging/arrays models",
  "extraction training evaluation",
  "routing merging/adapters",
  "merging",
  "merging/checkpoints",
  "jlora",  # its own door
  "commands",
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}

# Neither a dependency nor a promise of jax: not in a library.
FORBIDDEN = ("torch", "transformers", "peft", "tensorflow", "jax._src")
# The one file that may: what `jlora verify` loads, and nothing else imports.
GUESTS = {
  ROOT / "jlora" / "commands" / "peft_models.py": (
    "torch", "transformers", "peft",
  ),
}  # fmt: skip

LIBRARY = sorted((ROOT / "jlora").rglob("*.py"))
KERNELS = sorted((ROOT / "pallas_kernels").rglob("*.py"))
FILES = [file for file in LIBRARY if file.name != "__init__.py"]
DOORS = [file for file in LIBRARY if file.name == "__init__.py"]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
PAGES = [
  *(ROOT / name for name in ("README.md", "BUILD.md", "CONTRIBUTING.md")),
  *sorted((ROOT / "docs").glob("*.md")),
  *sorted((ROOT / "docs" / "guides").glob("*.md")),
  ROOT / "experiments" / "README.md",
]


def name_of(file):
  return file.relative_to(ROOT).as_posix()


def each(files):
  return pytest.mark.parametrize("file", files, ids=name_of)


@functools.cache
def tree_of(file):
  return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
  """(line, dotted name) of all that a file imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      yield from ((node.lineno, f"{module}.{a.name}") for a in node.names)


def file_of(dotted):
  """The file of jlora that a dotted name lies in; None if it is elsewhere."""
  parts = dotted.split(".")
  for end in range(len(parts), 0, -1):
    path = ROOT.joinpath(*parts[:end])
    if path.with_suffix(".py").exists():
      return path.with_suffix(".py")
    if (path / "__init__.py").exists():
      return path / "__init__.py"
  return None


def library_imports(file):
  """(line, file) of everything of jlora that a file imports."""
  for line, dotted in imports(tree_of(file)):
    if dotted.split(".")[0] == "jlora":
      yield line, file_of(dotted)


def package_of(file):
  """The row's word a file belongs to: `merging/arrays`, `loras`, `pairing`."""
  if file == ROOT / "jlora" / "__init__.py":
    return "jlora"
  parts = file.relative_to(ROOT / "jlora").with_suffix("").parts
  return next(
    (
      name
      for end in (2, 1)
      if (name := "/".join(parts[:end])) in ROW_OF and end <= len(parts)
    ),
    parts[0],
  )


def misplaced(here, there):
  """Why a package may not import another, or None."""
  for name in (here, there):
    if name not in ROW_OF:
      return (
        f"jlora/{name} is in no row: add it to ROWS in tests/test_imports.py"
      )
  if here == there or ROW_OF[there] < ROW_OF[here]:
    return None
  return (
    f"jlora/{here} (row {ROW_OF[here]}) imports jlora/{there} "
    f"(row {ROW_OF[there]}): only from rows above"
  )


@each(FILES)
def test_imports_come_from_rows_above(file):
  here = package_of(file)
  wrong = [
    f"line {line}: {why}"
    for line, other in library_imports(file)
    if (why := misplaced(here, package_of(other)))
  ]
  assert here in ROW_OF
  assert not wrong, "\n".join(wrong)


@each(FILES)
def test_files_import_files_and_no_doors(file):
  """A door imports all of its package: what comes from there may come round."""
  wrong = [
    f"line {line}: {name_of(other)}"
    for line, other in library_imports(file)
    if other.name == "__init__.py" and file.parent.name != "commands"
  ]
  assert not wrong, f"import from the file itself: {wrong}"


def test_imports_make_no_circle():
  graph = {
    file: {other for _, other in library_imports(file)} for file in FILES
  }
  graphlib.TopologicalSorter(graph).prepare()


@each([file for file in DOORS if file.parent.name not in ("jlora", "commands")])
def test_doors_hold_names_alone(file):
  """Docstring, imports as they are called, and the sorted list of them."""
  body = tree_of(file).body[1:]
  kinds = [type(node) for node in body]
  assert kinds == [ast.ImportFrom] * (len(body) - 1) + [ast.Assign] * bool(body)
  module = importlib.import_module(
    ".".join(file.parent.relative_to(ROOT).parts)
  )
  names = getattr(module, "__all__", [])
  classes = sorted(name for name in names if name[0].isupper())
  assert names == [*classes, *sorted(set(names) - set(classes))]
  given = {dotted.rpartition(".")[2] for _, dotted in imports(tree_of(file))}
  assert given == set(names)


@each(EXPERIMENTS)
def test_experiments_come_in_by_the_doors(file):
  wrong = [
    f"line {line}: {dotted}"
    for line, dotted in imports(tree_of(file))
    if dotted.split(".")[0] in ("jlora", "pallas_kernels")
    and not is_public(dotted)
  ]
  assert not wrong, "\n".join(wrong)


def is_public(dotted):
  """Whether a name is a package of jlora or what its door gives."""
  head, _, last = dotted.rpartition(".")
  if head in ("", "pallas_kernels"):
    return True
  if head == "jlora":
    return last in importlib.import_module("jlora").__dir__()
  return dotted.count(".") == 2 and last in public_names(head)


@functools.cache
def public_names(module):
  """What a door gives, or what a file directly in jlora/ defines."""
  found = importlib.import_module(module)
  if hasattr(found, "__all__"):
    return set(found.__all__)
  body = tree_of(pathlib.Path(found.__file__)).body
  targets = [
    target
    for node in body
    for target in getattr(node, "targets", [getattr(node, "target", None)])
  ]
  names = {target.id for target in targets if isinstance(target, ast.Name)}
  names |= {node.name for node in body if hasattr(node, "name")}
  return {name for name in names if not name.startswith("_")}


QUESTIONS = sorted((ROOT / "experiments").glob("[a-z]*.py"))


@each(QUESTIONS)
def test_a_question_has_a_main_and_imports_lib_alone(file):
  """What several questions share is in lib/, what is timed in bench/."""
  tree = tree_of(file)
  names = {node.name for node in tree.body if hasattr(node, "name")}
  runs = {dotted.rpartition(".")[2] for _, dotted in imports(tree)}
  assert {"main", "start"} & (names | runs)
  others = [
    dotted
    for _, dotted in imports(tree)
    if dotted.startswith("experiments")
    and not dotted.startswith("experiments.lib")
  ]
  assert not others


@each(sorted((ROOT / "experiments" / "lib").rglob("*.py")))
def test_lib_knows_no_question(file):
  others = [
    dotted
    for _, dotted in imports(tree_of(file))
    if dotted.startswith("experiments")
    and not dotted.startswith("experiments.lib.")
  ]
  assert not others


@each(PAGES)
def test_pages_name_what_there_is(file):
  """Every `jlora.x.y` of a page is public, every path of a file exists."""
  text, _, recipes = file.read_text(encoding="utf-8").partition("\n# Recipes\n")
  # What recipes show does not exist yet; tests/test_recipes.py makes it.
  text += re.sub(r"^```.*?^```$", "", recipes, flags=re.M | re.S)
  dotted = set(re.findall(r"\bjlora(?:\.[A-Za-z_]\w*)+", text))
  # Commands are started by their files' names.
  started = set(re.findall(r"-m (jlora[\w.]+)", text))
  assert not [name for name in dotted - started if not is_named(name)]
  for name in started:
    assert importlib.util.find_spec(name), name
  paths = set(
    re.findall(r"\b(?:jlora|tests|experiments|pallas_kernels)/[\w/]+\.py", text)
  )
  assert not [path for path in paths if not (ROOT / path).exists()]


def is_named(dotted):
  """Whether a dotted name of a page can be used as it is written."""
  try:
    value = importlib.import_module("jlora")
    for part in dotted.split(".")[1:]:
      value = getattr(value, part)
  except AttributeError:
    return False
  return True


@each(KERNELS)
def test_kernels_know_nothing_of_jlora(file):
  found = [dotted for _, dotted in imports(tree_of(file))]
  assert not [dotted for dotted in found if dotted.split(".")[0] == "jlora"]


def test_kernels_are_asked_by_adapting_and_a_plan_alone():
  """`jlora plan` asks `pallas_kernels.aot` what chips can do at most."""
  askers = {
    package_of(file)
    for file in FILES
    if any(d.startswith("pallas_kernels") for _, d in imports(tree_of(file)))
  }
  assert askers <= {"adapting", "commands"}


@each(LIBRARY + KERNELS)
def test_nothing_forbidden_is_imported(file):
  tree = tree_of(file)
  found = [dotted for _, dotted in imports(tree)]
  found += [
    ast.unparse(node)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
  ]
  wrong = [
    dotted
    for dotted in found
    if any(
      dotted == f or dotted.startswith(f"{f}.")
      for f in set(FORBIDDEN) - {*GUESTS.get(file, ())}
    )
  ]
  assert not wrong


@each(GUESTS)
def test_what_imports_a_guest_is_imported_by_nothing(file):
  """It is loaded by its name when a user asks for a check."""
  askers = [
    name_of(other)
    for other in LIBRARY
    for _, there in library_imports(other)
    if there == file
  ]
  assert not askers
  dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
  named = [name_of(f) for f in LIBRARY if dotted in f.read_text("utf-8")]
  assert named == ["jlora/commands/verdicts.py"]


def test_commands_load_no_guest_until_they_are_asked():
  guests = {name for names in GUESTS.values() for name in names}
  code = (
    "import sys, jlora.commands.extract, jlora.commands.verify; "
    f"print(*{guests!r} & sys.modules.keys())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert done.stdout.strip() == ""


@each(LIBRARY + KERNELS)
def test_imports_are_absolute_and_at_the_top(file):
  tree = tree_of(file)
  functions = (ast.FunctionDef, ast.AsyncFunctionDef)
  inside = [
    f"line {inner.lineno} in {node.name}"
    for node in ast.walk(tree)
    if isinstance(node, functions)
    for inner in ast.walk(node)
    if isinstance(inner, ast.Import | ast.ImportFrom)
  ]
  assert not inside
  assert not [dotted for _, dotted in imports(tree) if dotted.startswith(".")]


@each(LIBRARY)
def test_mistakes_of_callers_are_not_asserted(file):
  lines = [
    n.lineno for n in ast.walk(tree_of(file)) if isinstance(n, ast.Assert)
  ]
  assert not lines, f"asserts on lines {lines}: raise ValueError instead"


def test_the_house_is_small_at_the_top():
  """A new file belongs into the package of its capability."""
  assert len(list((ROOT / "jlora").glob("*.py"))) <= 12


@pytest.mark.parametrize(
  ("here", "there", "legal"),
  [
    ("factoring", "loras", True),
    ("pairing", "pairing", True),
    ("merging/checkpoints", "merging/arrays", True),
    ("merging", "merging/arrays", True),
    ("loras", "factoring", False),
    ("extraction", "routing", False),
    ("extraction", "training", False),
    ("merging/arrays", "merging", False),
    ("nowhere", "loras", False),
  ],
)
def test_the_rule_itself(here, there, legal):
  assert (misplaced(here, there) is None) == legal


@pytest.mark.parametrize(
  ("name", "legal"),
  [
    ("jlora.extract", True),
    ("jlora.merging", True),
    ("jlora.merging.ties", True),
    ("jlora.loras.Factors", True),
    ("jlora.loras.Loras", True),
    ("jlora.merging.arrays.task_vectors.ties", False),
    ("jlora.extraction.run", False),
    ("jlora.nothing", False),
  ],
)
def test_the_rule_of_doors_itself(name, legal):
  assert is_public(name) == legal
