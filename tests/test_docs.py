# SPDX-License-Identifier: Apache-2.0
"""What users call is described in full and shown, the rest in a line.

Public is what `jlora` and its packages export, and what the files directly in
`jlora/` define. That the examples run is pytest's doctest collection, not this
file.
"""

import ast
import collections
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import jlora


def modules():
  yield jlora.__name__
  for found in pkgutil.walk_packages(jlora.__path__, "jlora."):
    yield found.name


def defined(name, kind):
  """(name, value) of a module's own functions or classes."""
  for attribute, value in sorted(vars(importlib.import_module(name)).items()):
    if getattr(value, "__module__", None) == name and kind(value):
      yield f"{name}.{attribute}", value


def public_names():
  """{module: what of it users can ask a door for}; imports no other file.

  The file that needs torch and transformers is behind no door, and they take
  longer to come in than all others together.
  """
  found = collections.defaultdict(set)
  files = {f.name: f for f in pkgutil.iter_modules(jlora.__path__, "jlora.")}
  packages = pkgutil.walk_packages(jlora.__path__, "jlora.")
  doors = {"jlora", *files, *(f.name for f in packages if f.ispkg)}
  for name in sorted(doors):
    module = importlib.import_module(name)
    values = [getattr(module, n) for n in getattr(module, "__all__", ())]
    if name in files and not values:
      values = [
        value
        for attribute, value in vars(module).items()
        if getattr(value, "__module__", None) == name and attribute[0] != "_"
      ]
    for value in values:
      if inspect.isfunction(value) or inspect.isclass(value):
        found[value.__module__].add(f"{value.__module__}.{value.__name__}")
  return found


PUBLIC = public_names()


def public(kind):
  """Public functions or classes, each where it is defined."""
  for module in sorted(PUBLIC):
    for name, value in defined(module, kind):
      if name in PUBLIC[module] and not value.__name__.startswith("_"):
        yield pytest.param(value, id=name)


def parameters(function):
  return [p for p in inspect.signature(function).parameters if p != "self"]


def gives_back(function):
  """Whether a value comes out: not of a nested function's own return."""
  tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
  todo, inner = list(tree.body[0].body), (ast.FunctionDef, ast.ClassDef)
  while todo:
    node = todo.pop()
    if isinstance(node, ast.Return) and node.value is not None:
      return True
    if isinstance(node, ast.Yield | ast.YieldFrom):
      return True
    if not isinstance(node, (*inner, ast.Lambda)):
      todo.extend(ast.iter_child_nodes(node))
  return False


def sections(doc):
  return set(re.findall(r"^([A-Z]\w+):(?=\s|$)", inspect.cleandoc(doc), re.M))


def lacks(function):
  """What the docstring of a function does not have."""
  doc = inspect.getdoc(function) or ""
  found = sections(doc)
  if not doc:
    yield "a docstring"
    return
  if parameters(function) and "Args" not in found:
    yield "Args"
  if "Args" in found:
    named = doc.split("Args:", 1)[1]
    for parameter in parameters(function):
      if not re.search(rf"\b{parameter}\b.*:", named):
        yield f"Args: {parameter}"
  if gives_back(function) and not found & {"Returns", "Yields"}:
    yield "Returns"
  if "Example" not in found or ">>>" not in doc:
    yield "Example with a >>>"


@pytest.mark.parametrize("function", list(public(inspect.isfunction)))
def test_functions_are_documented(function):
  missing = list(lacks(function))
  assert not missing, f"lacks {', '.join(missing)}"


@pytest.mark.parametrize("name", list(modules()))
def test_what_is_not_public_says_what_it_does(name):
  """One clear line; a name with an underscore may say it by itself."""
  bare = [
    at
    for kind in (inspect.isfunction, inspect.isclass)
    for at, value in defined(name, kind)
    if not value.__name__.startswith("_")
    and value.__name__ != "<lambda>"
    and not (inspect.getdoc(value) or "")
  ]
  assert not bare


@pytest.mark.parametrize("function", list(public(inspect.isfunction)))
def test_examples_show_more_than_a_name(function):
  asserted = rf">>> {function.__name__}\.__name__$"
  assert not re.search(asserted, inspect.getdoc(function) or "", re.M)


@pytest.mark.parametrize("cls", list(public(inspect.isclass)))
def test_classes_and_their_methods_are_documented(cls):
  doc = cls.__doc__ or ""
  assert doc
  assert not doc.startswith(f"{cls.__name__}("), "the generated docstring"
  bare = [
    name
    for name, value in vars(cls).items()
    if not name.startswith("_")
    and inspect.isfunction(getattr(value, "fget", value))
    and not inspect.getdoc(getattr(value, "fget", value))
  ]
  assert not bare


@pytest.mark.parametrize("name", list(modules()))
def test_modules_say_what_they_are_and_leave_nothing_open(name):
  module = importlib.import_module(name)
  source = inspect.getsource(module)
  assert (module.__doc__ or "").strip()
  assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
  assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


def undocumented(x):
  """A line."""
  return x


def documented(x):
  """A line.

  Args:
    x: anything.

  Returns:
    It.

  Example:
    >>> documented(1)
    1
  """
  return x


def test_the_rule_itself():
  assert list(lacks(undocumented)) == ["Args", "Returns", "Example with a >>>"]
  assert list(lacks(documented)) == []
