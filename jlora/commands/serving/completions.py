# SPDX-License-Identifier: Apache-2.0
"""What `/v1/completions` is asked, checked, and what it answers.

The names are those of OpenAI's API; `ignore_eos` and `return_token_ids` are
vLLM's. What is not done here is an error, never left out in silence.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.documents import (
  COUNT,
  FLAG,
  INTEGER,
  NULL,
  OBJECT,
  SIZE,
  TEXT,
  Kind,
  check_fields,
  either,
  list_of,
  parse_json,
)
from jlora.commands.serving.decoding import Sizes
from jlora.commands.serving.refusals import Refused
from jlora.messages import name_some

_HEAT = Kind(
  "a number from 0 to 2",
  lambda x: type(x) in (int, float) and 0 <= x <= 2,
)
_STOPS = either(TEXT, list_of(TEXT), NULL)
_PROMPTS = either(TEXT, list_of(TEXT), list_of(SIZE), list_of(list_of(SIZE)))
#: Field -> what it may hold.
FIELDS = {
  "model": TEXT,
  "prompt": _PROMPTS,
  "max_tokens": either(COUNT, NULL),
  "temperature": either(_HEAT, NULL),
  "seed": either(INTEGER, NULL),
  "stop": _STOPS,
  "stream": either(FLAG, NULL),
  "stream_options": either(OBJECT, NULL),
  "user": either(TEXT, NULL),
  "ignore_eos": either(FLAG, NULL),
  "return_token_ids": either(FLAG, NULL),
}
#: Field of OpenAI's -> the values that ask for nothing.
NEUTRAL = {
  "best_of": (None, 1),
  "echo": (None, False),
  "frequency_penalty": (None, 0),
  "logit_bias": (None, {}),
  "logprobs": (None,),
  "n": (None, 1),
  "presence_penalty": (None, 0),
  "suffix": (None, ""),
  "top_p": (None, 1),
}
_LOAD = {"lora_name": TEXT, "lora_path": TEXT, "load_inplace": FLAG}
_UNLOAD = {"lora_name": TEXT, "lora_int_id": either(INTEGER, NULL)}
_MOST_STOPS = 4


class Limits(NamedTuple):
  """What a request may ask for at most.

  Attributes:
    prompts: texts of one request.
    prompt: tokens of a prompt.
    tokens: that are said for it.
    vocabulary: of the model.
  """

  prompts: int
  prompt: int
  tokens: int
  vocabulary: int


class Wanted(NamedTuple):
  """A request that was understood.

  Attributes:
    prompts: token ids of each.
    seeds: of each.
  """

  model: str
  prompts: list[list[int]]
  limit: int
  temperature: float
  seeds: list[int]
  stops: list[str]
  is_stream: bool
  counts_usage: bool
  ignores_ends: bool
  returns_ids: bool


def _parse(body: bytes, fields: Mapping[str, Kind], required: Sequence[str]):
  """Parses an object and checks its fields."""
  try:
    text = body.decode("utf-8")
    found = parse_json(text, "the request")
    found = check_fields(found, fields, "the request", required=required)
  except ValueError as error:
    raise Refused(400, "bad_request", str(error)) from error
  others = {name: found[name] for name in found.keys() - fields.keys()}
  wrong = [
    name
    for name, value in sorted(others.items())
    if not any(value == x for x in NEUTRAL.get(name, ()))
  ]
  if wrong:
    raise Refused(
      400,
      "not_supported",
      f"{len(wrong)} fields are not supported with these values: "
      f"{name_some(wrong)}; leave them out.",
    )
  return found


def read_load(body: bytes) -> tuple[str, str, bool]:
  """Reads a request to load an adapter: name, folder, whether to replace."""
  found = _parse(body, _LOAD, ("lora_name", "lora_path"))
  return (
    found["lora_name"], found["lora_path"], found.get("load_inplace", False)
  )  # fmt: skip


def read_unload(body: bytes) -> str:
  """Reads a request to unload an adapter: its name."""
  return _parse(body, _UNLOAD, ("lora_name",))["lora_name"]


def read_completion(
  body: bytes, limits: Limits, sizes: Sizes, tokenizer: Any
) -> Wanted:
  """Reads a request for completions.

  Args:
    body: JSON.
    limits: of what it may ask for.
    sizes: of the programs.
    tokenizer: None if prompts must be token ids.

  Returns:
    Wanted; without a seed each prompt has one drawn by chance.

  Raises:
    Refused: anything that is not supported, or above a limit.
  """
  found = _parse(body, FIELDS, ("model", "prompt"))
  given = {name: x for name, x in found.items() if x is not None}
  limit = given.get("max_tokens", min(16, limits.tokens))
  prompts = _prompts(given["prompt"], tokenizer)
  _check_prompts(prompts, limit, limits, sizes)
  stops = given.get("stop", [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MOST_STOPS or "" in stops or (stops and tokenizer is None):
    raise Refused(
      400,
      "bad_request",
      f"stop has {len(stops)} texts; needed are up to {_MOST_STOPS} that are "
      "not empty, and a base with a tokenizer.",
    )
  seed = given.get("seed")
  if seed is None:
    seed = int.from_bytes(np.random.default_rng().bytes(7), "little")
  options = given.get("stream_options", {})
  return Wanted(
    given["model"],
    prompts,
    limit,
    float(given.get("temperature", 1.0)),
    [seed % 2**64 + i for i in range(len(prompts))],
    stops,
    given.get("stream", False),
    options.get("include_usage") is True,
    given.get("ignore_eos", False),
    given.get("return_token_ids", False),
  )


def _prompts(given: Any, tokenizer: Any) -> list[list[int]]:
  """Returns the token ids of each prompt."""
  if isinstance(given, str) or (given and isinstance(given[0], str)):
    if tokenizer is None:
      raise Refused(
        400,
        "no_tokenizer",
        "The base has no tokenizer.json: give prompts as lists of token ids.",
      )
    texts = [given] if isinstance(given, str) else given
    return [tokenizer.encode(text).ids for text in texts]
  return given if given and isinstance(given[0], list) else [given]


def _check_prompts(
  prompts: list[list[int]], limit: int, limits: Limits, sizes: Sizes
) -> None:
  """Raises unless prompts and their answers are within the limits."""
  longest = max(map(len, prompts), default=0)
  most = max((max(x, default=0) for x in prompts), default=0)
  checks = (
    ("prompts", len(prompts), limits.prompts),
    ("tokens of a prompt", longest, limits.prompt),
    ("max_tokens", limit, limits.tokens),
    ("token id", most, limits.vocabulary - 1),
    ("positions of a prompt and its answer", max(
      (sizes.positions(len(x), limit) for x in prompts), default=0
    ), sizes.length),
  )  # fmt: skip
  wrong = [
    f"{name} {found}, at most {allowed}"
    for name, found, allowed in checks
    if found > allowed
  ]
  if not all(prompts) or not prompts:
    wrong.append("a prompt without tokens")
  if wrong:
    raise Refused(
      400,
      "too_long",
      f"The request is beyond what is served: {name_some(wrong)}.",
    )


class Answer(NamedTuple):
  """One choice of a completion, or a piece of it.

  Attributes:
    end: "stop" or "length", None for a piece that is not the last.
  """

  index: int
  text: str
  tokens: list[int]
  end: str | None


def head_of(model: str) -> dict[str, Any]:
  """Returns what all answers to one request begin with."""
  return {
    "id": f"cmpl-{uuid.uuid4().hex}",
    "object": "text_completion",
    "created": int(time.time()),
    "model": model,
  }


def choice_of(answer: Answer, wanted: Wanted, *, is_whole: bool) -> dict:
  """Returns a choice in the form of OpenAI's API."""
  found = {
    "index": answer.index,
    "text": answer.text,
    "logprobs": None,
    "finish_reason": answer.end,
  }
  if wanted.returns_ids:
    found["token_ids"] = answer.tokens
    if is_whole:
      found["prompt_token_ids"] = wanted.prompts[answer.index]
  return found


def usage_of(wanted: Wanted, said: int) -> dict[str, int]:
  """Returns how many tokens were read and said."""
  read = sum(map(len, wanted.prompts))
  return {
    "prompt_tokens": read,
    "completion_tokens": said,
    "total_tokens": read + said,
  }
