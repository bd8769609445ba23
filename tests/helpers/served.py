# SPDX-License-Identifier: Apache-2.0
"""A tiny base with a tokenizer, adapters for it, and a server of both."""

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import openai
import tokenizers

import jlora
from jlora import models
from jlora.adapting.serving import Room
from jlora.commands.serving import app, server
from jlora.commands.serving.adapters import Adapters, open_base, survey
from jlora.commands.serving.batching import Batcher
from jlora.commands.serving.completions import Limits
from jlora.commands.serving.decoding import (
  Decoder,
  Sizes,
  count_compilations,
)
from jlora.commands.serving.text import open_tokenizer
from jlora.loras import Lora
from jlora.paths import flatten

VOCABULARY, END = 60, 44
CONFIG = {
  "model_type": "llama",
  "vocab_size": VOCABULARY,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "eos_token_id": END,
}
SIZES = Sizes(rows=4, length=48, piece=8, steps=3)
WORDS = [f"w{i}" for i in range(VOCABULARY)]


def write_base(folder: Path) -> Path:
  """Writes a random base, of which each word is a token."""
  _, params = models.init(CONFIG, jax.random.key(0))
  draw = np.random.default_rng(0).standard_normal
  params = jax.tree.map(lambda x: x + draw(x.shape, np.float32), params)
  models.save(folder, params, CONFIG)
  kind = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "w0")
  tokenizer = tokenizers.Tokenizer(kind)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def draw_adapter(params: Any, rank: int, seed: int) -> dict[str, Lora]:
  """Draws an adapter that changes what is said: all layers' matrices."""
  in_layers = ("layers/", "h/")
  draw = np.random.default_rng(seed).standard_normal
  return {
    path: Lora(
      draw((rank, leaf.shape[0]), np.float32),
      draw((rank, leaf.shape[1]), np.float32),
      np.float32(0.3),
    )
    for path, leaf in flatten(params).items()
    if path.startswith(in_layers) and path.endswith("kernel")
  }


def write_adapters(folder: Path, params: Any, count: int) -> dict[str, Any]:
  """Writes adapters a0, a1, ... of ranks 1 to 4; returns them."""
  found = {f"a{i}": draw_adapter(params, 1 + i % 4, i) for i in range(count)}
  for name, loras in found.items():
    write_adapter(folder / name, params, loras)
  return found


def write_adapter(folder: Path, params: Any, loras: dict[str, Lora]) -> None:
  """Writes an adapter as PEFT would."""
  jlora.save_peft(
    folder,
    loras,
    like=flatten(params),
    rename=models.hf_name,
    model_type="llama",
  )


class Running(NamedTuple):
  """A server in a thread of its own.

  Attributes:
    url: of its API.
  """

  url: str
  service: app.Service
  life: server.Life
  thread: threading.Thread

  def client(self, **options) -> openai.OpenAI:
    """A client of it, that asks once."""
    options = {"max_retries": 0, "timeout": 60, **options}
    return openai.OpenAI(base_url=self.url, api_key="none", **options)


@contextlib.contextmanager
def running(
  base: Path, adapters: Path, *, room=3, queue=64, timeout=60, **rest
):
  """Serves a base and adapters until the end of a block."""
  known = open_base(str(base))
  model, params = models.load(base)
  found = survey(adapters, known)
  slots = Room(found.shapes, slots=room, rank=4)
  names = Adapters(adapters, known, "base", found, slots, 2**20)
  sizes = rest.get("sizes", SIZES)
  batcher = Batcher(Decoder(model, params, sizes), names, queue)
  batcher.start()
  service = app.Service(
    batcher,
    names,
    open_tokenizer(base),
    frozenset([END]),
    Limits(8, 24, 32, VOCABULARY),
    2**16,
    timeout,
    server.hosts_of("127.0.0.1"),
    count_compilations(),
  )
  listening = server.bind("127.0.0.1", 0)
  life = server.Life(service, listening, rest.get("grace", 10))
  ready = threading.Event()
  thread = threading.Thread(
    target=lambda: asyncio.run(life.serve(ready.set)), name="server"
  )
  thread.start()
  try:
    assert ready.wait(60)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    yield Running(url, service, life, thread)
  finally:
    life.stop()
    thread.join(60)
    listening.close()
  assert not thread.is_alive()
