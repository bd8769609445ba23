# SPDX-License-Identifier: Apache-2.0
"""How long does `jlora adapter resize` take, and does its memory stay flat?

  python -m experiments.bench.resize [--layers=8,32] [--rank=96]

Adapters of Llama 3 8B's matrices (PEFT, llama.cpp) and of Flux' wide ones
(kohya), float16, of random numbers, cut to a third of the rank; whole
processes. The base is a file of holes, of which names and shapes are read.
Takes a minute on two cores and 3 GB of disk.
"""

import json
import pathlib
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.lib.machines.processes import measure
from jlora.formats import save_gguf, save_kohya, save_peft
from jlora.loras import Lora

_LAYERS = flags.DEFINE_list("layers", ["8", "32"], "Depths.")
_RANK = flags.DEFINE_integer("rank", 96, "Of the adapters.")

_WIDTH, _INNER, _KEYS = 4096, 14336, 1024
_LLAMA = {
  "self_attn.q_proj": (_WIDTH, _WIDTH),
  "self_attn.k_proj": (_KEYS, _WIDTH),
  "self_attn.v_proj": (_KEYS, _WIDTH),
  "self_attn.o_proj": (_WIDTH, _WIDTH),
  "mlp.gate_proj": (_INNER, _WIDTH),
  "mlp.up_proj": (_INNER, _WIDTH),
  "mlp.down_proj": (_WIDTH, _INNER),
}
_FLUX = {
  "transformer.transformer_blocks.{}.ff.net.0.proj": (12288, 3072),
  "transformer.transformer_blocks.{}.ff.net.2": (3072, 12288),
  "transformer.transformer_blocks.{}.ff_context.net.0.proj": (12288, 3072),
  "transformer.transformer_blocks.{}.ff_context.net.2": (3072, 12288),
}
Shapes = Mapping[str, tuple[int, int]]


def main(words: Sequence[str]) -> None:
  """Prints a table: what was read, and what its cut took."""
  if words[1:]:
    raise app.UsageError(f"only flags are taken, got {' '.join(words[1:])}")
  print("| format | modules | MB | seconds | of processors | peak, MiB |")
  print("|---|---|---|---|---|---|")
  for layers in map(int, _LAYERS.value):
    with tempfile.TemporaryDirectory() as folder:
      for row in _rows(pathlib.Path(folder), layers, _RANK.value):
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def _rows(folder: pathlib.Path, layers: int, rank: int) -> Iterator[list[Any]]:
  """Makes each adapter, cuts it in a process of its own, and yields a row."""
  llama = {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(layers)
    for name, shape in _LLAMA.items()
  }
  config = _write_base(folder / "base", llama, layers)
  like = {
    name: jax.ShapeDtypeStruct(shape, np.float16)
    for name, shape in llama.items()
  }
  flux = {
    name.format(i): shape
    for i in range(layers)
    for name, shape in _FLUX.items()
  }
  loras, more = _draw(llama, rank), [f"--base={folder / 'base'}"]
  save_peft(folder / "peft", loras, like=like)
  yield _measured("peft", folder / "peft", len(llama), rank, more)
  file = folder / "x.gguf"
  save_gguf(file, loras, config=config, like=like, dtype=np.float16)
  yield _measured("gguf", file, len(llama), rank, more)
  file = folder / "x.safetensors"
  save_kohya(file, _draw(flux, rank), like=flux, family="flux")
  yield _measured("kohya", file, len(flux), rank, ["--family=flux"])


def _measured(
  name: str, path: pathlib.Path, count: int, rank: int, more: list[str]
) -> list[Any]:
  """Cuts an adapter to a third of its rank; returns what that took."""
  files = [path] if path.is_file() else [*path.iterdir()]
  out = path.with_name(f"small{path.suffix}")
  words = [sys.executable, "-m", "jlora.commands", "adapter", "resize"]
  words += [str(path), f"--out={out}", f"--rank={rank // 3}", *more]
  used = measure(words, {"JAX_PLATFORMS": "cpu"})
  size = sum(file.stat().st_size for file in files) / 1e6
  seconds = f"{used.wall:.1f}", f"{used.processor:.1f}"
  if out.is_dir():
    out.rename(path.with_name("done"))
  return [name, count, f"{size:.0f}", *seconds, f"{used.peak / 2**20:.0f}"]


def _draw(shapes: Shapes, rank: int) -> dict[str, Lora]:
  """Draws factors out of one pool of numbers."""
  rng = np.random.default_rng(0)
  pool = (0.02 * rng.standard_normal(2**22)).astype(np.float16)

  def factor(width: int) -> Any:
    at = rng.integers(0, pool.size - rank * width)
    return pool[at : at + rank * width].reshape(rank, width)

  one: Any = np.float32(1)
  return {
    name: Lora(factor(shape[1]), factor(shape[0]), one)
    for name, shape in shapes.items()
  }


def _write_base(
  folder: pathlib.Path, shapes: Shapes, layers: int
) -> dict[str, Any]:
  """Writes a base of holes and its config.json, which is returned."""
  folder.mkdir()
  at, header = 0, {}
  for name, shape in shapes.items():
    end = at + 2 * shape[0] * shape[1]
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(folder / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + at)
  config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": layers,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
  }
  (folder / "config.json").write_text(json.dumps(config))
  return config


if __name__ == "__main__":
  app.run(main)
