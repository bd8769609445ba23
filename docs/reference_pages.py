# SPDX-License-Identifier: Apache-2.0
"""The API reference: a page for each task, from the packages' docstrings.

Docstrings are Markdown already, but for their sections (`Args:`, `Returns:`).
Sources are read, nothing is imported, so that the site needs no JAX.
"""

import ast
import functools
import inspect
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]

# The task, and the module whose door has what it takes.
TASKS = {
  "The usual names": "jlora",
  "Extract": "jlora.extraction",
  "Factor a change": "jlora.factoring",
  "Choose ranks": "jlora.ranks",
  "Read and write checkpoints": "jlora.checkpoints",
  "Write for other tools": "jlora.formats",
  "Compute beside the weights": "jlora.adapting",
  "Train": "jlora.training",
  "Merge": "jlora.merging",
  "Route": "jlora.routing",
  "Evaluate": "jlora.evaluation",
  "Bring hidden units in order": "jlora.alignment",
  "Edit facts": "jlora.editing",
  "Place on devices": "jlora.sharding",
  "Reference models": "jlora.models",
  "Loras": "jlora.loras",
  "Views": "jlora.views",
  "Declared views": "jlora.declared_views",
  "Views of trees": "jlora.tree_views",
  "Paths": "jlora.paths",
  "Select": "jlora.selection",
  "Pair two checkpoints": "jlora.pairing",
  "Long runs": "jlora.runs",
  "Numerics": "jlora.numerics",
  "Commands": "jlora.commands",
}
_SECTION = re.compile(r"^([A-Z]\w+):$", re.M)
_DEFINED = (ast.FunctionDef, ast.ClassDef)


def file_of(module: str) -> pathlib.Path:
  """Returns the source file of a dotted name of a module."""
  path = ROOT.joinpath(*module.split("."))
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree_of(module: str) -> ast.Module:
  """Parses a module."""
  return ast.parse(file_of(module).read_text(encoding="utf-8"))


def names_of(module: str) -> list[str]:
  """Lists what a module offers: its `__all__`, else what it defines."""
  body = tree_of(module).body
  for node in body:
    is_list = isinstance(node, ast.Assign)
    if is_list and ast.unparse(node.targets[0]) == "__all__":
      return ast.literal_eval(node.value)
  found = [node.name for node in body if isinstance(node, _DEFINED)]
  return sorted(name for name in found if not name.startswith("_"))


def definition(module: str, name: str) -> ast.AST | None:
  """Finds where a name is defined, through the imports of the doors.

  Returns:
    A function, a class, or an assignment; None if it is none of them.
  """
  for node in ast.walk(tree_of(module)):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        if (alias.asname or alias.name) == name and "jlora" in node.module:
          return definition(node.module, alias.name)
  for node in tree_of(module).body:
    if isinstance(node, _DEFINED) and node.name == name:
      return node
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    if name in [getattr(target, "id", None) for target in targets]:
      return node
  return None


def signature(node: ast.AST, name: str) -> str:
  """Returns how a function or class is called."""
  if isinstance(node, ast.ClassDef):
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    inits = [x for x in node.body if getattr(x, "name", "") == "__init__"]
    if not inits:
      inner = ", ".join(ast.unparse(field) for field in fields)
      return f"class {name}({inner})"
    node = inits[0]
  arguments = ast.unparse(node.args).removeprefix("self, ")
  arguments = "" if arguments == "self" else arguments
  returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
  return f"{name}({arguments}){returns}"


def body_of(doc: str) -> str:
  """Writes a docstring as Markdown: sections get a heading in bold.

  Args:
    doc: without its indentation.

  Returns:
    Markdown; entries of `Args` are a list, examples are code.
  """
  pieces = _SECTION.split(doc)
  parts = [pieces[0].rstrip()]
  for title, text in zip(pieces[1::2], pieces[2::2], strict=True):
    text = inspect.cleandoc(text)
    if title == "Example":
      text = f"```pycon\n{text}\n```"
    elif title in ("Args", "Attributes"):
      text = re.sub(r"^(\*{0,2}[\w, *]+): ", r"- `\1`: ", text, flags=re.M)
      text = re.sub(r"^ +", "  ", text, flags=re.M)
    parts.append(f"**{title}**\n\n{text}")
  return "\n\n".join(parts)


def entry(module: str, name: str) -> str:
  """Writes the entry of one name."""
  node = definition(module, name)
  heading = f"## `{module}.{name}`"
  if not isinstance(node, _DEFINED):
    return (
      f"{heading}\n\n```python\n{ast.unparse(node)}\n```" if node else heading
    )
  called = f"```python\n{signature(node, name)}\n```"
  doc = ast.get_docstring(node) or ""
  methods = [
    f"- `{inner.name}`: {(ast.get_docstring(inner) or '').splitlines()[0]}"
    for inner in getattr(node, "body", ())
    if isinstance(node, ast.ClassDef)
    and isinstance(inner, ast.FunctionDef)
    and not inner.name.startswith("_")
  ]
  listed = "**Methods**\n\n" + "\n".join(methods) if methods else ""
  return "\n\n".join(
    part for part in (heading, called, body_of(doc), listed) if part
  )


def page(module: str) -> str:
  """Writes the page of a module of `TASKS`."""
  title = next(title for title, name in TASKS.items() if name == module)
  opening = f"# {title}\n\n`import {module}`"
  entries = [entry(module, name) for name in names_of(module)]
  return "\n\n".join([opening, *entries]) + "\n"


def write(folder: pathlib.Path) -> None:
  """Writes all pages into a folder; one that has not changed stays."""
  folder.mkdir(exist_ok=True)
  for module in TASKS.values():
    text = page(module)
    file = folder / f"{module}.md"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
      file.write_text(text, encoding="utf-8")
