# SPDX-License-Identifier: Apache-2.0
"""An adapter of any tool: shown, converted, resized, joined.

  jlora adapter show IN
  jlora adapter convert IN --format=kohya --out=FILE
  jlora adapter resize IN --out=FILE --rank=16
  jlora adapter join IN IN --weights=1,0.5 --out=FILE

The format of what is read is found by its keys. One module at a time is in
memory, and no base is needed, but for DoRA, for PEFT folders, and where the
base alone has the names.
"""

import collections
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from jlora import ranks
from jlora.checkpoints.hub import locate
from jlora.checkpoints.sources import check_apart
from jlora.commands import entry
from jlora.commands.adapter_formats import (
  FORMATS,
  Output,
  layers_of,
  left_lines,
)
from jlora.commands.help import COMMANDS, Command
from jlora.commands.states import read_equations
from jlora.formats.adapters import Adapter
from jlora.formats.names import FAMILIES
from jlora.formats.opening import open_adapter
from jlora.loras import Lora
from jlora.merging.adapters.resizing import Joined, Row, resize
from jlora.messages import name_some

_FLAGS = flags.FlagValues()  # apart from those of other commands

_BASE = flags.DEFINE_string(
  "base",
  None,
  "The model that the adapter is for: a folder, a file or a pipeline's folder.",
  flag_values=_FLAGS,
)
_ALLOW = flags.DEFINE_bool(
  "allow_missing",
  False,
  "Leave out modules that the base lacks.",
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  "out", None, "The file, or the folder of PEFT.", flag_values=_FLAGS
)
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  list(FORMATS),
  "What is written; by default what was read.",
  flag_values=_FLAGS,
)
_FAMILY = flags.DEFINE_enum(
  "family",
  None,
  list(FAMILIES),
  "Of the model, where its modules do not tell.",
  flag_values=_FLAGS,
)
_COMPONENT = flags.DEFINE_string(
  "component",
  None,
  "Of the pipeline (unet, transformer, text_encoder), where names do not tell.",
  flag_values=_FLAGS,
)
_LAYERS = flags.DEFINE_enum(
  "layers",
  "all",
  ["all", "linear", "attention", "kohya"],
  "Which modules are written; kohya: those that its own networks have.",
  flag_values=_FLAGS,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float16", "bfloat16", "float32"],
  "Of what is written; by default that of the input if it has 16 bits, else "
  "float16.",
  flag_values=_FLAGS,
)
_ONE_ALPHA = flags.DEFINE_bool(
  "one_alpha",
  True,
  "For kohya, where ranks differ: the largest as alpha of all, as diffusers "
  "needs.",
  flag_values=_FLAGS,
)
_EQUATION = flags.DEFINE_multi_string(
  "equation",
  None,
  "REGEX=EINSUM, may be repeated: for qwix and tunix, the einsum whose second "
  "operand a parameter is, BTD,DNH->BTNH, or dot for another product.",
  flag_values=_FLAGS,
)
_RANK = flags.DEFINE_integer(
  "rank", None, "The largest rank.", lower_bound=1, flag_values=_FLAGS
)
_CONV_RANK = flags.DEFINE_integer(
  "conv_rank",
  None,
  "The largest of convolutions over 1x1; --rank by default.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_WEIGHTS = flags.DEFINE_list(
  "weights", None, "One for each adapter; 1 by default.", flag_values=_FLAGS
)
_SHARE = flags.DEFINE_float(
  "share", None, "For energy, norm and sum: what is kept.", flag_values=_FLAGS
)
_RATIO = flags.DEFINE_float(
  "ratio", None, "For ratio: values over the largest / X.", flag_values=_FLAGS
)
_LEAST = flags.DEFINE_float(
  "threshold", None, "For threshold: values above X.", flag_values=_FLAGS
)
_QUANTILE = flags.DEFINE_float(
  "quantile", None, "For quantile: values above that one.", flag_values=_FLAGS
)
_BUDGET = flags.DEFINE_float(
  "budget_mib", None, "For budget: of all factors.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", flag_values=_FLAGS)


