# SPDX-License-Identifier: Apache-2.0
"""Extractions of JAX's models: states of qwix, tunix and MaxText, and no PEFT.

PEFT has no names for such models, so that a state is what a run writes.
"""

import functools
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.formats.components import open_components
from jlora.formats.maxtext import save_maxtext
from jlora.formats.qwix import save_qwix, save_tunix
from jlora.messages import name_some

#: Format -> its writer. The first two look at `equations`.
_WRITERS: dict[str, Callable[..., dict[str, str]]] = {
  "qwix": save_qwix,
  "tunix": save_tunix,
  "maxtext": save_maxtext,
}
_WITH_EQUATIONS = ("qwix", "tunix")

Saver = Callable[..., dict[str, str]]


def is_jax(names: Iterable[str]) -> bool:
  """Returns whether parameters have the paths of a JAX model, with slashes.

  Args:
    names: of a checkpoint.
  """
  return any("/" in name for name in names)


def check_slashes(base: Checkpoint, name: str) -> None:
  """Raises if the base is no model of JAX.

  Args:
    base: open.
    name: of the format that needs one.

  Raises:
    ValueError: its names have no slashes.
  """
  if not is_jax(base):
    raise ValueError(
      f"{base.path} has the names of PyTorch ({name_some(base, 1)}); {name} "
      "needs the checkpoint of the JAX model, whose paths have slashes. "
      "--format=tunix takes Llama, Qwen 2 and Qwen 3 by transformers' names."
    )


def is_state_run(
  base: str, formats: Sequence[str], opening: Mapping[str, Any]
) -> bool:
  """Returns whether a state is all that an extraction writes.

  Args:
    base: path of the model.
    formats: that are asked for.
    opening: arguments of `open_components`.

  Returns:
    Whether the model is one of JAX and a state of it is asked for. Headers are
    read.

  Raises:
    ValueError: a state of JAX's models for one of PyTorch, or another format
      beside one state.
  """
  asked = [name for name in formats if name in _WRITERS]
  if not asked:
    return False
  model = open_components(base, **opening)
  if not is_jax(model):
    for name in asked:
      if name != "tunix":  # which has a table of transformers' names
        check_slashes(model, name)
    return False
  if others := [name for name in formats if name not in _WRITERS]:
    raise ValueError(
      f"{base} is a model of JAX ({name_some(model, 1)}), of which "
      f"{name_some(others)} has no names: ask for --format={asked[0]} alone."
    )
  if len(set(asked)) > 1:
    raise ValueError(
      f"a run writes one state, and {name_some(asked)} are asked for: make one "
      "of them, and others from it by `jlora adapter convert`."
    )
  return True


def read_equations(texts: Iterable[str] | None) -> dict[str, str]:
  """Reads what --equation says of products.

  Args:
    texts: REGEX=EINSUM each.

  Returns:
    {regex: einsum}.

  Raises:
    ValueError: another form, or no regex.
  """
  found = {}
  for text in texts or ():
    pattern, equals, equation = text.rpartition("=")
    if not equals or not pattern:
      raise ValueError(f"--equation must be REGEX=EINSUM, got {text!r}.")
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"--equation: {pattern!r} is no regex: {error}."
      ) from None
    found[pattern] = equation
  return found


def saver_of(name: str, equations: Mapping[str, str], dtype: Any) -> Saver:
  """Returns what writes the state of an extraction instead of a PEFT folder.

  Args:
    name: of the format.
    equations: as for `save_qwix`.
    dtype: of the factors.

  Returns:
    A function with the arguments of `save_peft`.

  Raises:
    ValueError: equations for a format that does not look at them.
  """
  if equations and name not in _WITH_EQUATIONS:
    raise ValueError(f"--format={name} has no use for --equation.")
  more = {"equations": dict(equations)} if equations else {}
  return functools.partial(_save, name, dtype, more)


def _save(
  name: str,
  storage: Any,
  more: Mapping[str, Any],
  folder: Path,
  loras: Mapping[str, Any],
  *,
  like: Mapping[str, Any],
  biases: Mapping[str, Any],
  full: Mapping[str, Any],
  **of_peft: Any,
) -> dict[str, str]:
  """Writes a state into its folder; returns what it cannot hold."""
  del of_peft
  path = _place(folder, name)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():  # of the run before, which is overwritten
    shutil.rmtree(path)
  shifts = dict.fromkeys((*biases, *full))
  how = {"like": like, "shifts": shifts, "dtype": storage, **more}
  return _WRITERS[name](path, loras, **how)


def _place(folder: str | Path, name: str) -> Path:
  """Returns where a state lies in an output's folder."""
  return Path(folder) / "formats" / name


_LOADING = {
  "qwix": """import orbax.checkpoint as ocp

# for nnx.state(model, nnx.LoRAParam); the arguments of qwix.LoraProvider are in
# {folder}/lora_config.json
state = ocp.StandardCheckpointer().restore("{folder}/state")""",
  "tunix": """from tunix.sft.checkpoint_manager import CheckpointManager

manager = CheckpointManager("{folder}")
manager.maybe_restore(model, restore_only_lora_params=True)""",
  "maxtext": "lora_input_adapters_path={folder}/0/items",
}


def loading_of(folder: str, name: str) -> str:
  """Returns the code that loads a state, for the model's card.

  Args:
    folder: the output's.
    name: of the format.

  Example:
    >>> loading_of("a/out", "maxtext")
    'lora_input_adapters_path=out/formats/maxtext/0/items'
  """
  return _LOADING[name].format(folder=_place(Path(folder).name, name))


def check_written(folder: str, name: str) -> str:
  """Returns a line that says where the state of a finished run is.

  Args:
    folder: the output's.
    name: of the format.

  Raises:
    ValueError: it is gone.
  """
  path = _place(folder, name)
  if not path.is_dir():
    raise ValueError(
      f"{folder} has the report of a finished run, and no {path.name} in its "
      "formats: make it anew, --overwrite."
    )
  return f"written: {path} ({name})"
