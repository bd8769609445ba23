# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Hugging Face model folders: config.json and weights."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jlora.checkpoints import documents
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.new_files import new_folder, replace_file, replace_text
from jlora.checkpoints.safetensors import write_safetensors
from jlora.messages import name_some
from jlora.models import names, networks
from jlora.models.placement import RULES, place_leaf, rules_for
from jlora.numerics.meshes import automatic
from jlora.paths import flatten
from jlora.sharding import Rules, assign

Folder = str | os.PathLike[str]


def read_config(folder: Folder) -> dict[str, Any]:
  """Reads a folder's `config.json`.

  Args:
    folder: a Hugging Face model folder.

  Returns:
    A dict.

  Raises:
    ValueError: if the folder has no such file, or it is damaged.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   text = '{"model_type": "llama"}'
    ...   _ = pathlib.Path(folder, "config.json").write_text(text)
    ...   read_config(folder)
    {'model_type': 'llama'}
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.exists():
    raise ValueError(f"{path} is missing: not a Hugging Face model folder")
  return documents.read_config(path)


def load(
  folder: Folder,
  *,
  dtype: Any = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  rules: Rules = RULES,
) -> tuple[networks.Model, networks.Params]:
  """Loads the model in a Hugging Face folder: its function and its parameters.

  Covers Llama, SmolLM, Mistral, Mixtral, Qwen2, Qwen3 and GPT-2. Logits of tiny
  random models are within 1e-5 of those of transformers 5.23 in float32. In
  bfloat16 they are off by 1.5 to 1.9% (root mean squares), GPT-2's by 1%,
  Mixtral's by 5 to 8%, because a rounded score can choose another expert; those
  of transformers are off by 1.6 to 1.9%, 1% and 4 to 8%.

  Reads one tensor at a time, so memory holds little more than the parameters.

  Args:
    folder: holds `config.json` and safetensors weights, in one file or several.
      Mixtral's experts may be separate tensors, or fused in one as transformers
      5 holds them in memory.
    dtype: of the parameters, rounded once, and of the computation.
    mesh: devices to place the parameters on, each shard read separately. Its
      axes become Auto, so the compiler places intermediate results. None puts
      the parameters whole on the default device.
    rules: (regex for a whole path, PartitionSpec); the first match counts, and
      a leaf without one is whole on every device. The default rules shard the
      width of every MLP, the heads, and the vocabulary over an axis "model".

  Returns:
    `apply(params, tokens) -> logits`, pure, and the nested dict of parameters
    with kernels (in, out) at paths like `layers/0/attn/q/kernel`.

  Raises:
    ValueError: the config is not covered, names or shapes of the tensors are
      not those of the config, or the rules do not fit the mesh.

  Example:
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> _, params = networks.init(config, jax.random.key(0))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = save(f"{folder}/model", params, config)
    ...   apply, loaded = load(path)
    >>> bool((loaded["norm"]["scale"] == params["norm"]["scale"]).all())
    True
  """
  config = read_config(folder)
  checkpoint = open_checkpoint(folder)
  try:
    apply = networks.build(config, dtype=dtype)
    sources = names.find_sources(
      {name: spec.shape for name, spec in checkpoint.spec.items()}
    )
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error
  if apply.shape.tied and (head := sources.pop("head/kernel", None)):
    _check_tied(head, sources, checkpoint, folder)
  shapes = {path: source.shape for path, source in sources.items()}
  if apply.shape.layers > len(shapes):  # to lay them out would take long
    raise ValueError(
      f"{folder}: config.json asks for {apply.shape.layers} layers, and there "
      f"are {len(shapes)} weights; fetch the folder again"
    )
  _check_shapes(shapes, _expected(apply), folder)
  rules = rules_for(shapes) if rules is RULES else rules
  # Auto axes: the networks do not specify shardings of their products.
  shardings = assign(shapes, automatic(mesh), rules) if mesh else {}
  flat = {
    path: place_leaf(checkpoint, source, dtype, shardings.get(path))
    for path, source in sources.items()
  }
  return apply, traverse_util.unflatten_dict(flat, sep="/")


def _expected(apply: networks.Model) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by its path."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  params = jax.eval_shape(apply.network.init, jax.random.key(0), tokens)
  return {path: leaf.shape for path, leaf in flatten(params["params"]).items()}


def _check_tied(
  head: names.LeafSource,
  sources: Mapping,
  checkpoint: Checkpoint,
  folder: Folder,
) -> None:
  """Raises if a tied model's separate head differs from the embedding."""
  embedding = next(
    sources[path].name
    for path in ("embed/embedding", "wte/embedding")
    if path in sources
  )
  if not np.array_equal(checkpoint[head.name], checkpoint[embedding]):
    raise ValueError(
      f"{folder}: config.json ties the embeddings, but {head.name} differs "
      f"from {embedding}; set tie_word_embeddings to false"
    )


