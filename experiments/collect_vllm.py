# SPDX-License-Identifier: Apache-2.0
"""Which LoRAs does vLLM take, of which model classes and under which names?

  python -m experiments.collect_vllm SOURCE --out=FILE

Reads vLLM's source, unpacked from its source distribution (the folder with
PKG-INFO), without running any of it, and writes what
`jlora.formats.peft.vllm_names` needs to know of it:
`jlora/formats/peft/vllm.json`, if no file is given. Takes 40 seconds of
processor time; run it on a new release of vLLM. What the source decides only at
run time is null.
"""

import ast
import builtins
import functools
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.lib.sources.class_trees import (
  Item,
  Source,
  Unreadable,
  assigned_on_self,
  assignments,
  calls_in,
  calls_of,
  join_all,
  last_name,
)

FILE = Path(__file__).parents[1] / "jlora/formats/peft/vllm.json"

_MODELS = "vllm.model_executor.models"
_FOLDERS = ("vllm/model_executor/models", "vllm/model_executor/layers",
            "vllm/models")  # fmt: skip
# Files whose classes are parts of no model in particular.
_SHARED = re.compile(
  r"vllm\.config|vllm\.model_executor\.layers\.(quantization|fused_moe|linear|"
  r"vocab_parallel_embedding|rotary_embedding|attention|pooler|fla)\b|"
  rf"{re.escape(_MODELS)}\.(interfaces|interfaces_base|registry|config|utils)\b"
)
_TABLES = re.compile(r"_(?!VLLM|PREVIOUSLY|OOT)[A-Z_]+_MODELS")
# Those whose models may be without the `model.` that vLLM's class has.
_POOLING = re.compile(r"_(EMBEDD|LATE_|REWARD|(TOKEN|SEQUENCE)_CLASS).*")
# Attributes that hold no module.
_NO_MODULES = re.compile(
  r"_.*|weight|bias|(start|end)_layer|make_empty_intermediate_tensors|.*config"
  r"|(n|num)_.*|hf_to_vllm_mapper"
)
# What names of files that are not read stand for.
_ELSEWHERE = (
  (".*Linear", "linear"),
  ("FusedMoEFactory", "experts"),
  ("(init|make|build|create|load)[a-z]*_.*", "module"),
)
_EXPERTS = ("gate_proj", "down_proj", "up_proj")
_LISTS = re.compile(r"\bnn\.(ModuleList|Sequential)\b")
_BY_ARCHITECTURE = "init_vllm_registered_model"
# The parts of a WeightsMapper that rename, in the order in which they do.
_RENAMES = ("regex", "substr", "prefix", "suffix")


class VllmSource(Source):
  """The source of vLLM, whose mappers of names can be evaluated."""

  def called(self, module: str, node: ast.Call) -> Any:
    """Evaluates a WeightsMapper, a changed copy of one, or a pattern."""
    name = last_name(node.func)
    if name == "compile":
      return self.value(module, node.args[0])
    if name == "fromkeys" and (
      len(node.args) == 1 or ast.unparse(node.args[1]) == "None"
    ):
      return {}  # weights that are not loaded
    if name not in ("WeightsMapper", "replace", "dict"):
      raise Unreadable(name)
    old = self.value(module, node.args[0]) if node.args else {}
    return old | {
      str(keyword.arg): self.value(module, keyword.value)
      for keyword in node.keywords
      if "stacked" not in str(keyword.arg)
    }


