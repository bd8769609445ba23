# SPDX-License-Identifier: Apache-2.0
"""What the writers of JAX's LoRA states share: which arrays, and how.

    Lora of path/W  ─►  path/W_lora_a, path/W_lora_b    qwix, tunix
                        path/lora_a.kernel, lora_b.kernel   MaxText

The libraries themselves are not needed: the states of qwix, tunix and MaxText
are trees of arrays, which orbax writes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.new_files import (
  check_new,
  move,
  name_temporary,
  sync_folder,
)
from jlora.checkpoints.sources import check_apart
from jlora.formats.bases import shape_of
from jlora.formats.jax_layouts import (
  Form,
  plain_name,
  stored,
)
from jlora.formats.storing import Select, balanced
from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.numerics.finite import rounded
from jlora.selection import EMBEDDINGS
from jlora.tree_views import table_for
from jlora.views import MatrixView, views_of

#: The JSON beside a state: the arguments of `qwix.LoraProvider`.
RULES = "lora_config.json"
NO_WHOLE = "the state holds LoRAs alone; merge it into a checkpoint"
_TABLE = "a table of tokens: it is looked up, and LoRAs are added to products"


class Part(NamedTuple):
  """A parameter of which a state has both factors.

  Attributes:
    name: in `loras`; None for factors of zeros.
    weight: the parameter's shape.
    view: its axes' roles.
    form: where they go.
    rank: of the stored factors before padding.
  """

  name: str | None
  weight: tuple[int, ...]
  view: MatrixView
  form: Form
  rank: int


def parts_of(
  loras: Mapping[str, Lora],
  like: Mapping[str, Any],
  make_form: Callable[[str, MatrixView], Form],
  views: Any,
  select: Select,
  left: dict[str, str],
) -> dict[str, Part]:
  """Describes what becomes of each Lora.

  Args:
    loras: parameter -> Lora; may be lazy.
    like: parameter -> anything with `.shape`, of the base.
    make_form: (parameter, view) -> where its axes go.
    views: a table of views, None for `table_for`.
    select: which modules, by name and shape.
    left: gets those that are not written, and why.

  Returns:
    {parameter without what containers add: Part}.

  Raises:
    ValueError: malformed Loras, names that `like` lacks, shapes that differ, or
      a product that is not known.
  """
  if not loras:
    raise ValueError("there is no Lora to write.")
  shapes = {plain_name(name): shape_of(x) for name, x in
            getattr(like, "spec", like).items()}  # fmt: skip
  names = {plain_name(name): name for name in loras}
  if lost := [names[path] for path in names if path not in shapes]:
    raise ValueError(
      f"`like` has no {name_some(lost)}; give the base that the Loras are for."
    )
  if len(names) < len(loras):
    raise ValueError(
      f"{len(loras) - len(names)} Loras have the name of another but for "
      "`params/` or `/value`; give one of each parameter."
    )
  matrices = {}
  for path, name in names.items():
    lora = loras[name]
    check_loras({name: lora})
    matrices[path] = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    if re.fullmatch(EMBEDDINGS, path):
      left[name] = _TABLE
    elif not lora.rank:
      left[name] = "rank 0: no change"
    elif not select(path, shapes[path]):
      left[name] = "not among the layers asked for"
  kept = {path: shapes[path] for path in names if names[path] not in left}
  table = views or table_for(shapes)
  found = views_of(kept, table, matrices)
  _check_shapes(kept, found, matrices)
  parts = {}
  for path, weight in kept.items():
    form = make_form(path, found[path])
    spread = [at for at in found[path].batch if at not in form.repeated]
    count = int(np.prod([weight[at] for at in spread], dtype=int))
    rank = count * loras[names[path]].rank
    parts[path] = Part(names[path], weight, found[path], form, rank)
  return parts


def _check_shapes(kept, found, matrices) -> None:
  """Raises unless Loras have the shapes of the parameters' matrices."""
  wrong = []
  for path, weight in kept.items():
    own = found[path].shape(weight) if path in found else None
    if own != matrices[path]:
      wrong.append(f"{path} {weight} is read as {own}, the Lora's is "
                   f"{matrices[path]}")  # fmt: skip
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras are for other matrices: {name_some(wrong)}. Give "
      "the base that they are for, or `views`."
    )