def _check_shapes(found: Mapping, expected: Mapping, folder: Folder) -> None:
  """Raises unless the paths and shapes found are those expected."""
  wrong = [
    f"{names.to_hf(path)[0]} {found.get(path)} for {expected.get(path)}"
    for path in sorted(found.keys() | expected.keys())
    if found.get(path) != expected.get(path)
  ]
  if wrong:
    raise ValueError(
      f"{folder}: {len(wrong)} weights are not those config.json asks for, "
      f"as (in, out): {name_some(wrong)}; fetch the folder again"
    )


def save(
  folder: Folder,
  params: networks.Params,
  config: Mapping,
  *,
  copy: Iterable[Folder] = (),
) -> pathlib.Path:
  """Writes a folder that `load` and transformers read; returns its path.

  The folder appears whole or not at all: it is written under another name and
  renamed.

  Args:
    folder: must not exist yet.
    params: nested dict as `load` returns it, written in its own dtype.
    config: the content of `config.json`.
    copy: files to place beside the weights, the tokenizer's for example.

  Returns:
    The folder.

  Raises:
    ValueError: if the folder exists, or a path has no Hugging Face name.

  Example:
    >>> params = {"norm": {"scale": jnp.ones(3)}}
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   written = save(f"{folder}/model", params, {"model_type": "llama"})
    ...   dict(open_checkpoint(written)), read_config(written)["dtype"]
    ({'model.norm.weight': array([1., 1., 1.], dtype=float32)}, 'float32')
  """
  tensors = {}
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    name, transposed = names.to_hf(path)
    array = np.asarray(leaf)
    tensors[name] = np.ascontiguousarray(array.T if transposed else array)
  dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
  config = dict(config, dtype=dtypes[0])
  files = {
    "config.json": json.dumps(config, indent=2) + "\n",
    **{pathlib.Path(file).name: pathlib.Path(file) for file in copy},
  }
  return write_folder(folder, tensors, files)


def write_folder(
  folder: Folder,
  tensors: Mapping[str, np.ndarray],
  files: Mapping[str, str | pathlib.Path],
) -> pathlib.Path:
  """Writes `model.safetensors` and files as a new folder, whole or not at all.

  Args:
    folder: must not exist yet; its parents are made.
    tensors: name -> array, torch's orientation, contiguous.
    files: file name -> its text, or a file to copy.

  Returns:
    The folder.

  Raises:
    ValueError: if the folder exists.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   new = write_folder(f"{folder}/new", {}, {"note.txt": "text"})
    ...   sorted(path.name for path in new.iterdir())
    ['model.safetensors', 'note.txt']
  """
  folder = pathlib.Path(folder)
  with new_folder(folder) as work:
    write_safetensors(
      work / "model.safetensors", tensors, metadata={"format": "pt"}
    )
    for name, content in files.items():
      if isinstance(content, str):
        replace_text(work / name, content)
      else:
        replace_file(work / name, [content.read_bytes()])
  return folder
