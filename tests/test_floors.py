# SPDX-License-Identifier: Apache-2.0
"""A file imports only from floors below its own; some imports nowhere at all.

Reads the sources, so a file that is never imported is checked as well.
"""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A package stands on one floor with all of its files.
FLOORS = (
  # 0: types, names, and bytes in files
  "arrays norms loras paths views pairs decompositions subspaces krylov_spaces "
  "meshes byte_ranges safetensors_headers safetensors_files quantisation "
  "orbax_directories huggingface_folders",
  # 1: arrays, and checkpoints as mappings
  "factoring certificates logits ranks deltas pairing fused_experts sharding "
  "rounding checkpoints journal vocabularies",
  # 2: what is done with Loras, and the formats of their files
  "extraction adapted banks axis_rules product_rules convolution_rules "
  "lookup_rules interpreter programs binding "
  "application packing packed_files merging routing "
  "symmetries axes layouts permutations reordering assignments descents "
  "alignment measurements ledgers editing edit_values "
  "peft_configs peft_files peft_folders adapter_parts snapshots restoration "
  "overlaps conflicts",
  # 3: what is said about them and written
  "evaluation divergences moments whitening reporting refinement advice models "
  "exporting adapter_plans adapter_tensors expert_parts merged_checkpoints "
  "mixtures mixture_folders report_tables initialisation starts training",
  # 4: whole runs, from disk to disk
  "runs plans modules assembly progress hosts guards watches dealing steps "
  "readings splits shares shared_journals "
  "recipes recipe_forms recipe_files layer_slices adapted_checkpoints "
  "merge_jobs merge_inputs merge_plans merge_steps merge_queues merge_runs "
  "whole_thresholds",
  # 5: the public names
  "__init__",
)
FLOOR_OF = {
  name: floor for floor, names in enumerate(FLOORS) for name in names.split()
}

# Files of one floor that may import from each other, without a circle.
FAMILIES = (
  "arrays norms loras paths views pairs decompositions subspaces krylov_spaces "
  "meshes byte_ranges safetensors_headers safetensors_files quantisation "
  "orbax_directories huggingface_folders",
  "pairing fused_experts",
  "checkpoints journal",
  "merging",
  "adapted banks axis_rules product_rules convolution_rules lookup_rules "
  "interpreter programs binding application",
  "packing packed_files",
  "overlaps conflicts",
  "symmetries axes layouts permutations reordering assignments descents "
  "alignment",
  "peft_configs peft_files peft_folders adapter_parts",
  "exporting adapter_plans adapter_tensors expert_parts merged_checkpoints "
  "mixtures mixture_folders",
  "models",
  "moments whitening",
  "initialisation starts",
  "reporting report_tables",
  "runs plans modules assembly progress hosts guards watches dealing steps "
  "readings splits shares shared_journals "
  "recipes recipe_forms recipe_files layer_slices adapted_checkpoints "
  "merge_jobs merge_inputs merge_plans merge_steps merge_queues merge_runs "
  "whole_thresholds",
)

# Neither a dependency nor a promise of jax: not in a library.
FORBIDDEN = ("torch", "transformers", "tensorflow", "jax._src")

LIBRARY = sorted((ROOT / "jlora").rglob("*.py"))
KERNELS = sorted((ROOT / "pallas_kernels").rglob("*.py"))


def name_of(file):
  return file.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("file", LIBRARY + KERNELS, ids=name_of)
every_library_file = pytest.mark.parametrize("file", LIBRARY, ids=name_of)


def tree_of(file):
  return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
  """(statement, dotted name) of all that a file imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def module_of(dotted):
  """The file of jlora that a dotted name lies in, `models/decoder`; or None."""
  parts = dotted.split(".")
  if parts[0] != "jlora":
    return None
  for end in range(len(parts), 0, -1):
    path = ROOT.joinpath(*parts[:end])
    if path.with_suffix(".py").exists():
      return "/".join(parts[1:end])
    if (path / "__init__.py").exists():
      return "/".join([*parts[1:end], "__init__"])
  return dotted


def module_at(file):
  relative = file.relative_to(ROOT / "jlora").with_suffix("")
  return relative.as_posix()


def edges(file):
  """(line, module) of everything of jlora that a file imports."""
  for node, dotted in imports(tree_of(file)):
    module = module_of(dotted)
    if module is not None:
      yield node.lineno, module


def misplaced(module, other):
  """Why a file may not import another, or None."""
  here, there = module.split("/")[0], other.split("/")[0]
  for name in (here, there):
    if name not in FLOOR_OF:
      return (
        f"jlora/{name} is on no floor: add it to FLOORS in tests/test_floors.py"
      )
  if FLOOR_OF[there] < FLOOR_OF[here]:
    return None
  if any({here, there} <= set(family.split()) for family in FAMILIES):
    return None
  return (
    f"jlora/{module} (floor {FLOOR_OF[here]}) imports jlora/{other} "
    f"(floor {FLOOR_OF[there]}): only lower floors, or one's own family"
  )


@every_library_file
def test_imports_come_from_lower_floors(file):
  module = module_at(file)
  assert module.split("/")[0] in FLOOR_OF, (
    f"{name_of(file)} is on no floor: add it to FLOORS in tests/test_floors.py"
  )
  wrong = [
    f"line {line}: {why}"
    for line, other in edges(file)
    if (why := misplaced(module, other))
  ]
  assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
  graph = {
    module_at(file): {other for _, other in edges(file)} for file in LIBRARY
  }
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", KERNELS, ids=name_of)
def test_kernels_know_nothing_of_jlora(file):
  found = [dotted for _, dotted in imports(tree_of(file))]
  assert not [dotted for dotted in found if dotted.split(".")[0] == "jlora"]


@every_file
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
    if any(dotted == f or dotted.startswith(f"{f}.") for f in FORBIDDEN)
  ]
  assert not wrong


@every_file
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


@every_library_file
def test_mistakes_of_callers_are_not_asserted(file):
  lines = [
    n.lineno for n in ast.walk(tree_of(file)) if isinstance(n, ast.Assert)
  ]
  assert not lines, f"asserts on lines {lines}: raise ValueError instead"


@pytest.mark.parametrize(
  ("module", "other", "legal"),
  [
    ("factoring", "loras", True),
    ("pairing", "fused_experts", True),
    ("models/folders", "models/decoder", True),
    ("__init__", "runs", True),
    ("loras", "factoring", False),
    ("ranks", "factoring", False),
    ("extraction", "routing", False),
    ("extraction", "models/decoder", False),
    ("nowhere", "loras", False),
    ("factoring", "__init__", False),
  ],
)
def test_the_rule_itself(module, other, legal):
  assert (misplaced(module, other) is None) == legal
