# SPDX-License-Identifier: Apache-2.0
"""The small files beside a merge's weights: configuration, tokenizer, template.

They are the reference's, but for what the merge changes: layers, dtypes, a tied
head, tokens and their numbers, the chat template.
"""

import collections
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.documents import (
  NULL,
  OBJECT,
  TEXT,
  either,
  list_of,
  read_object,
  read_text,
  record_of,
)
from jlora.checkpoints.hub import locate
from jlora.checkpoints.merged import config_as, levels_of, set_rows
from jlora.checkpoints.new_files import replace_text
from jlora.checkpoints.sources import copy_files
from jlora.merging.checkpoints.catalogues import HEAD
from jlora.merging.checkpoints.recipes import Recipe
from jlora.merging.checkpoints.tokens import TokenPlan
from jlora.messages import name_some
from jlora.pairing.layer_numbers import configure_layers

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
#: Files that belong to a tokenizer, and go where it goes.
_TOKENIZER_FILES = re.compile(
  r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*"
  r"|merges\.txt|spiece\.model|.*\.tiktoken|sentencepiece.*|chat_template.*"
  r"|tokenization_\w+\.py"
)
_IDS = re.compile(r"(\w+_)?token_(id|index)s?")


class Companions(NamedTuple):
  """What becomes of the small files of a merge's reference.

  Attributes:
    left_out: those that are not copied.
    copied: files of another folder that are.
    texts: name -> content, of those that the merge writes itself.
    notes: what is unusual.
  """

  left_out: frozenset[str] = frozenset()
  copied: tuple[Path, ...] = ()
  texts: Mapping[str, str] = {}
  notes: tuple[str, ...] = ()


def plan_companions(
  recipe: Recipe,
  models: Mapping[str, Any],
  taken: list[int],
  stored: int,
  has_head: bool,
  tokens: TokenPlan | None,
) -> Companions:
  """Decides about the small files of a merge, before anything is written.

  Args:
    recipe: the merge.
    models: name -> open checkpoint, the reference first.
    taken: for each layer of the result, its layer in the reference.
    stored: how many layers the reference has.
    has_head: whether the result has a head of its own.
    tokens: the result's tokens, if rows are merged by token.

  Returns:
    Companions.

  Raises:
    ValueError: layers that the configuration cannot say in the new order, or a
      tokenizer that tokens cannot be added to.
  """
  first = models[recipe.models[0]]
  folder = _folder(first.path)
  texts: dict[str, str] = {}
  notes: list[str] = []
  config = configure(first, recipe.dtype, taken, stored, has_head)
  source, left_out, copied = folder, frozenset(), ()
  if tokens is not None:
    is_own = models.get(tokens.source) is first
    source = folder if is_own else _folder(_place_of(tokens.source, models))
    if not (is_own and Path(first.path).is_dir()):  # else they go along
      copied = tuple(_tokenizer_files(source))
      left_out = frozenset(file.name for file in _tokenizer_files(folder))
    if not is_own:
      notes += _renumber(config, folder, source, tokens, texts)
    set_rows(config, tokens.height, tokens.rows, first.path)
    if tokens.added:
      texts |= _with_added(source, tokens, models)
  if config:
    texts[_CONFIG] = _as_json(config)
  if recipe.chat_template is not None:
    found, said = _template_of(recipe, models)
    notes += said
    if found is not None:
      texts |= _with_template(source, found, texts)
  return Companions(left_out, copied, texts, tuple(notes))


def place_companions(companions: Companions, out: Path) -> None:
  """Writes a merge's small files over those copied from the reference.

  Args:
    companions: from `plan_companions`.
    out: the folder of the result.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   place_companions(Companions(texts={"a.json": "{}"}), Path(tmp))
    ...   Path(tmp, "a.json").read_text()
    '{}'
  """
  for name in companions.left_out:
    (out / name).unlink(missing_ok=True)
  copy_files(companions.copied, out)
  for name, text in companions.texts.items():
    replace_text(out / name, text)


def configure(
  first: Any,
  dtype: str | None,
  taken: list[int],
  stored: int,
  has_head: bool,
) -> dict[str, Any]:
  """Returns config.json with changed layers, dtypes and tied head.

  Args:
    first: the reference, an open checkpoint.
    dtype: of the result's floating tensors; None is the reference's.
    taken: for each layer of the result, its layer in the reference.
    stored: how many layers the reference has.
    has_head: whether the result has a head of its own.

  Raises:
    ValueError: as `configure_layers`.
  """
  config = config_as(getattr(first, "base", first), dtype)
  if config and taken:
    config = configure_layers(config, taken, stored)
  if config and has_head and HEAD not in first.spec:
    # Many model types are tied where their configuration says nothing.
    for level in (config, config.get("text_config")):
      if isinstance(level, dict):
        level["tie_word_embeddings"] = False
  return config


def stem_of(model: Any) -> str:
  """Returns what the names of a folder's files of weights begin with.

  Args:
    model: an open checkpoint; of a file or anything but a folder of
      safetensors files the answer is `model`.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/diffusion_pytorch_model.safetensors"
    ...   write_safetensors(file, {"w": np.ones(1)})
    ...   stem_of(open_checkpoint(tmp)), stem_of(open_checkpoint(file))
    ('diffusion_pytorch_model', 'model')
  """
  own = getattr(model, "base", model)
  if not Path(own.path).is_dir():
    return "model"
  files = {one.file for one in own.spec.values()} - {None}
  stems = {re.sub(r"-\d+-of-\d+", "", file.stem) for file in files}
  return stems.pop() if len(stems) == 1 else "model"


def _folder(path: Any) -> Path:
  """Returns the folder that a checkpoint's small files lie in."""
  path = Path(path)
  return path if path.is_dir() else path.parent


