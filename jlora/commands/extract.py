# SPDX-License-Identifier: Apache-2.0
"""A LoRA from two checkpoints, with the loss of every module.

  jlora extract --base=DIR --finetuned=DIR --out=DIR --rank=64

Writes `adapter_model.safetensors`, `adapter_config.json`, `README.md` and
`report.json` into the output folder and prints the tables of the report.
Checkpoints are safetensors files, Hugging Face folders, Hub ids that were
downloaded, or orbax directories.

The same command, started once on each of several hosts, shares the work: see
"Many hosts" in docs/guides/hosts.md.
"""

import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from jlora import ranks
from jlora.commands import clusters, entry
from jlora.commands.adapter_formats import (
  EXTRACTED,
  check_names,
  write_formats,
)
from jlora.commands.caches import keep_compilations
from jlora.commands.help import Command
from jlora.commands.openings import (
  OPENING,
  define_opening,
  read_opening,
)
from jlora.commands.states import (
  check_written,
  is_state_run,
  loading_of,
  read_equations,
  saver_of,
)
from jlora.commands.verdicts import check_verifiable, raise_if_wrong, record
from jlora.extraction.card import write_card
from jlora.extraction.coverage import unmatched_line
from jlora.extraction.report import (
  Report,
  larger_line,
  ledger_lines,
  rounding_line,
  type_table,
  verified_line,
  worst_table,
)
from jlora.extraction.run import extract_checkpoint
from jlora.factoring.factorisers import gram, krylov, svd
from jlora.formats.peft.layouts import PEFT, TASK_TYPES, VLLM
from jlora.pairing.match import common_rows, keep_whole, same_rows
from jlora.paths import matching
from jlora.runs.processes import LostProcess, check_same_facts
from jlora.selection import is_matrix

_FLAGS = flags.FlagValues()  # apart from those of other commands

_BASE = flags.DEFINE_string(
  "base", None, "The base checkpoint.", required=True, flag_values=_FLAGS
)
_FINETUNED = flags.DEFINE_string(
  "finetuned",
  None,
  "The finetuned checkpoint.",
  required=True,
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  "out", None, "The output folder.", required=True, flag_values=_FLAGS
)
_RANK = flags.DEFINE_integer(
  "rank",
  64,
  "Rank of every module, and the most a policy gives.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_CONV_RANK = flags.DEFINE_integer(
  "conv_rank",
  None,
  "The same of convolutions over 1 x 1; kohya files then have those too.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_POLICY = flags.DEFINE_enum(
  "policy",
  "fixed",
  ["fixed", "energy", "ratio", "noise", "budget"],
  "How ranks up to --rank are chosen: all the same; the share of the energy "
  "(--energy); singular values above the largest / --ratio; above the rounding "
  "noise of the stored dtype; or a byte budget (--budget_mib).",
  flag_values=_FLAGS,
)
_ENERGY = flags.DEFINE_float(
  "energy",
  0.95,
  "Squared share of each change to keep.",
  0.0,
  1.0,
  flag_values=_FLAGS,
)
_RATIO = flags.DEFINE_float(
  "ratio", 30.0, "Largest over smallest value kept.", flag_values=_FLAGS
)
_BUDGET = flags.DEFINE_float(
  "budget_mib",
  None,
  "Size of all factors together; sets --policy=budget.",
  flag_values=_FLAGS,
)
_SELECT = flags.DEFINE_string(
  "select",
  None,
  "Regex of whole names: only these matrices are factored.",
  flag_values=_FLAGS,
)
_EXCLUDE = flags.DEFINE_string(
  "exclude",
  None,
  "Regex of whole names: these matrices are not factored.",
  flag_values=_FLAGS,
)
_WHOLE = flags.DEFINE_string(
  "whole",
  None,
  "Regex of whole names: these tensors are stored as the finetune has them. "
  "PEFT replaces whole modules, so give all of a module.",
  flag_values=_FLAGS,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ["float32", "bfloat16", "float16"],
  "Storage dtype of the factors.",
  flag_values=_FLAGS,
)
_PROFILE = flags.DEFINE_enum(
  "profile",
  "peft",
  ["peft", "vllm"],
  "Who will load the adapter.",
  flag_values=_FLAGS,
)
_FORMAT = flags.DEFINE_multi_enum(
  "format",
  ["peft"],
  list(EXTRACTED),
  "Written besides the PEFT folder, into its formats/; may be repeated. Of "
  "models of JAX qwix, tunix and maxtext, instead of it.",
  flag_values=_FLAGS,
)
_EQUATION = flags.DEFINE_multi_string(
  "equation",
  None,
  "REGEX=EINSUM, may be repeated: for qwix and tunix, as jlora adapter has it.",
  flag_values=_FLAGS,
)
_VOCABULARY = flags.DEFINE_enum(
  "vocabulary",
  "whole",
  ["whole", "common", "error"],
  "A table whose number of rows changed: keep the finetuned one whole, compare "
  "the common rows, or stop.",
  flag_values=_FLAGS,
)
_OPENING = define_opening(_FLAGS)
_UNMATCHED = flags.DEFINE_bool(
  "allow_unmatched",
  False,
  "Go on where more than a tenth of a checkpoint has no partner.",
  flag_values=_FLAGS,
)
_FACTOR = flags.DEFINE_enum(
  "factor",
  "krylov",
  ["krylov", "gram", "svd"],
  "The factoriser.",
  flag_values=_FLAGS,
)
_BASE_MODEL = flags.DEFINE_string(
  "base_model",
  None,
  "Name of the base in the adapter. By default its Hub id, where that is "
  "known, else the name of its folder.",
  flag_values=_FLAGS,
)
_TASK = flags.DEFINE_enum(
  "task_type",
  "auto",
  ["auto", "none", *TASK_TYPES],
  "PEFT's name of what the model does; auto reads it from config.json.",
  flag_values=_FLAGS,
)
_RENAME = flags.DEFINE_multi_string(
  "rename",
  None,
  "REGEX=TO, may be repeated: for names of modules that config.json does not "
  "tell. Applied in turn, to names as transformers has them.",
  flag_values=_FLAGS,
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Go on with an unfinished run.", flag_values=_FLAGS
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite",
  False,
  "Replace an adapter that is in the output folder.",
  flag_values=_FLAGS,
)
_VERIFY = flags.DEFINE_bool(
  "verify",
  False,
  "Load the adapter in PEFT and compare every module with the finetune.",
  flag_values=_FLAGS,
)
_SPLIT = flags.DEFINE_float(
  "split_mib",
  2048,
  "A matrix that is larger in float32 is factored on all devices together.",
  flag_values=_FLAGS,
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print report.json, not tables.", flag_values=_FLAGS
)
_CACHE = flags.DEFINE_string(
  "cache",
  None,
  "Folder of compiled programs; ~/.cache/jlora by default.",
  flag_values=_FLAGS,
)