class Choice(NamedTuple):
  """A policy as users name it.

  Attributes:
    ranks: (spectra, the flag's value) -> ranks.
    flag: whose value it needs, None if none.
  """

  ranks: Callable[[Mapping[str, np.ndarray], Any], ranks.Ranks]
  flag: Any = None


def _energy(spectra, share):
  """Keeps a share of each squared norm."""
  norms = {path: float(np.sqrt(np.sum(s**2))) for path, s in spectra.items()}
  return ranks.energy(spectra, norms, share)


_POLICIES = {
  "fixed": Choice(lambda s, _: {path: x.shape[-1] for path, x in s.items()}),
  "energy": Choice(_energy, _SHARE),
  "norm": Choice(ranks.norm, _SHARE),
  "sum": Choice(ranks.total, _SHARE),
  "ratio": Choice(ranks.ratio, _RATIO),
  "threshold": Choice(ranks.above, _LEAST),
  "quantile": Choice(ranks.above_quantile, _QUANTILE),
  "budget": Choice(lambda s, _: {}, _BUDGET),  # needs the shapes: `_policy`
}
_POLICY = flags.DEFINE_enum(
  "policy",
  "fixed",
  list(_POLICIES),
  "How ranks are chosen; norm, sum and ratio are sv_fro, sv_cumulative and "
  "sv_ratio of kohya's script.",
  flag_values=_FLAGS,
)


def main(words: Sequence[str]) -> None:
  """Does what the first word says with the adapters that follow.

  Args:
    words: show, convert, resize or join, and paths.

  Raises:
    ValueError: another word, no path, or as the reader and the writers.
  """
  deeds = {"show": _show, "convert": _convert, "resize": _resize, "join": _join}
  if not words or words[0] not in deeds:
    raise ValueError(
      f"say {', '.join(deeds)}, then the adapter: {COMMANDS['adapter'].example}"
    )
  paths = words[1:]
  if len(paths) != 1 and words[0] in ("convert", "resize"):
    raise ValueError(f"{words[0]} takes one adapter, got {len(paths)}.")
  if not paths:
    raise ValueError(f"{words[0]} needs an adapter's path.")
  _check_used(words[0])
  given = [
    open_adapter(path, _BASE.value, allow_missing=_ALLOW.value)
    for path in paths
  ]
  deeds[words[0]](given)


def _check_used(deed: str) -> None:
  """Raises if numbers are given that the deed does not look at."""
  used = {"resize": [_RANK, _CONV_RANK], "join": [_RANK, _WEIGHTS]}
  known = {flag.name for flag in used.get(deed, [])}
  policy_flag = _POLICIES[_POLICY.value].flag
  if deed == "resize" and policy_flag is not None:
    known.add(policy_flag.name)
  numbers = [_RANK, _CONV_RANK, _WEIGHTS, _SHARE, _RATIO, _LEAST, _QUANTILE,
             _BUDGET]  # fmt: skip
  given = [flag.name for flag in numbers if flag.value is not None]
  if names := [name for name in given if name not in known]:
    policy = f" --policy={_POLICY.value}" if deed == "resize" else ""
    raise ValueError(
      f"{deed}{policy} has no use for {name_some(f'--{n}' for n in names)}."
    )


def _show(given: Sequence[Adapter]) -> None:
  """Prints format, modules, ranks, alphas and bytes, from headers."""
  found = [_described(adapter) for adapter in given]
  if _JSON.value:
    print(json.dumps(found[0] if len(found) == 1 else found))
    return
  for one in found:
    print(
      f"{one['path']}: {one['format']}, family {one['family'] or 'unknown'}"
    )
    print(f"{len(one['modules'])} modules, {one['bytes'] / 2**20:.1f} MiB")
    for what in ("ranks", "alphas"):
      counts = collections.Counter(one[what].values())
      told = ", ".join(
        f"{'none' if value is None else f'{value:g}'} ({count})"
        for value, count in sorted(counts.items(), key=lambda x: -x[1])
      )
      print(f"{what}: {told}")
    if one["whole"]:
      print(
        f"changed as a whole: {len(one['whole'])}, {name_some(one['whole'])}"
      )
    for note in one["notes"]:
      print(note)
    for module, shape in one["modules"].items():
      size = "x".join(map(str, shape))
      print(f"  {module}  {size}  rank {one['ranks'][module]}")