def make_pair(
  part: Part, loras: Mapping[str, Lora], rank: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Makes both stored factors of a parameter.

  Args:
    part: what it is.
    loras: where its Lora is.
    rank: to which both are padded, by zeros.
    dtype: of storage.

  Raises:
    ValueError: entries that the dtype cannot hold.
  """
  if part.name is None:
    one, two = part.form.shapes(part.weight, rank)
    return np.zeros(one, dtype), np.zeros(two, dtype)
  lora = loras[part.name]
  a, b, scale = (
    np.asarray(x, np.float32) for x in (lora.a, lora.b, lora.scale)
  )
  b = scale[..., None, None] * b
  flat = balanced(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
  ones: Any = np.ones_like(scale)
  even = Lora(flat[0].reshape(a.shape), flat[1].reshape(b.shape), ones)  # type: ignore[arg-type]
  pair = stored(even, part.view, part.form, part.weight)
  shapes = part.form.shapes(part.weight, rank)
  found = [
    np.pad(x, [(0, n - own) for n, own in zip(shape, x.shape, strict=True)])
    for x, shape in zip(pair, shapes, strict=True)
  ]
  return (
    rounded(f"{part.name}, a", found[0], dtype),
    rounded(f"{part.name}, b", found[1], dtype),
  )


def check_dtype(dtype: Any) -> None:
  """Raises unless a dtype is floating.

  Args:
    dtype: of storage.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be a floating one, got {np.dtype(dtype)}.")


def check_some(parts: Mapping[str, Any], left: Mapping[str, str]) -> None:
  """Raises if nothing is left to write.

  Args:
    parts: what is written.
    left: what is not, and why.
  """
  if not parts:
    reasons = name_some(f"{name}: {reason}" for name, reason in left.items())
    raise ValueError(f"No parameter is left to write. {reasons}")


def module_pattern(modules: Iterable[str]) -> str:
  """Returns a regex that whole paths of modules match, and no others.

  Args:
    modules: paths with slashes.

  Example:
    >>> module_pattern(["layers/0/q", "layers/1/q", "head"])
    'head|layers/(0|1)/q'
  """
  groups: dict[tuple[str, ...], dict[str, None]] = {}
  for module in sorted(modules):
    # Names apart from their first number, and the number.
    head, number, tail = re.fullmatch(r"((?:\D*?/)?)(\d*)(.*)", module).groups()  # type: ignore[union-attr]
    is_number = number and (not tail or tail.startswith("/"))
    key = (head, tail) if is_number else (module,)
    groups.setdefault(key, {})[number] = None
  found = []
  for key, numbers in groups.items():
    if len(key) == 1:
      found.append(re.escape(key[0]).replace(r"\-", "-"))
      continue
    head, tail = (re.escape(part).replace(r"\-", "-") for part in key)
    ordered = sorted(numbers, key=int)
    middle = ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"
    found.append(head + middle + tail)
  return "|".join(sorted(found))


def write_folder(
  folder: str | os.PathLike, fill: Any, told: Mapping[str, Any]
) -> None:
  """Makes a folder, whole or not at all.

  Args:
    folder: its name, which is new.
    fill: writes what is in it, given a folder.
    told: name of a file -> what it holds as JSON.

  Raises:
    ValueError: it exists.
  """
  folder = Path(folder)
  place = name_temporary(folder)
  place.mkdir(parents=True)
  try:
    fill(place)
    for name, entries in told.items():
      text = json.dumps(entries, indent=2) + "\n"
      (place / name).write_text(text, encoding="utf-8")
    for inner, _, names in os.walk(place):
      for name in names:
        with open(Path(inner, name), "rb") as file:
          os.fsync(file.fileno())
      sync_folder(Path(inner))
    check_new(folder)
    move(place, folder)
    sync_folder(folder.parent)
  except BaseException:
    shutil.rmtree(place, ignore_errors=True)
    raise


def check_output(
  folder: str | os.PathLike, loras: Any, like: Any, dtype: Any
) -> None:
  """Raises before anything is read, if it could not be written.

  Args:
    folder: to be made.
    loras: what is written.
    like: the base.
    dtype: of storage.
  """
  check_dtype(dtype)
  check_new(Path(folder))
  check_apart(folder, [p for x in (loras, getattr(loras, "adapter", None), like)
                       if (p := getattr(x, "path", None))])  # fmt: skip