def _place_of(name: str, models: Mapping[str, Any]) -> Path:
  """Returns the path of a model, or of a folder that is none."""
  return Path(models[name].path) if name in models else locate(name)


def _tokenizer_files(folder: Path) -> list[Path]:
  """Lists the files of a folder that belong to its tokenizer."""
  return sorted(
    file
    for file in folder.iterdir()
    if file.is_file() and _TOKENIZER_FILES.fullmatch(file.name)
  )


def _as_json(value: Any) -> str:
  """Returns the text of a JSON file."""
  return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# What is read of a tokenizer_config.json.
_SETTINGS_FIELDS = {
  "added_tokens_decoder": either(OBJECT, NULL),
  "chat_template": either(
    TEXT, list_of(record_of({"name": TEXT, "template": TEXT})), OBJECT, NULL
  ),
}


def _read(file: Path) -> dict[str, Any]:
  """Reads a file of JSON; an empty mapping where there is none."""
  fields = _SETTINGS_FIELDS if file.name == _SETTINGS else {}
  return read_object(file, fields) if file.exists() else {}


def _renumber(
  config: dict[str, Any],
  folder: Path,
  source: Path,
  tokens: TokenPlan,
  texts: dict[str, str],
) -> list[str]:
  """Gives special tokens their numbers in another tokenizer.

  Those that it does not have become what its own folder's files say.
  """
  numbers = {token: number for number, token in tokens.tokens.items()}
  lost: dict[str, None] = {}

  def number_of(key, number, other):
    if type(number) is not int or number < 0:
      return number
    token = tokens.before.get(number)
    if token in numbers:
      return numbers[token]
    if other.get(key) is None:
      lost[f"{key} {number}"] = None
    return other.get(key)

  def renumber(level, other):
    for key, value in list(level.items()):
      if not _IDS.fullmatch(key):
        continue
      if isinstance(value, list):
        found = [number_of(key, one, {}) for one in value]
        level[key] = [one for one in found if one is not None] or other.get(key)
      else:
        level[key] = number_of(key, value, other)

  for level in levels_of(config):
    renumber(level, _read(source / _CONFIG))
  generation = _read(folder / _GENERATION)
  if generation:
    renumber(generation, _read(source / _GENERATION))
    texts[_GENERATION] = _as_json(generation)
  if not lost:
    return []
  return [
    f"{name_some(lost)} of the configuration are tokens that {tokens.source} "
    "does not have; set to null"
  ]


def _with_added(
  source: Path, tokens: TokenPlan, models: Mapping[str, Any]
) -> dict[str, str]:
  """Returns a tokenizer's files with further tokens in them."""
  raw = _read(source / _TOKENIZER)
  if not raw:
    raise ValueError(
      f"{source} has no tokenizer.json, so that tokens cannot be added to it: "
      f"{name_some(tokens.added)}. Save it with transformers."
    )
  known: dict[str, Any] = {}
  for model in models.values():
    others = _read(_folder(model.path) / _TOKENIZER).get("added_tokens") or []
    for one in others:
      known.setdefault(one["content"], one)
  numbers = {token: number for number, token in tokens.tokens.items()}
  entries = [
    {**_ADDED, **known.get(token, {}), "content": token, "id": numbers[token]}
    for token in tokens.added
  ]
  raw["added_tokens"] = [*(raw.get("added_tokens") or []), *entries]
  texts = {_TOKENIZER: json.dumps(raw, indent=2, ensure_ascii=False) + "\n"}
  settings = _read(source / _SETTINGS)
  if settings.get("added_tokens_decoder") is not None:
    settings["added_tokens_decoder"] |= {
      str(one["id"]): {key: one[key] for key in (*_ADDED, "content")}
      for one in entries
    }
    texts[_SETTINGS] = _as_json(settings)
  more = _read(source / "added_tokens.json")
  if more:
    more |= {one["content"]: one["id"] for one in entries}
    texts["added_tokens.json"] = _as_json(more)
  return texts


# What a tokenizer does with an added token that is an ordinary word elsewhere.
_ADDED = {
  "lstrip": False,
  "normalized": True,
  "rstrip": False,
  "single_word": False,
  "special": False,
}


def _template_of(
  recipe: Recipe, models: Mapping[str, Any]
) -> tuple[str | None, list[str]]:
  """Returns the result's chat template, and what is to be said of it."""
  if recipe.chat_template != "auto":
    return recipe.chat_template, []
  found = {name: _own_template(model) for name, model in models.items()}
  given = [one for one in found.values() if one is not None]
  if not given:
    return None, ["chat_template auto: no model has one"]
  (most, count), *rest = collections.Counter(given).most_common()
  if not rest:
    return most, []
  having = [name for name, one in found.items() if one == most]
  return most, [
    f"chat_template auto: {count} of {len(given)} models have that of "
    f"{having[0]}"
  ]


def _own_template(model: Any) -> str | None:
  """Reads a model's chat template; None if it has none."""
  folder = _folder(model.path)
  if (folder / _TEMPLATE).is_file():
    return read_text(folder / _TEMPLATE)
  given = _read(folder / _SETTINGS).get("chat_template")
  if isinstance(given, list):  # several, by name
    named = {one["name"]: one["template"] for one in given}
    given = named.get("default")
  return given if isinstance(given, str) else None


def _with_template(
  source: Path, template: str, texts: Mapping[str, str]
) -> dict[str, str]:
  """Returns the files that hold a chat template, old ones and new."""
  found = {_TEMPLATE: template}
  text = texts.get(_SETTINGS)
  settings = json.loads(text) if text else _read(source / _SETTINGS)
  if "chat_template" in settings:
    found[_SETTINGS] = _as_json({**settings, "chat_template": template})
  return found