class Reach:
  """All that a class's code mentions, and the classes that this mentions."""

  def __init__(self, source: Source, item: Item, table: dict[str, Item]):
    self.source = source
    self.items: dict[Item, None] = {}
    self.is_open = False  # whether config.json says what else there is
    waiting = [item]
    while waiting:
      each = waiting.pop()
      if each in self.items or _SHARED.match(each.module):
        continue
      self.items[each] = None
      waiting += source.mentioned(each)
      for node in calls_in(each.node):
        if last_name(node.func) == _BY_ARCHITECTURE:
          inner = _architectures(node, each.node)
          self.is_open |= not inner
          waiting += [table[name] for name in inner if name in table]

  def assigned(self) -> Iterator[tuple[Item, str, Any]]:
    """Yields (class, attribute, expression) of what is set on `self`."""
    for item in self.items:
      for name, value in assigned_on_self(item.node):
        yield item, name, value

  def calls(self, item: Item, value: ast.AST) -> set[str]:
    """Returns what the calls in an expression make.

    "linear" for a layer that vLLM puts LoRA on, "experts", "module" for
    another module, and "open" if a variable says which.
    """
    outer = {self.made(item, node) for node in calls_of(value, inner=False)}
    inner = {self.made(item, node) for node in calls_of(value, inner=True)}
    return (outer | inner & {"linear", "experts"}) - {""}

  def made(self, item: Item, node: ast.Call) -> str:
    """Says what a call makes."""
    name = last_name(node.func)
    found = self.source.resolve(item.module, node.func)
    if found is not None:
      return self._kind_of(found)
    if isinstance(node.func, ast.Attribute):
      owner = ast.unparse(node.func.value)
      if owner == "self":
        return self._made_by(item, name)
      return "module" if owner in ("nn", "torch.nn") else ""
    if name not in self.source.imports.get(item.module, {}):
      return "" if hasattr(builtins, name) else "open"
    kinds = (kind for end, kind in _ELSEWHERE if re.fullmatch(end, name))
    return next(kinds, "")

  def _made_by(self, item: Item, name: str) -> str:
    """Says what a method of a class makes, or a class that it names."""
    for node in getattr(item.node, "body", []):
      if isinstance(node, ast.FunctionDef) and node.name == name:
        made = {
          self.made(item, call)
          for call in calls_in(node)
          if not ast.unparse(call.func).startswith("self.")
        }
        kinds = ("experts", "linear", "open", "module")
        return next((kind for kind in kinds if kind in made), "")
    found = self.source.attribute(item, name)
    cls = self.source.resolve(*found) if found else None
    return self._kind_of(cls) if cls else "module"

  def _kind_of(self, found: Item) -> str:
    """Says what a class, or the result of a function, is."""
    if isinstance(found.node, ast.FunctionDef):
      returned = ast.unparse(found.node.returns) if found.node.returns else ""
      return "experts" if "MoERunner" in returned else "module"
    kinds = (("LinearBase", "linear"), ("MoERunner", "experts"))
    return next((k for c, k in kinds if self.source.is_a(found, c)), "module")


def collect(folder: Path) -> dict[str, Any]:
  """Returns the contents of vllm.json.

  Args:
    folder: of the unpacked source distribution.
  """
  source = VllmSource(folder, _FOLDERS, ["vllm/config/model.py"])
  table, pooling = _registry(source)
  rows = {}
  for architecture, item in table.items():
    rows[architecture] = _row(source, item, table)
    if rows[architecture]["lora"] and architecture in pooling:
      rows[architecture]["pools"] = True
  version = re.search(
    r"^Version: (.*)$", (folder / "PKG-INFO").read_text(), re.M
  )
  if version is None:
    raise SystemExit(f"{folder / 'PKG-INFO'} names no version")
  suffixes = source.find("vllm.config.model", "_SUFFIX_TO_DEFAULTS")
  listed = source.value(suffixes.module, suffixes.node) if suffixes else []
  return {
    "version": version[1],
    "suffixes": {suffix: convert for suffix, (_, convert) in listed},
    "classes": dict(sorted(rows.items())),
  }


def write(facts: dict[str, Any], file: Path) -> None:
  """Writes the facts, one architecture a line."""
  dump = functools.partial(json.dumps, separators=(",", ":"))
  rows = ",\n".join(
    f"{dump(key)}:{dump(value)}" for key, value in facts["classes"].items()
  )
  head = "".join(
    f"{dump(key)}:{dump(value)},\n"
    for key, value in facts.items()
    if key != "classes"
  )
  file.write_text(f'{{\n{head}"classes":{{\n{rows}\n}}}}\n')