_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT that process 0 can listen on; the same for all processes. Not "
  "needed on TPU pods and under srun or mpirun.",
  flag_values=_FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "How many processes there are; 1: this one is alone, whatever the "
  "environment says.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "Which one this is, from 0.",
  lower_bound=0,
  flag_values=_FLAGS,
)

_PROFILES = {"peft": PEFT, "vllm": VLLM}
_FACTORS = {
  "krylov": krylov,
  "gram": gram,
  "svd": svd,
}
_VOCABULARIES = {
  "whole": keep_whole,
  "common": common_rows,
  "error": same_rows,
}
_POLICIES: dict[str, Callable[[ranks.Spectra], dict[str, int]] | None] = {
  "fixed": None,
  "energy": lambda s: ranks.energy(s.values, s.norms, _ENERGY.value),
  "ratio": lambda s: ranks.ratio(s.values, _RATIO.value),
  "noise": lambda s: ranks.above_floor(s.values, s.floors),
  "budget": lambda s: ranks.budget(
    s.values, s.unit_bytes, int((_BUDGET.value or 0) * 2**20)
  ),
}
# What all processes of a run must be given alike; paths may differ.
_SHARED = (
  *(_RANK, _POLICY, _ENERGY, _RATIO, _BUDGET, _SELECT, _EXCLUDE, _DTYPE),
  *(_PROFILE, _VOCABULARY, _FACTOR, _BASE_MODEL, _RESUME, _OVERWRITE, _SPLIT),
  _UNMATCHED,
  *(_FORMAT, _EQUATION),
  *(_TASK, _RENAME, _WHOLE),
  *(_CONV_RANK, *_OPENING.values()),
)


def main(words: Sequence[str]) -> None:
  """Runs the extraction and prints its tables.

  Args:
    words: those that are no flags; there should be none.

  Raises:
    ValueError: bad input.
  """
  if words:
    raise ValueError(f"only flags are taken, got {' '.join(words)}")
  try:
    _run()
  except LostProcess as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # at an ordinary exit JAX would wait for the lost process


