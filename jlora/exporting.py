# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT folders and as merged checkpoints, and PEFT folders back.

    Loras, biases, full         ─► save_peft   ─► adapter folder ─► load_peft
    base, Loras, biases, full   ─► save_merged ─► checkpoint folder

Scales are folded into the factors and `r == lora_alpha == max rank`, with
`rank_pattern == alpha_pattern`: a reader that knows the patterns and one that
only looks at the tensors both come to scale 1.
"""

import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapter_parts import (
  HEAD,
  Base,
  Part,
  Rename,
  describe_base,
  is_transposed,
)
from jlora.adapter_plans import plan_biases, plan_full, plan_loras
from jlora.checkpoints import stream_safetensors
from jlora.expert_parts import nest_parameters, stack_experts
from jlora.loras import Lora, name_some
from jlora.merged_checkpoints import save_merged as save_merged
from jlora.peft_configs import shortest_targets
from jlora.peft_files import (
  BIAS,
  CONFIG,
  PEFT,
  PREFIX,
  TENSORS,
  Profile,
)
from jlora.peft_files import VLLM as VLLM
from jlora.peft_folders import PeftAdapter as PeftAdapter
from jlora.peft_folders import load_peft as load_peft


def save_peft(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Mapping[str, Any],
  biases: Mapping[str, Any] | None = None,
  full: Mapping[str, Any] | None = None,
  profile: Profile = PEFT,
  dtype: Any = None,
  base_model: str | None = None,
  task_type: str | None = "CAUSAL_LM",
  model_type: str | None = None,
  rename: Rename | None = None,
  overwrite: bool = False,
) -> dict[str, str]:
  """What could not be carried, by parameter; the rest is in an adapter folder.

  Args:
    folder: created if needed; `adapter_model.safetensors`, and last
      `adapter_config.json`, are written whole or not at all, and as the same
      bytes each time.
    loras: path -> Lora. May be lazy: one is held at a time, each is read
      twice, once for its shape.
    like: path -> anything with `.shape`, every parameter of the base. It names
      the modules that must stay untouched and gives the axes' roles.
    biases: path of a bias -> its change (out,). PEFT has one switch for all
      modules, so every other module gets a zero bias, and PEFT then applies
      but does not merge the adapter where the base has no bias.
    full: path -> new value, for what is not low-rank (norms, new vocabulary).
      May be lazy. All parameters of a module must be there, and the base's
      vocabulary must have been resized before PEFT loads a longer one.
    profile: the consumer; `VLLM` carries neither `biases` nor `full`. For
      `PEFT`, which stacks separate experts when transformers 5 does, each
      expert of a changed layer is written, with zero units up to rank r.
    dtype: storage dtype of factors and biases; None keeps each factor's own.
    base_model: name or path of the base, for the configuration.
    task_type: PEFT's task name, or None. With "CAUSAL_LM" a base without
      `lm_head.weight` is taken to have a tied head; both ends then carry the
      change. PEFT applies it rightly but merges a tied LoRA twice: use
      `save_merged` there.
    model_type: `model_type` of the base's config.json.
    rename: path -> name in the Hugging Face model, for every path of `like`.
      For a parameter with leading axes (scanned layers) a sequence of names,
      one per index. Some checkpoints need one too: that of GPT-2 lacks the
      `transformer.` under which its causal model keeps its layers.
    overwrite: whether an adapter in the folder may be replaced.

  Returns:
    {path: reason} for each entry of `loras`, `biases` and `full` that the
    format or the profile cannot carry, and for modules of rank 0.

  Raises:
    ValueError: before anything is written, if the folder holds an adapter, a
      Lora is malformed or does not fit `like`, a rank exceeds the profile's,
      two parameters get one name, or no module is left to write.

  Example:
    >>> import tempfile
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(2))
    >>> like = {"h.0.q.weight": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   left = save_peft(folder, {"h.0.q.weight": lora}, like=like)
    ...   left, json.loads(Path(folder, CONFIG).read_text())["target_modules"]
    ({}, ['q'])

  References:
    huggingface/peft 0.21.2, docs/source/developer_guides/checkpoint.md.
  """
  folder, biases, full = Path(folder), biases or {}, full or {}
  present = [name for name in (CONFIG, TENSORS) if (folder / name).exists()]
  if present and not overwrite:
    raise ValueError(f"{folder} already holds an adapter; use overwrite=True.")
  base = describe_base(like, model_type, task_type, rename)
  left: dict[str, str] = {}
  parts = plan_loras(loras, base, profile, dtype, left)
  if profile.stacks_experts:
    parts = stack_experts(parts, base, left)
  parts = nest_parameters(parts, left)
  parts, carried = plan_biases(biases, parts, base, profile, left)
  kept = plan_full(full, parts, base, profile, left)
  if not parts:
    reasons = name_some(f"{path}: {reason}" for path, reason in left.items())
    raise ValueError(f"No module is left to write. {reasons}")
  config = _configuration(parts, carried, kept, base)
  named = {"base_model_name_or_path": base_model, "task_type": task_type}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / CONFIG).unlink(missing_ok=True)
  spec = _spec(parts, carried) | _spec_of_whole(full, kept)
  whole = (
    (PREFIX + name, np.asarray(full[path])) for name, path in kept.items()
  )
  arrays = itertools.chain(_arrays(parts, loras, biases, carried), whole)
  stream_safetensors(folder / TENSORS, spec, arrays, {"format": "pt"})
  _write_json(
    folder / CONFIG, config | {k: v for k, v in named.items() if v is not None}
  )
  return left


def to_in_rank(lora: Lora) -> tuple[jax.Array, jax.Array]:
  """(a, b) as nnx.LoRA, qwix and gemma keep them, the scale in b.

  Args:
    lora: a (..., r, in), b (..., r, out).

  Returns:
    (..., in, r) and (..., r, out), so that the change is `a @ b`.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(2))
    >>> [factor.shape for factor in to_in_rank(lora)]
    [(3, 1), (1, 2)]
  """
  scale = lora.scale[..., None, None].astype(lora.b.dtype)
  return jnp.swapaxes(lora.a, -1, -2), lora.b * scale


def from_in_rank(a: jax.Array, b: jax.Array, scale: float = 1.0) -> Lora:
  """The Lora of factors kept as (in, r) and (r, out).

  Args:
    a: (..., in, r).
    b: (..., r, out).
    scale: alpha / rank where the owner applies one (qwix does).

  Returns:
    Lora with a (..., r, in).

  Example:
    >>> from_in_rank(jnp.ones((3, 1)), jnp.ones((1, 2))).a.shape
    (1, 3)
  """
  return Lora(jnp.swapaxes(a, -1, -2), b, jnp.full(a.shape[:-2], scale, "f4"))


def _configuration(
  parts: Sequence[Part],
  carried: Mapping[str, str],
  kept: Mapping[str, str],
  base: Base,
) -> dict[str, Any]:
  """`adapter_config.json`, without an entry that says nothing.

  PEFT versions refuse or warn of entries they do not know.
  """
  rank = max(part.rank for part in parts)
  patterns = {
    f"^{re.escape(part.target)}": part.rank
    for part in parts
    if part.rank != rank
  }
  modules = {part.module for part in parts if not part.layout.wraps_parameter}
  saved = {name.rpartition(".")[0] for name in kept}
  ours = {part.name for part in parts} | kept.keys()
  optional = {
    "alpha_pattern": patterns,
    "ensure_weight_tying": base.tied_head
    and HEAD in ours
    and base.rename(kept.get(HEAD, "")) != HEAD,
    "fan_in_fan_out": any(is_transposed(part, base) for part in parts),
    "lora_bias": bool(carried),
    "modules_to_save": sorted(saved),
    "rank_pattern": patterns,
    "target_parameters": sorted(
      part.name for part in parts if part.layout.wraps_parameter
    ),
  }
  return {
    "lora_alpha": rank,
    "peft_type": "LORA",
    "r": rank,
    "target_modules": shortest_targets(modules, base.modules - modules),
  } | {key: value for key, value in optional.items() if value}


def _spec(
  parts: Sequence[Part], carried: Mapping[str, str]
) -> dict[str, tuple]:
  """Shape and dtype of every tensor of the Loras."""
  spec = {}
  for part in parts:
    blank = (
      np.broadcast_to(np.empty((), part.dtype), part.a),
      np.broadcast_to(np.empty((), part.dtype), part.b),
    )
    spec |= {
      key: (array.shape, part.dtype) for key, array in _stored(part, *blank)
    }
    if carried:
      spec[f"{PREFIX}{part.stem}.{BIAS}"] = (part.b[-1:], part.dtype)
  return spec


def _spec_of_whole(full, kept: Mapping[str, str]) -> dict[str, tuple]:
  """Shape and dtype of every tensor kept whole, each read once at most."""
  leaves = getattr(full, "spec", full)
  found = {}
  for name, path in kept.items():
    leaf = leaves[path]
    found[PREFIX + name] = (leaf.shape, leaf.dtype)
  return found


def _stored(part: Part, a, b) -> Iterator[tuple[str, np.ndarray]]:
  """The two tensors of a part, under their keys."""
  a, b = part.layout.store(a, b, part.kernel)
  yield f"{PREFIX}{part.stem}.{part.layout.a}", a
  yield f"{PREFIX}{part.stem}.{part.layout.b}", b


def _arrays(parts, loras, biases, carried) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor of the Loras, one Lora in memory at a time."""
  for path, group in itertools.groupby(parts, lambda part: part.path):
    factors = None if path is None else _folded(loras[path])
    for part in group:
      if factors is None:
        a, b = np.zeros(part.a, part.dtype), np.zeros(part.b, part.dtype)
      else:
        a, b = factors[::-1] if part.swapped else factors
      if part.index is not None:
        a = a.reshape(-1, *a.shape[-2:])[part.index]
        b = b.reshape(-1, *b.shape[-2:])[part.index]
      a, b = (_padded(factor, part.rank) for factor in (a, b))
      yield from _stored(part, a.astype(part.dtype), b.astype(part.dtype))
      if carried:
        bias = (
          biases[carried[part.module]]
          if part.module in carried
          else (np.zeros(part.b[-1:]))
        )
        yield (
          f"{PREFIX}{part.stem}.{BIAS}",
          np.asarray(bias).astype(part.dtype),
        )


def _padded(factor: np.ndarray, rank: int) -> np.ndarray:
  """A factor (..., r, n) with zero units up to a rank."""
  if factor.shape[-2] == rank:
    return factor
  missing = (0, rank - factor.shape[-2])
  return np.pad(factor, [(0, 0)] * (factor.ndim - 2) + [missing, (0, 0)])


def _folded(lora: Lora) -> tuple[np.ndarray, np.ndarray]:
  """A and scale * b, b in float32 where the scale is not one."""
  scale = np.asarray(lora.scale, np.float32)[..., None, None]
  b = np.asarray(lora.b)
  if (scale != 1).any():
    b = b.astype(np.float32) * scale
  return np.asarray(lora.a), b


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
  """A JSON file with sorted keys, written whole or not at all."""
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    temporary.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