def _described(adapter: Adapter) -> dict[str, Any]:
  """Returns what an adapter's headers tell, as JSON has it."""
  place = Path(adapter.path)
  inside = [*place.glob("*.safetensors")] or (
    one for one in place.rglob("*") if one.is_file()
  )
  files = [place] if place.is_file() else inside
  return {
    "path": str(adapter.path),
    "format": adapter.format,
    "family": adapter.family,
    "modules": {name: list(shape) for name, shape in adapter.shapes.items()},
    "ranks": adapter.ranks,
    "alphas": adapter.alphas,
    "whole": [*adapter.shifts, *adapter.whole],
    "bytes": sum(file.stat().st_size for file in files),
    "notes": [*adapter.notes, *left_lines(adapter.left_out)],
  }


def _convert(given: Sequence[Adapter]) -> None:
  """Writes the adapter in another format."""
  _write(given, given[0], {})


def _resize(given: Sequence[Adapter]) -> None:
  """Writes the adapter at other ranks, and prints them."""
  adapter = given[0]
  if _RANK.value is None and _POLICY.value == "fixed" and not _CONV_RANK.value:
    raise ValueError("resize needs --rank, or a --policy.")
  small, rows, error = resize(adapter, _policy(adapter), most=_most(adapter))
  _write(given, small, {"rows": rows, "error": error})


def _join(given: Sequence[Adapter]) -> None:
  """Writes the weighted sum of adapters: exact, or cut to --rank."""
  words = _WEIGHTS.value or ["1"] * len(given)
  try:
    weights = [float(word) for word in words]
  except ValueError as error:
    raise ValueError(f"--weights must be numbers, got {words}.") from error
  shapes: dict[str, tuple[int, ...]] = {}
  for adapter in given:
    for module, shape in adapter.shapes.items():
      if shapes.setdefault(module, shape) != shape:
        raise ValueError(
          f"{module} is {shapes[module]} in one adapter and {shape} in "
          f"{adapter.path}; they are for different models."
        )
  shifted = [a for a in given if len(a.shifts) or len(a.whole)]
  if shifted and (len(given) > 1 or weights != [1.0]):
    names = [name for a in shifted for name in (*a.shifts, *a.whole)]
    raise ValueError(
      f"{len(names)} changes are stored whole, which join does not add up: "
      f"{name_some(names)}. Convert the adapters without them first."
    )
  _write(given, Joined(given, weights, _RANK.value), {})


def _policy(adapter: Adapter) -> Callable[[Mapping[str, Any]], ranks.Ranks]:
  """Returns the policy that the flags name."""
  choice = _POLICIES[_POLICY.value]
  value = None if choice.flag is None else choice.flag.value
  if choice.flag is not None and value is None:
    raise ValueError(f"--policy={_POLICY.value} needs --{choice.flag.name}.")
  if choice.flag is _BUDGET:
    size = np.dtype(np.float16 if _DTYPE.value != "float32" else np.float32)
    unit = {
      module: size.itemsize * (shape[0] + int(np.prod(shape[1:])))
      for module, shape in adapter.shapes.items()
    }
    most = float(value or 0) * 2**20
    if not 0 < most < np.inf:
      raise ValueError(f"--budget_mib must be above 0, finite; got {value}.")
    return lambda s: ranks.budget(s, unit, int(most))
  return lambda spectra: choice.ranks(spectra, value)


