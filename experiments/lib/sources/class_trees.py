# SPDX-License-Identifier: Apache-2.0
"""Reads what the classes and names of a library mean, from its files alone."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Unreadable(Exception):
  """A value that only running the code would tell."""


class Item(NamedTuple):
  """What a file defines at its top: a class, a function or a value."""

  module: str
  name: str
  node: Any


class Source:
  """The files of a library's source, and what their names mean.

  Args:
    folder: where module names begin.
    folders: those in it that are read.
    more: single files that are read, too.
  """

  def __init__(self, folder: Path, folders: Iterable[str], more: Iterable[str]):
    self.items: dict[str, dict[str, Item]] = {}
    self.imports: dict[str, dict[str, tuple[str, str]]] = {}
    files = [f for each in folders for f in (folder / each).rglob("*.py")]
    for file in sorted([*files, *(folder / each for each in more)]):
      self._read(file, file.relative_to(folder))

  def _read(self, file: Path, place: Path) -> None:
    """Notes what a file defines and imports."""
    parts = place.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(file.read_text())
    items = self.items.setdefault(name, {})
    for node in _statements(tree.body):
      if isinstance(node, ast.ClassDef | ast.FunctionDef):
        items[node.name] = Item(name, node.name, node)
      for target, value in assigned_by(node):
        if isinstance(target, ast.Name):
          items[target.id] = Item(name, target.id, value)
    imports = self.imports.setdefault(name, {})
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
          above = name.split(".")[: None if is_package else -1]
          above = above[: len(above) - node.level + 1]
          origin = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
          imports[alias.asname or alias.name] = origin, alias.name

  def find(self, module: str, name: str, depth: int = 9) -> Item | None:
    """Returns what a name means in a file; None if it is from elsewhere."""
    item = self.items.get(module, {}).get(name)
    if item is not None and not isinstance(item.node, ast.Name):
      return item
    if item is not None and depth and item.node.id != name:
      return self.find(module, item.node.id, depth - 1)
    origin = self.imports.get(module, {}).get(name)
    if origin is None or not depth:
      return None
    return self.find(*origin, depth - 1)

  def resolve(self, module: str, node: ast.AST) -> Item | None:
    """Returns what an expression names: a name, or one in a file's name."""
    if isinstance(node, ast.Name):
      return self.find(module, node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      origin = self.imports.get(module, {}).get(node.value.id)
      return self.find(".".join(origin), node.attr) if origin else None
    return None

  @functools.cache  # noqa: B019
  def mentioned(self, item: Item) -> list[Item]:
    """Lists what the code of a class, function or value names."""
    found = {
      self.resolve(item.module, node)
      for node in ast.walk(item.node)
      if isinstance(node, ast.Name | ast.Attribute)
    }
    return [each for each in found if each is not None]

  @functools.cache  # noqa: B019
  def line(self, item: Item) -> list[Item]:
    """Lists a class and those that it inherits from, the nearest first."""
    found = [item]
    for base in getattr(item.node, "bases", []):
      for inner in [base, *getattr(base, "args", [])]:
        above = self.resolve(item.module, inner)
        if above is not None and above not in found:
          found += [each for each in self.line(above) if each not in found]
    return found

  def is_a(self, item: Item, name: str) -> bool:
    """Returns whether a class is or inherits from one of a name."""
    return any(
      each.name == name
      or any(
        last_name(base) == name for base in getattr(each.node, "bases", [])
      )
      for each in self.line(item)
    )

  def attribute(self, item: Item, name: str) -> tuple[str, Any] | None:
    """Returns (module, expression) of a class's attribute."""
    for each in self.line(item):
      for node in getattr(each.node, "body", []):
        for target, value in assigned_by(node):
          if isinstance(target, ast.Name) and target.id == name:
            return each.module, value
    return None

  def value(self, module: str, node: Any) -> Any:
    """Evaluates an expression of literals and of names for them.

    Raises:
      Unreadable: it is something else.
    """
    if isinstance(node, ast.Dict):
      found = {}
      for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
          found |= self.value(module, value)
        else:
          found[self.value(module, key)] = self.value(module, value)
      return found
    if isinstance(node, ast.List | ast.Tuple):
      return [self.value(module, each) for each in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
      return join_all(
        self.value(module, node.left), self.value(module, node.right)
      )
    if isinstance(node, ast.Call):
      return self.called(module, node)
    if isinstance(node, ast.DictComp) and ast.unparse(node.value) == "None":
      return {}  # weights that are not loaded
    if isinstance(node, ast.Attribute):
      owner = self.resolve(module, node.value)
      found = owner and self.attribute(owner, node.attr)
      if found:
        return self.value(*found)
    if isinstance(node, ast.Name):
      item = self.find(module, node.id)
      if item is not None and isinstance(item.node, ast.expr):
        return self.value(item.module, item.node)
    try:
      return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
      raise Unreadable(ast.unparse(node)[:60]) from error

  def called(self, module: str, node: ast.Call) -> Any:
    """Evaluates a call; a library's own source knows some.

    Raises:
      Unreadable: always, here.
    """
    del module
    raise Unreadable(ast.unparse(node)[:60])


def join_all(left: Any, right: Any) -> Any:
  """Joins two dictionaries, and those in them, as `|` joins mappers."""
  if not any(isinstance(value, dict) for value in {**left, **right}.values()):
    return left | right
  return {
    key: left.get(key, {}) | right.get(key, {}) for key in {**left, **right}
  }


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
  """Yields statements, and those in branches at the same level."""
  for node in body:
    yield node
    if isinstance(node, ast.If | ast.Try):
      yield from _statements([*node.body, *node.orelse])


def assigned_by(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
  """Yields (target, value) of an assignment."""
  if isinstance(node, ast.Assign):
    for target in node.targets:
      inner = target.elts if isinstance(target, ast.Tuple) else [target]
      yield from ((each, node.value) for each in inner)
  elif isinstance(node, ast.AnnAssign) and node.value is not None:
    yield node.target, node.value


def assigned_on_self(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
  """Yields (attribute, value) of what code sets on `self` or another name."""
  for target, value in assignments(tree):
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
      yield target.attr, value


@functools.cache
def assignments(tree: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
  """Lists (target, value) of all assignments in a piece of code."""
  return [pair for node in ast.walk(tree) for pair in assigned_by(node)]


@functools.cache
def calls_in(tree: ast.AST) -> list[ast.Call]:
  """Lists all calls in a piece of code."""
  return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def calls_of(node: ast.AST, inner: bool) -> Iterator[ast.Call]:
  """Yields the calls in an expression, `inner` also those in others."""
  if isinstance(node, ast.Call):
    yield node
    if not inner:
      return
  for each in ast.iter_child_nodes(node):
    yield from calls_of(each, inner)


def last_name(node: ast.AST) -> str:
  """Returns the last part of a dotted expression."""
  if isinstance(node, ast.Subscript):
    return last_name(node.value)
  return getattr(node, "attr", getattr(node, "id", ""))
