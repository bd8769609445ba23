# SPDX-License-Identifier: Apache-2.0
"""Reads from a model's source which of its modules it does more with than call.

An adapter's layer stands in for a module where that is called. Code that reads
a weight or an attribute past the call, or hands the module on, does not see it.
"""

import ast
import functools
import inspect
import re
import sys

# Functions that run before or after a model computes.
_NOT_COMPUTING = (
  "__init__", "init_weights", "_init_weights", "initialize_weights",
  "reset_parameters", "tie_weights", "_tie_weights", "extra_repr",
  "_rescale_layers", "_resize", "resize", "set_", "get_output_embeddings",
  "get_input_embeddings", "_get_resized", "prune",
)  # fmt: skip
# Calls that read no weight of a module that they are given.
_ONLY_TENSORS = re.compile(r"(torch|nn|init)\.|.*\b_?init_|(is|has)[a-z]+$")
# Parts of a weight that an adapter does not change.
_NO_VALUES = ("dtype", "device", "shape", "ndim", "size", "data", "is_cuda")


@functools.cache
def find_reached(module: str, attributes: tuple[str, ...]) -> frozenset[str]:
  """Finds modules of which a model's code reads an attribute itself.

  What a wrapper adds when it is called is missed there.

  Args:
    module: name of a Python module that is imported.
    attributes: with "weight" also modules that are given to functions, which
      may read it.

  Returns:
    The modules' last names; empty if the source is not there.
  """
  tree = _tree_of(module)
  parents = {
    child: node
    for node in ast.walk(tree)
    for child in ast.iter_child_nodes(node)
  }
  found = set()
  for node in ast.walk(tree):
    # A function may read the weight of a module that it is given.
    if "weight" in attributes and isinstance(node, ast.Call):
      computes = _computes(node, parents)
      if computes and not _ONLY_TENSORS.match(ast.unparse(node.func)):
        given = [*node.args, *(word.value for word in node.keywords)]
        found |= {a.attr for a in given if isinstance(a, ast.Attribute)}
    if not (
      isinstance(node, ast.Attribute)
      and node.attr in attributes
      and isinstance(node.value, ast.Attribute)
    ):
      continue
    over = parents[node]
    if isinstance(over, ast.Attribute) and over.attr in _NO_VALUES:
      continue
    if isinstance(over, ast.Call) and ast.unparse(over.func) == "isinstance":
      continue
    if _computes(node, parents):
      found.add(node.value.attr)
  return frozenset(found)


@functools.cache
def find_opened(module: str) -> tuple[frozenset[str], frozenset[str]]:
  """Finds modules that a model's code looks into, and calls by keywords alone.

  PEFT's wrapper of a parameter has none of the attributes of the module in it,
  and its first argument has another name.

  Args:
    module: name of a Python module that is imported.

  Returns:
    Last names of those it looks into, and of those it calls by keywords.
  """
  tree = _tree_of(module)
  building = ("__init__", "init_weights", "_init_weights", "reset_parameters")
  skipped = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef) and function.name in building
    for node in ast.walk(function)
  }
  opened, named = set(), set()
  for node in ast.walk(tree):
    if id(node) in skipped:
      continue
    inner = getattr(node, "value", None)
    if isinstance(node, ast.Attribute) and isinstance(inner, ast.Attribute):
      opened.add(inner.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      named |= {node.func.attr} if node.keywords and not node.args else set()
  return frozenset(opened), frozenset(named)


@functools.cache
def _tree_of(module: str) -> ast.AST:
  """Parses an imported module; an empty one if its source is not there."""
  try:
    return ast.parse(inspect.getsource(sys.modules[module]))
  except (OSError, TypeError, KeyError):
    return ast.Module([], [])


def _computes(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
  """Returns whether code runs in every forward pass that is not training."""
  while node in parents:
    before, node = node, parents[node]
    if isinstance(node, ast.If) and before in node.body:
      test = ast.unparse(node.test)
      if "self.training" in test or "pretraining_tp" in test:
        return False
    if isinstance(node, ast.FunctionDef):
      return not node.name.startswith(_NOT_COMPUTING)
  return False
