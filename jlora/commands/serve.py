# SPDX-License-Identifier: Apache-2.0
"""A base and many adapters behind a server that OpenAI's clients can ask.

  jlora serve --base=DIR --adapters=DIR

Every subfolder of `--adapters` that PEFT could load is a model by its name, and
the base is one by its folder's name. Rows of one batch have adapters of their
own; as many as `--room` are on the device, others in host memory or on disk
until they are asked for.
"""

import asyncio
import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import flags

from jlora.adapting.serving import Room
from jlora.commands import entry
from jlora.commands.caches import keep_compilations
from jlora.commands.help import Command
from jlora.commands.serving.adapters import (
  Adapters,
  Survey,
  open_base,
  shapes_of,
  survey,
)
from jlora.commands.serving.batching import Batcher
from jlora.commands.serving.completions import Limits
from jlora.commands.serving.decoding import Decoder, Sizes, count_compilations
from jlora.commands.serving.text import need, open_tokenizer
from jlora.messages import name_some
from jlora.models.folders import load
from jlora.paths import flatten

if TYPE_CHECKING:
  from jlora.commands.serving.app import Service

_FLAGS = flags.FlagValues()  # apart from those of other commands
_HEADROOM = 16  # the least rank of a room, for what is loaded later


def _integer(name: str, default: int | None, text: str, least: int = 1) -> Any:
  """Defines a flag for an integer."""
  return flags.DEFINE_integer(
    name, default, text, lower_bound=least, flag_values=_FLAGS
  )


def _number(name: str, default: float, text: str):
  """Defines a flag for a number above 0."""
  return flags.DEFINE_float(
    name, default, text, lower_bound=1e-3, flag_values=_FLAGS
  )


_BASE = flags.DEFINE_string(
  "base",
  None,
  "The base's folder, as Hugging Face has them.",
  required=True,
  flag_values=_FLAGS,
)
_ADAPTERS = flags.DEFINE_string(
  "adapters",
  None,
  "A folder of PEFT folders; those loaded later must lie in it, too.",
  required=True,
  flag_values=_FLAGS,
)
_NAME = flags.DEFINE_string(
  "name",
  None,
  "What requests call the base; by default its folder's name.",
  flag_values=_FLAGS,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ["float32", "bfloat16"],
  "Of parameters, adapters and the computation.",
  flag_values=_FLAGS,
)
_ROOM = _integer(
  "room", 64, "Adapters on the device at once; 0 serves the base alone.", 0
)
_RANK = _integer(
  "rank",
  None,
  "The largest rank of an adapter; by default that of those there are, and at "
  f"least {_HEADROOM}.",
)
_MODULES = flags.DEFINE_string(
  "modules",
  None,
  "A regex for the modules that adapters may change; by default those that the "
  "adapters there are do, or all matrices if there are none.",
  flag_values=_FLAGS,
)
_HOST = _number("host_mib", 1024, "Adapters in host memory, in MiB.")
_ROWS = _integer("rows", 8, "Texts that are continued at once.")
_LENGTH = _integer(
  "length", None, "Tokens of a prompt and its answer; by default up to 512."
)
_PIECE = _integer("piece", 32, "Tokens of a prompt that are read at once.")
_STEPS = _integer("steps", 4, "Tokens that are said between two looks around.")
_ADDRESS = flags.DEFINE_string(
  "address",
  "127.0.0.1",
  "Where to listen. Others than this machine's own are reached by anybody: "
  "there is no password.",
  flag_values=_FLAGS,
)
_PORT = _integer("port", 8000, "Where to listen; 0 for any that is free.", 0)
_QUEUE = _integer("queue", 256, "Texts that may wait for a row.")
_PROMPTS = _integer("prompts", 64, "Prompts of one request, at most.")
_PROMPT = _integer(
  "prompt", None, "Tokens of a prompt, at most; by default by the length."
)
_TOKENS = _integer(
  "tokens", None, "The largest max_tokens; by default by the length."
)
_BODY = _number("body_mib", 1, "The largest request, in MiB.")
_TIMEOUT = _number("timeout", 300, "Seconds that a request may take.")
_GRACE = _number(
  "grace", 30, "Seconds that running requests have after SIGTERM."
)
_CACHE = flags.DEFINE_string(
  "cache",
  None,
  "Folder of compiled programs; ~/.cache/jlora by default.",
  flag_values=_FLAGS,
)


