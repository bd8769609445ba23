# SPDX-License-Identifier: Apache-2.0
"""Reads what mergekit's recipes say of tokenizers and chat templates."""

from collections.abc import Collection, Mapping
from typing import Any

from jlora.checkpoints.documents import shortened
from jlora.merging.checkpoints.recipes import Tokenizer, TokenSource
from jlora.messages import name_some


def read_tokenizer(
  raw: Mapping[str, Any], places: Mapping[str, str]
) -> Tokenizer | None:
  """Reads `tokenizer` or `tokenizer_source` of a recipe.

  Args:
    raw: the recipe.
    places: name of another recipe -> the folder of its result.

  Returns:
    Tokenizer; None if the recipe says nothing of one.

  Raises:
    ValueError: both are given, or anything in them that is not known.

  Example:
    >>> read_tokenizer({"tokenizer_source": "union"}, {})
    Tokenizer(source='union', tokens={}, multiple=1)
  """
  if "tokenizer" in raw and "tokenizer_source" in raw:
    raise ValueError("Give `tokenizer` or `tokenizer_source`, one of the two.")
  if "tokenizer_source" in raw:
    source = raw["tokenizer_source"]
    return Tokenizer(places.get(source, source))
  if "tokenizer" not in raw:
    return None
  given = {key: value for key, value in raw["tokenizer"].items() if value}
  check_keys("tokenizer", given, ("source", "tokens", "pad_to_multiple_of"))
  source, tokens = given.get("source", "union"), given.get("tokens", {})
  multiple = given.get("pad_to_multiple_of", 1)
  if not isinstance(source, str) or not isinstance(tokens, dict):
    raise ValueError("tokenizer has a `source`, a word, and `tokens` by name.")
  if type(multiple) is not int or multiple < 1:
    said = shortened(multiple)
    raise ValueError(f"pad_to_multiple_of is {said}; give 1 or more.")
  return Tokenizer(
    places.get(source, source),
    {str(token): _source(token, one, places) for token, one in tokens.items()},
    multiple,
  )


def _source(
  token: Any, raw: Any, places: Mapping[str, str]
) -> TokenSource | None:
  """Reads where the rows of one token come from; None is by the rules."""
  check_keys(f"token {token}", raw, ("source", "force"))
  given, force = raw.get("source"), raw.get("force", False)
  if type(force) is not bool:
    said = shortened(force)
    raise ValueError(f"force of token {token} is {said}, not true or false.")
  if given is None and not force:
    return None
  if isinstance(given, str):
    return TokenSource(places.get(given, given), force=force)
  if not isinstance(given, dict):
    said = shortened(given)
    raise ValueError(f"source of token {token} is {said}; give a model.")
  if given == {"kind": "zero"}:
    return TokenSource(force=force)
  check_keys(f"token {token}", given, ("kind", "model", "token", "token_id"))
  model, name = given.get("model"), given.get("token")
  number = given.get("token_id")
  if (
    given.get("kind") != "model_token"
    or not isinstance(model, str)
    or (name is None) == (number is None)
    or not isinstance(name, str | None)
    or (number is not None and (type(number) is not int or number < 0))
  ):
    raise ValueError(
      f"source of token {token} is {shortened(given)}; give {{kind: zero}}, or "
      "{kind: model_token, model, and token or token_id}."
    )
  return TokenSource(places.get(model, model), name, number, force)


def check_keys(what: str, raw: Any, known: Collection[str]) -> None:
  """Raises unless a part of a recipe is a mapping of known keys alone.

  Args:
    what: the part, for errors.
    raw: what the recipe has there.
    known: keys.

  Raises:
    ValueError: names up to three keys.

  Example:
    >>> check_keys("a model", {"pathh": "x"}, ["path"])
    Traceback (most recent call last):
    ...
    ValueError: a model has pathh, which is not known; known are path.
  """
  if not isinstance(raw, dict):
    raise ValueError(f"{what} is no mapping: {shortened(raw)}.")
  if unknown := sorted(map(str, set(raw) - set(known))):
    raise ValueError(
      f"{what} has {name_some(unknown)}, which is not known; known are "
      f"{', '.join(known)}."
    )


_ASSISTANT = "{% if add_generation_prompt %}"

#: The formats that recipes name, as templates of Jinja.
CHAT_TEMPLATES = {
  "chatml": (
    "{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}" + _ASSISTANT + "<|im_start|>assistant\n{% endif %}"
  ),
  "alpaca": (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}" + _ASSISTANT + "### Response:\n{% endif %}"
  ),
  "llama3": (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    + _ASSISTANT
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
  ),
  "mistral": (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ m['content'] }} [/INST]{% endif %}{% endfor %}"
  ),
  "exaone": (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}[|system|][|endofturn|]"
    "{{ '\n' }}{% endif %}[|{{ m['role'] }}|]{{ m['content'] }}"
    "{% if m['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\n' }}"
    "{% endfor %}" + _ASSISTANT + "[|assistant|]{% endif %}"
  ),
}


def read_chat_template(raw: Mapping[str, Any]) -> str | None:
  """Reads `chat_template` of a recipe.

  Args:
    raw: the recipe.

  Returns:
    The template itself, `auto`, or None if the recipe says nothing of one.

  Raises:
    ValueError: a word that names no template.

  Example:
    >>> read_chat_template({"chat_template": "{{ messages[0]['content'] }}"})
    "{{ messages[0]['content'] }}"
  """
  given = raw.get("chat_template")
  if given is None or given == "auto" or "{" in given:
    return given
  if given not in CHAT_TEMPLATES:
    raise ValueError(
      f"chat_template {shortened(given)} is none of auto, "
      f"{', '.join(CHAT_TEMPLATES)}, "
      "and no template of Jinja."
    )
  return CHAT_TEMPLATES[given]
