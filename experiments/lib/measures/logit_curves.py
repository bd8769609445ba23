# SPDX-License-Identifier: Apache-2.0
"""Measures the KL, loss and agreement of an adapter at every rank.

The finetune is p, the base with the adapter's first r units is q; rank 0 is the
base. All ranks come from one adapter: units are sorted, lower ranks are cuts.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from flax import traverse_util

import jlora
from jlora import models
from jlora.formats import PeftAdapter

Params = dict[str, Any]


def load_pair(
  base: str | os.PathLike[str], finetuned: str | os.PathLike[str]
) -> tuple[Any, Params, Params]:
  """Loads two models of one architecture: function and both parameters.

  Args:
    base: a Hugging Face folder.
    finetuned: another, with the same network in its config.json.

  Returns:
    `apply(params, tokens) -> logits`, the base's parameters, the finetune's.

  Raises:
    ValueError: a model that `jlora.models` does not cover, or two that differ.
  """
  apply, params = models.load(base)
  other, target = models.load(finetuned)
  if other is not apply:
    raise ValueError(
      f"config.json of {base} and of {finetuned} describe different networks; "
      "their logits cannot be compared. Use --texts= to compare weights alone."
    )
  return apply, params, target


def load_adapter(
  folder: str | os.PathLike[str], base: str | os.PathLike[str]
) -> PeftAdapter:
  """Loads an adapter folder, checked against its base.

  Args:
    folder: what an extraction wrote.
    base: the base's folder.

  Returns:
    PeftAdapter.

  Raises:
    ValueError: it does not fit.
  """
  checkpoint = jlora.open_checkpoint(base)
  return jlora.load_peft(
    folder, like=checkpoint.spec, model_type=checkpoint.model_type
  )


def sweep_ranks(
  apply: Any,
  params: Params,
  target: Params,
  adapter: PeftAdapter,
  texts: Mapping[str, np.ndarray],
  ranks: Sequence[int],
) -> dict[str, Any]:
  """Measures KL, agreement and loss on each text at each rank.

      recovered = 1 - KL(finetuned ‖ base + adapter) / KL(finetuned ‖ base)

  Args:
    apply: `apply(params, tokens) -> logits`.
    params: of the base.
    target: of the finetune.
    adapter: from `load_adapter`, of at least the largest rank.
    texts: name -> (rows, time) int32 tokens.
    ranks: 1 and up.

  Returns:
    Text -> `finetuned` {loss, loss_error, perplexity} in nats per
    token, and `ranks`: a row for each rank, the base as rank 0 first. One
    adapted copy of the parameters is in memory at a time.

  """
  batches = {name: batches_of(rows) for name, rows in texts.items()}
  found: dict[str, Any] = {
    name: {
      "finetuned": _plain(jlora.score(apply, target, batches[name])),
      "ranks": [],
    }
    for name in batches
  }
  for rank in tqdm.tqdm([0, *ranks], desc="ranks", disable=None):
    adapted = adapt_params(params, adapter, rank) if rank else params
    for name, rows in batches.items():
      found[name]["ranks"].append(
        {"rank": rank} | _measure(apply, target, adapted, rows)
      )
      logging.info(
        "rank %d, %s: KL %.3g nats per token",
        rank,
        name,
        found[name]["ranks"][-1]["kl"],
      )
    del adapted
  for each in found.values():
    first = each["ranks"][0]["kl"]
    for row in each["ranks"]:
      row["recovered"] = (
        jlora.evaluation.recovered(row["kl"], first) if first else None
      )
  return found


def adapt_params(params: Params, adapter: PeftAdapter, rank: int) -> Params:
  """Adds an adapter's first `rank` units, and what it keeps whole.

  Args:
    params: of the base, a nested dict.
    adapter: from `load_adapter`.
    rank: at most the adapter's; modules that have less give all.

  Returns:
    A nested dict; the base's arrays where nothing changed.

  Raises:
    ValueError: a tensor of the adapter that the model does not have.
  """
  flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
  for name, value in adapter.full.items():
    path, transposed = models.from_hf(name)
    if path not in flat:
      raise ValueError(f"the adapter holds {name}, which the base lacks.")
    flat[path] = jnp.asarray(value.T if transposed else value, flat[path].dtype)
  for name, change in adapter.biases.items():
    path, _ = models.from_hf(name)
    flat[path] = flat[path] + change.astype(flat[path].dtype)
  loras = {
    models.from_hf(name)[0]: cut_lora(lora, rank)
    for name, lora in adapter.loras.items()
  }
  return jlora.apply(traverse_util.unflatten_dict(flat, sep="/"), loras)


def cut_lora(lora: jlora.Lora, rank: int) -> jlora.Lora:
  """Takes the first units of a Lora: its best change of that rank.

  Args:
    lora: units sorted, largest first.
    rank: how many; more than there are gives all.

  Returns:
    Lora.

  Example:
    >>> lora = jlora.Lora(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.float32(1))
    >>> cut_lora(lora, 2).rank
    2
  """
  return jlora.Lora(lora.a[..., :rank, :], lora.b[..., :rank, :], lora.scale)


_BATCH = 4


def batches_of(tokens: np.ndarray) -> list[np.ndarray]:
  """Splits rows into batches of one size, to compile once.

  Args:
    tokens: (rows, time).

  Returns:
    Arrays (n, time), n at most 4 and a divisor of the rows.
  """
  size = max(n for n in range(1, _BATCH + 1) if len(tokens) % n == 0)
  return np.split(tokens, len(tokens) // size)


def _measure(apply, target, adapted, batches) -> dict[str, Any]:
  """Measures the loss and the divergence of adapted parameters."""
  # Both give a count of tokens; the divergence's is kept.
  loss = _plain(jlora.score(apply, adapted, batches))
  return loss | _plain(jlora.mean_kl(apply, target, adapted, batches))


def _plain(figures: Any) -> dict[str, Any]:
  """Converts a named tuple to numbers that JSON can hold."""
  return {
    name: value if isinstance(value, int) else float(value)
    for name, value in figures._asdict().items()
  }