def main(words: Sequence[str]) -> None:
  """Serves until it is stopped by SIGTERM or SIGINT.

  Args:
    words: those that are no flags; there should be none.

  Raises:
    ValueError: a base that cannot be read, no adapters' folder, an address that
      cannot be listened on, or packages that are not installed.
  """
  if words:
    raise ValueError(f"only flags are taken, got {' '.join(words)}")
  for module in ("starlette", "uvicorn"):
    need(module)
  # It is written on those packages.
  server = importlib.import_module("jlora.commands.serving.server")
  with contextlib.closing(
    server.bind(_ADDRESS.value, _PORT.value)
  ) as listening:
    keep_compilations(_CACHE.value)
    service = _service(server)
    service.batcher.start()
    service = service._replace(compilations=count_compilations())
    life = server.Life(service, listening, _GRACE.value)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    asyncio.run(_live(life, f"serving: http://{host}:{port}/v1"))
  if service.batcher.failure is not None:
    raise ValueError(f"a program failed: {service.batcher.failure!r}")


async def _live(life: Any, line: str) -> None:
  """Serves, and says where once it does."""
  life.watch_signals()
  await life.serve(lambda: print(line, flush=True))
  print("stopped", flush=True)


def _service(server: Any) -> "Service":
  """Reads the base and its adapters, and makes what answers requests."""
  folder = Path(_BASE.value)
  base = open_base(_BASE.value)
  tokenizer = open_tokenizer(folder)
  model, params = load(folder, dtype=jnp.dtype(_DTYPE.value))
  found = Survey({}, {}, {}, 0)
  if _ROOM.value:
    found = survey(Path(_ADAPTERS.value), base)
  room = Room(
    _shapes(found, flatten(params)) if _ROOM.value else {},
    slots=max(_ROOM.value, 1),
    rank=_RANK.value or max(found.rank, _HEADROOM),
    dtype=_DTYPE.value,
  )
  _say_what_there_is(found, room)
  name = _NAME.value or folder.resolve().name
  nbytes = int(_HOST.value * 2**20)
  adapters = Adapters(Path(_ADAPTERS.value), base, name, found, room, nbytes)
  length = _LENGTH.value or min(512, getattr(model.shape, "positions", 512))
  sizes = Sizes(_ROWS.value, length, _PIECE.value, _STEPS.value)
  batcher = Batcher(Decoder(model, params, sizes), adapters, _QUEUE.value)
  return server.Service(
    batcher,
    adapters,
    tokenizer,
    _ends(base.config),
    _limits(length, model.shape.vocab),
    int(_BODY.value * 2**20),
    _TIMEOUT.value,
    server.hosts_of(_ADDRESS.value),
    int,
  )


def _limits(length: int, vocabulary: int) -> Limits:
  """Returns what a request may ask for."""
  prompt, tokens = _PROMPT.value or length, _TOKENS.value or length
  return Limits(_PROMPTS.value, prompt, tokens, vocabulary)


def _shapes(found: Survey, params: Mapping[str, jax.Array]):
  """Returns the modules of the room."""
  if _MODULES.value is None and found.shapes:
    return found.shapes
  return shapes_of(params, _MODULES.value or "")


def _ends(config: Mapping[str, Any]) -> frozenset[int]:
  """Returns the tokens that end texts, as a config.json has them."""
  given = config.get("eos_token_id")
  return frozenset(
    x for x in (given if isinstance(given, list) else [given]) if type(x) is int
  )


def _say_what_there_is(found: Survey, room: Room) -> None:
  """Prints how many adapters there are, and which cannot be read."""
  size = sum(lora.nbytes for lora in room.bank.values())
  print(
    f"{len(found.folders)} adapters; a room of {room.slots} slots of rank "
    f"{room.rank} for {len(room.shapes)} modules, {size / 2**20:.1f} MiB"
  )
  for name, why in found.damaged.items():
    print(f"left out: {name}: {why}")
  if others := [n for n, x in found.folders.items() if x.is_symlink()]:
    print(f"from elsewhere, by links: {name_some(others)}")


COMMAND = Command(
  "serve",
  main,
  _FLAGS,
  required=("base", "adapters"),
  groups={
    "Input": {
      "base": "DIR",
      "adapters": "DIR",
      "name": "NAME",
      "dtype": "",
      "modules": "REGEX",
      "rank": "N",
    },
    "Memory": {"room": "N", "host_mib": "X", "rows": "N", "length": "N"},
    "Limits": {
      "queue": "N",
      "prompts": "N",
      "prompt": "N",
      "tokens": "N",
      "body_mib": "X",
      "timeout": "X",
    },
    "Run": {
      "address": "HOST",
      "port": "N",
      "grace": "X",
      "piece": "N",
      "steps": "N",
      "cache": "DIR",
    },
  },
  more="For hosting extracted adapters, and comparing them with their "
  "finetunes, on the reference models: every row of a batch has its own "
  "adapter, and its answer does not depend on the others. It is no rival of "
  "vLLM, which has paged caches, kernels and more models: what must be fast is "
  "served from there. Needs jlora[serve]. Routes: /v1/completions, /v1/models, "
  "/v1/load_lora_adapter, /v1/unload_lora_adapter, /health.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