def _registry(source: Source) -> tuple[dict[str, Item], set[str]]:
  """Returns {architecture: class}, and which of them pool."""
  registry = f"{_MODELS}.registry"
  found: dict[str, Item] = {}
  pooling: set[str] = set()
  for name, item in source.items[registry].items():
    if not _TABLES.fullmatch(name):
      continue
    for key, entry in zip(item.node.keys, item.node.values, strict=True):
      if not isinstance(key, ast.Constant):
        continue  # those of another table once more
      architecture = str(key.value)
      module, cls = source.value(registry, entry)[:2]
      module = module if "." in module else f"{_MODELS}.{module}"
      made = source.find(module, cls)
      if made is None:
        print(f"{architecture}: {module} has no {cls}", file=sys.stderr)
        continue
      found.setdefault(architecture, made)
      if _POOLING.fullmatch(name):
        pooling.add(architecture)
  return found, pooling


def _row(source: Source, item: Item, table: dict[str, Item]) -> dict[str, Any]:
  """Returns what is to know of a class."""
  if not source.is_a(item, "SupportsLoRA"):
    return {"lora": False}
  reach = Reach(source, item, table)
  kinds = _kinds(reach)
  top = _top(source, item, reach)
  is_open = reach.is_open or item.module.startswith(f"{_MODELS}.transformers")
  experts = _flag(source, item, "is_3d_moe_weight")
  row = {
    "lora": True,
    "embeddings": _embeddings(source, item, reach),
    "expected": None if is_open else _expected(source, item, reach, kinds),
    "parts": None if is_open else _modules({*kinds} | top),
    "top": _modules(top),
    "renames": _mapper(source, item),
    "experts": "stacked" if experts else _expert_names(source, reach),
    "text": source.is_a(item, "SupportsMultiModal"),
    "skips": _attribute(source, item, "lora_skip_prefixes") or [],
  }
  needed = ("lora", "expected", "parts", "renames")
  return {key: value for key, value in row.items() if value or key in needed}


def _kinds(reach: Reach) -> dict[str, set[str]]:
  """Returns {attribute: what it is in any of the classes}."""
  found: dict[str, set[str]] = {}
  for item, name, value in reach.assigned():
    kinds = reach.calls(item, value)
    if kinds:
      found.setdefault(name, set()).update(kinds)
    if "linear" in kinds and _LISTS.search(ast.unparse(value)):
      found.setdefault("N", set()).add("linear")
  return found


def _modules(names: Iterable[str]) -> list[str]:
  """Lists the names that can be those of modules."""
  return sorted(name for name in names if not _NO_MODULES.fullmatch(name))


def _expected(
  source: Source, item: Item, reach: Reach, kinds: dict[str, set[str]]
) -> list[str]:
  """Lists the last names of modules that vLLM accepts in an adapter."""
  names = {
    name for name, each in kinds.items() if each & {"linear", "experts", "open"}
  }
  packed = _packed(source, item, reach)
  inner = itertools.chain.from_iterable(packed[n] for n in names & set(packed))
  return sorted((names - set(packed)) | set(inner))


def _packed(source: Source, item: Item, reach: Reach) -> dict[str, list[str]]:
  """Returns {layer: the layers of a checkpoint that are packed in it}."""
  packed = dict(_attribute(source, item, "packed_modules_mapping") or {})
  if not packed:
    for each in _outermost(source, reach):
      packed |= _attribute(source, each, "packed_modules_mapping") or {}
  for each in reach.items:
    for target, value in assignments(each.node):
      if isinstance(target, ast.Subscript) and (
        ast.unparse(target.value) == "self.packed_modules_mapping"
      ):
        packed |= source.value(each.module, ast.Dict([target.slice], [value]))
  return packed