def _most(adapter: Adapter) -> dict[str, int]:
  """Returns the largest rank of each module that has one."""
  conv = _CONV_RANK.value or _RANK.value
  limits = {
    module: conv if np.prod(shape[2:]) > 1 else _RANK.value
    for module, shape in adapter.shapes.items()
  }
  return {module: limit for module, limit in limits.items() if limit}


def _write(
  given: Sequence[Adapter], loras: Mapping[str, Lora], told: dict[str, Any]
) -> None:
  """Writes Loras in the format asked for, and prints what became of them."""
  if _OUT.value is None:
    raise ValueError(f"--out must be given: {COMMANDS['adapter'].example}")
  read = [one.path for one in given]
  base = [] if _BASE.value is None else [locate(_BASE.value)]
  check_apart(_OUT.value, [*read, *base])
  name = _FORMAT.value or _own_format(given[0])
  output = Output(
    path=_OUT.value,
    sources=given,
    base=_BASE.value,
    family=_FAMILY.value or given[0].family,
    component=_COMPONENT.value,
    select=layers_of(_LAYERS.value),
    dtype=np.dtype(_DTYPE.value) if _DTYPE.value else _dtype_of(given),
    one_alpha=_ONE_ALPHA.value,
    equations=read_equations(_EQUATION.value),
  )
  left = FORMATS[name](loras, output)
  left |= {name: reason for a in given for name, reason in a.left_out.items()}
  rows: dict[str, Row] = told.get("rows", {})
  if _JSON.value:
    print(
      json.dumps(
        {
          "written": _OUT.value,
          "format": name,
          "modules": {path: row._asdict() for path, row in rows.items()},
          "error": told.get("error"),
          "not_carried": left,
        }
      )
    )
    return
  for path, row in rows.items():
    print(f"  {path}  rank {row.old} -> {row.new}  kept {row.kept:.4f}")
  if rows:
    print(f"relative error of all modules: {told['error']:.4f}")
  for line in left_lines(left):
    print(line)
  print(f"written: {_OUT.value} ({name})")


def _own_format(adapter: Adapter) -> str:
  """Returns the format to write what was read in again."""
  known = {"PEFT": "peft", "kohya with dots": "comfy", "LoHa": "kohya",
           "LoKr": "kohya", "old diffusers": "diffusers"}  # fmt: skip
  name = known.get(adapter.format, adapter.format)
  if name not in FORMATS:
    raise ValueError(
      f"{adapter.path} is {adapter.format}, which is not written; say another: "
      f"--format={'|'.join(FORMATS)}."
    )
  return name


def _dtype_of(given: Sequence[Adapter]) -> np.dtype:
  """Returns the input's dtype if it has 16 bits, else float16."""
  module = next(iter(given[0]), None)
  if module is None:
    raise ValueError(f"{given[0].path} holds no Loras.")
  own = np.asarray(given[0][module].a).dtype
  return own if own.itemsize == 2 else np.dtype(np.float16)


COMMAND = Command(
  "adapter",
  main,
  _FLAGS,
  required=(),
  groups={
    "Input": {"base": "DIR", "allow_missing": ""},
    "Output": {
      "out": "PATH",
      "format": "",
      "family": "",
      "component": "NAME",
      "layers": "",
      "dtype": "",
      "one_alpha": "",
      "equation": "REGEX=EINSUM",
      "json": "",
    },
    "Ranks (resize, join)": {
      "rank": "N",
      "conv_rank": "N",
      "policy": "",
      "share": "X",
      "ratio": "X",
      "threshold": "X",
      "quantile": "X",
      "budget_mib": "X",
    },
    "Sum (join)": {"weights": "X,X"},
  },
  more="show, convert, resize or join, then the adapter: a file of kohya, "
  "ComfyUI, diffusers or LyCORIS, or a folder of PEFT or mlx-lm. LoHa, LoKr "
  "and Tucker come as the LoRA they equal. resize and join form no dense "
  "change; join is exact without --rank.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