def _run() -> None:
  if _VERIFY.value:
    check_verifiable(_BASE.value, read_opening(_OPENING))
  keep_compilations(_CACHE.value)
  process = clusters.join(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  check_same_facts({flag.name: flag.value for flag in _SHARED})
  opening = read_opening(_OPENING)
  check_names(_BASE.value, _FORMAT.value, opening)
  equations = read_equations(_EQUATION.value)
  state = _FORMAT.value[0]
  has_state = is_state_run(_BASE.value, _FORMAT.value, opening)
  more: dict[str, Any] = {}
  if has_state:
    more["save"] = saver_of(state, equations, jnp.dtype(_DTYPE.value))
  elif equations:
    raise ValueError("--equation is for --format=qwix and tunix of JAX models.")
  report = extract_checkpoint(
    _BASE.value,
    _FINETUNED.value,
    _OUT.value,
    rank=_RANK.value,
    conv_rank=_CONV_RANK.value,
    policy=_POLICIES[_policy()],
    factor=_FACTORS[_FACTOR.value],
    select=_selector(),
    vocabulary=_VOCABULARIES[_VOCABULARY.value],
    profile=_PROFILES[_PROFILE.value],
    dtype=jnp.dtype(_DTYPE.value),
    base_model=_BASE_MODEL.value,
    task_type=None if _TASK.value == "none" else _TASK.value,
    rename=_renamings(),
    whole=_WHOLE.value,
    **opening,
    **more,
    resume=_RESUME.value,
    overwrite=_OVERWRITE.value,
    split_bytes=int(_SPLIT.value * 2**20),
    allow_unmatched=_UNMATCHED.value,
  )
  if process:
    return
  verdict = None
  if _VERIFY.value:
    verdict, report = record(_OUT.value, report, _BASE.value, _FINETUNED.value)
  loading = loading_of(_OUT.value, state) if has_state else None
  write_card(_OUT.value, report, _command(), loading=loading)
  if _JSON.value:
    print(json.dumps(report._asdict()))
  else:
    _print_report(report)
  if has_state:
    written = [check_written(_OUT.value, state)]
  else:
    written = write_formats(
      _OUT.value,
      _BASE.value,
      _FORMAT.value,
      opening,
      with_kernels=_CONV_RANK.value is not None,
    )
  for line in written:
    print(line, file=sys.stderr if _JSON.value else sys.stdout)
  if verdict:
    raise_if_wrong(verdict)


def _print_report(report: Report) -> None:
  """Prints a report's tables and lines."""
  if line := unmatched_line(report.totals):
    print(line, end="\n\n")
  print(type_table(report), end="\n\n")
  print(worst_table(report), end="\n\n")
  if line := larger_line(report):
    print(line)
  print(rounding_line(report))
  print(ledger_lines(report))
  print(verified_line(report))
  print(f"\nwritten: {_OUT.value}")


def _renamings() -> list[tuple[str, str]]:
  """Splits the renamings at their last equals sign; a regex can have others."""
  words = [each.rpartition("=") for each in _RENAME.value or ()]
  pairs = [(regex, to) for regex, _, to in words]
  for regex, _ in pairs:
    try:
      if not regex:
        raise ValueError("it must be REGEX=TO")
      re.compile(regex)
    except (ValueError, re.error) as error:
      raise ValueError(f"--rename={regex!r}: {error}") from None
  return pairs


def _policy() -> str:
  """Returns the policy's name; a budget need not be named twice."""
  if _BUDGET.value is None:
    if _POLICY.value == "budget":
      raise ValueError("--policy=budget needs --budget_mib.")
    return _POLICY.value
  if _POLICY.value not in ("fixed", "budget"):
    raise ValueError(f"--budget_mib does not go with --policy={_POLICY.value}.")
  return "budget"


def _selector() -> Callable[[str, Any], bool]:
  """Returns the selector of the matrices that --select and --exclude leave."""
  named = matching(_SELECT.value, _EXCLUDE.value)
  return functools.partial(_is_selected, named)


def _is_selected(
  named: Callable[[str, Any], bool], path: str, leaf: Any
) -> bool:
  return is_matrix(path, leaf) and named(path, leaf)


# What says how a run was started, or where, and not what it is.
_UNSAID = {
  *("resume", "overwrite", "json", "cache", "verify"),
  *("coordinator", "num_processes", "process_id"),
}


def _command() -> str:
  """Returns the command line that makes this adapter again."""
  words = [
    flag.serialize()
    for name in _FLAGS
    if name not in _UNSAID and not (flag := _FLAGS[name]).using_default_value
  ]
  return f"jlora extract {shlex.join(words)}"


COMMAND = Command(
  "extract",
  main,
  _FLAGS,
  required=("base", "finetuned", "out"),
  groups={
    "Input": {
      "base": "PATH",
      "finetuned": "PATH",
      "select": "REGEX",
      "exclude": "REGEX",
      "whole": "REGEX",
      "vocabulary": "",
      **OPENING,
      "allow_unmatched": "",
    },
    "Rank": {
      "rank": "N",
      "conv_rank": "N",
      "policy": "",
      "budget_mib": "X",
      "energy": "X",
      "ratio": "X",
      "factor": "",
    },
    "Output": {
      "out": "DIR",
      "dtype": "",
      "profile": "",
      "format": "",
      "equation": "REGEX=EINSUM",
      "base_model": "NAME",
      "verify": "",
      "task_type": "",
      "rename": "REGEX=TO",
      "json": "",
    },
    "Run": {
      "resume": "",
      "overwrite": "",
      "split_mib": "X",
      "cache": "DIR",
      "coordinator": "HOST:PORT",
      "num_processes": "N",
      "process_id": "N",
    },
  },
  more="Checkpoints are safetensors or GGUF files, Hugging Face folders, "
  "folders of diffusers' pipelines, Hub ids that were downloaded into the "
  "Hugging Face cache, or orbax directories.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