def _embeddings(source: Source, item: Item, reach: Reach) -> list[str]:
  """Lists the embeddings and heads on which vLLM puts LoRA."""
  found = set(_attribute(source, item, "embedding_modules") or ())
  for each in _outermost(source, reach):
    found |= set(_attribute(source, each, "embedding_modules") or ())
  return sorted(found)


def _outermost(source: Source, reach: Reach) -> list[Item]:
  """Lists classes that no other one inherits from."""
  classes = [
    each for each in reach.items if isinstance(each.node, ast.ClassDef)
  ]
  bases = {base for each in classes for base in source.line(each)[1:]}
  return [each for each in classes if each not in bases]


def _attribute(source: Source, item: Item, name: str) -> Any:
  """Returns the value of a class's attribute, None if it has none to read."""
  found = source.attribute(item, name)
  try:
    return source.value(*found) if found else None
  except Unreadable:
    return None


def _flag(source: Source, item: Item, name: str) -> bool:
  """Returns whether a class's attribute is True."""
  return _attribute(source, item, name) is True


def _top(source: Source, item: Item, reach: Reach) -> set[str]:
  """Lists the attributes of a model that can be modules."""
  return {
    name
    for each in source.line(item)
    for name, value in assigned_on_self(each.node)
    if reach.calls(each, value) or ast.unparse(value).startswith("self.")
  }


def _mapper(source: Source, item: Item) -> dict[str, Any] | None:
  """Returns how vLLM renames modules, in order; None if that is not known."""
  found = source.attribute(item, "hf_to_vllm_mapper")
  values = [found] if found else []
  for each in source.line(item):
    values += [
      (each.module, inner)
      for name, value in assigned_on_self(each.node)
      if name == "hf_to_vllm_mapper"
      for inner in _without_self(value)
    ]
  whole: dict[str, Any] = {}
  for module, value in values:
    try:
      whole = join_all(whole, source.value(module, value) or {})
    except Unreadable:
      return None
  parts = {name: whole.get(f"orig_to_new_{name}", {}) for name in _RENAMES}
  return {
    name: [[old, new] for old, new in pairs.items() if new is not None]
    for name, pairs in parts.items()
    if any(new is not None for new in pairs.values())
  }


def _without_self(node: Any) -> list[Any]:
  """Lists what is joined to an attribute; the expression if it is replaced."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return [*_without_self(node.left), *_without_self(node.right)]
  return [] if ast.unparse(node) == "self.hf_to_vllm_mapper" else [node]


def _expert_names(source: Source, reach: Reach) -> list[str]:
  """Lists the names of a separate expert's matrices."""
  names: set[str] = set()
  for item in reach.items:
    for node in calls_in(item.node):
      given = [k.value for k in node.keywords if "ckpt_" in str(k.arg)]
      for value in given:
        try:
          found = source.value(item.module, value)
        except Unreadable:
          continue
        names |= {*found} if isinstance(found, list) else {found}
      if not given and reach.made(item, node) == "experts":
        names |= {*_EXPERTS}
  return sorted(name for name in names if name)


def _architectures(node: ast.Call, around: ast.AST) -> list[str]:
  """Reads which architectures a call may build; empty if config.json says."""
  given = [k.value for k in node.keywords if k.arg == "architectures"]
  if given and isinstance(given[0], ast.Name):
    name = given[0].id
    given = [
      value
      for target, value in assignments(around)
      if isinstance(target, ast.Name) and target.id == name
    ]
  try:
    return [name for value in given for name in ast.literal_eval(value) or ()]
  except ValueError:
    return []


def main(words: list[str]) -> None:
  """Collects and writes."""
  out = [word.removeprefix("--out=") for word in words if "--out=" in word]
  folders = [word for word in words if "--out=" not in word]
  if len(folders) != 1:
    raise SystemExit(__doc__)
  facts = collect(Path(folders[0]))
  write(facts, Path(out[0]) if out else FILE)
  print(f"{len(facts['classes'])} architectures of vLLM {facts['version']}")


if __name__ == "__main__":
  main(sys.argv[1:])
