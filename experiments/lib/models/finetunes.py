# SPDX-License-Identifier: Apache-2.0
"""Makes a base model and full finetunes of it once; keeps them in the cache."""

import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from flax import traverse_util

from experiments.lib.data import smollm2, texts
from jlora import models

Apply = Callable[[Any, jax.Array], jax.Array]
#: The network of `tiny_pair`: bytes in, bytes out.
TINY = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 256,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
}


def smollm2_pair(
  cache: str | os.PathLike[str] | None,
  domain: str,
  *,
  steps: int = 25,
  learning_rate: float = 1e-4,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the folders of SmolLM2-135M and of its full finetune on a text.

  Made once, then found in the cache under the recipe's name. Trains on the
  text's first nine tenths, 4 x 128 tokens a step, each seen once.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.
    domain: the text, of `texts.CORPORA`.
    steps: updates.
    learning_rate: the largest.

  Returns:
    The base folder and the finetuned folder, float32.

  Raises:
    ValueError: as `texts.parts`, or if the text is too short.
  """
  base = smollm2.fetch(cache)
  # Another version of Python has another help text.
  text_name = texts.label(domain).replace(" of Python ", "")
  folder = base.with_name(
    f"{base.name}-{text_name}-{steps}x4x128-{learning_rate:g}-all"
  )
  if not folder.exists():
    text, _ = texts.parts(domain, cache)
    apply, params = models.load(base)
    tokens = texts.excerpts(
      text, smollm2.tokenizer(base), rows=4 * steps, length=128
    )
    params = finetune(
      apply,
      params,
      texts.batches(tokens, 4),
      steps=steps,
      learning_rate=learning_rate,
    )
    models.save(
      folder,
      params,
      models.read_config(base),
      copy=sorted(base.glob("tokenizer*.json")),
    )
  return base, folder


def kjv_pair(
  cache: str | os.PathLike[str] | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns SmolLM2-135M and its short finetune on the King James Bible.

  Args and Returns: as `smollm2_pair`.
  """
  return smollm2_pair(cache, "kjv")


def tiny_pair(
  folder: str | os.PathLike[str], key: jax.Array
) -> tuple[pathlib.Path, pathlib.Path]:
  """Makes a random two-layer model of bytes and its full finetune.

  Args:
    folder: receives the folders `base` and `finetuned`.
    key: PRNG key of the base.

  Returns:
    The base folder and the finetuned folder, float32.

  Raises:
    ValueError: if they exist already.
  """
  folder = pathlib.Path(folder)
  apply, params = models.init(TINY, key)
  base = models.save(folder / "base", params, TINY)
  text, _ = texts.split(texts.pydoc())
  tokens = texts.excerpts(text, texts.encode_bytes, rows=8 * 60, length=64)
  params = finetune(
    apply, params, texts.batches(tokens, 8), steps=60, learning_rate=1e-2
  )
  return base, models.save(folder / "finetuned", params, TINY)


def is_matrix(path: str) -> bool:
  """Returns whether a path is of a matrix or embedding: no norm, no bias."""
  return path.endswith(("/kernel", "/embedding"))


def finetune(
  apply: Apply,
  params: Any,
  batches: Iterable[np.ndarray],
  *,
  steps: int,
  learning_rate: float,
  train: Callable[[str], bool] = is_matrix,
) -> Any:
  """Finetunes parameters fully: every trained matrix moves freely.

  Adam without weight decay, linear warmup over a fifth of the steps, cosine to
  zero, gradients clipped to norm 1. Costs four copies of what is trained,
  beside the parameters.

  Args:
    apply: `apply(params, tokens) -> logits`.
    params: nested dict of float32; left as it is.
    batches: at least `steps` arrays (batch, time + 1) int32, of one shape.
    steps: updates.
    learning_rate: the largest; a weight moves by at most about this a step.
    train: which paths move, matrices and embeddings without it; the rest is
      shared with `params`.

  Returns:
    A nested dict like `params`.

  Raises:
    ValueError: if there are fewer than `steps` batches, or nothing to train.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  frozen = {path: leaf for path, leaf in flat.items() if not train(path)}
  moving = {
    path: jnp.array(leaf, copy=True)
    for path, leaf in flat.items()
    if train(path)
  }
  if not moving:
    raise ValueError(f"`train` selects none of {len(flat)} parameters")
  optimiser = _optimiser(learning_rate, steps)

  def loss(moving, frozen, tokens):
    """Computes the loss of moving and frozen parameters together."""
    tree = traverse_util.unflatten_dict({**moving, **frozen}, sep="/")
    return nll(apply, tree, tokens)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(moving, state, frozen, tokens):
    """Takes one step."""
    value, gradient = jax.value_and_grad(loss)(moving, frozen, tokens)
    change, state = optimiser.update(gradient, state)
    return optax.apply_updates(moving, change), state, value

  state, done, began = optimiser.init(moving), 0, time.monotonic()
  with tqdm.tqdm(total=steps, desc="finetune", disable=None) as bar:
    for tokens in itertools.islice(batches, steps):
      moving, state, value = update(moving, state, frozen, jnp.asarray(tokens))
      done += 1
      bar.set_postfix_str(f"loss {value:.3f}")  # waits for the step
      bar.update()
      if bar.disable and done % (steps // 5 or 1) == 0:
        left = (time.monotonic() - began) / done * (steps - done)
        logging.info(
          "finetune: step %d/%d, loss %.3f, %.0f s left",
          done,
          steps,
          value,
          left,
        )
  if done < steps:
    raise ValueError(f"{steps} steps need as many batches, got {done}")
  return traverse_util.unflatten_dict({**frozen, **moving}, sep="/")


def nll(apply: Apply, params: Any, tokens: jax.Array) -> jax.Array:
  """Computes the mean negative log-likelihood of tokens given those before.

  Args:
    apply: `apply(params, tokens) -> logits`.
    params: its parameters.
    tokens: (batch, time + 1) int32; the first column is only read.

  Returns:
    () float32, nats per token.
  """
  logits = apply(params, tokens[:, :-1]).astype(jnp.float32)
  # A comparison, not a gather, whose gradient would be a scatter.
  columns = jnp.arange(logits.shape[-1])[None, None]
  target = jnp.where(columns == tokens[:, 1:, None], logits, 0.0).sum(-1)
  return (jax.nn.logsumexp(logits, axis=-1) - target).mean()


_row_nll = jax.jit(nll, static_argnums=0)


def held_out_loss(apply: Apply, params: Any, tokens: np.ndarray) -> float:
  """Computes the mean negative log-likelihood of fixed text, nats per token.

  Args:
    apply: `apply(params, tokens) -> logits`.
    params: its parameters.
    tokens: (rows, time + 1) int32; one row at a time bounds the memory.

  Returns:
    The mean over rows and positions.
  """
  rows = [_row_nll(apply, params, jnp.asarray(row[None])) for row in tokens]
  return float(np.mean(jax.device_get(rows)))


def _optimiser(
  learning_rate: float, steps: int
) -> optax.GradientTransformation:
  """Returns Adam with clipped gradients and a rate that rises and falls."""
  schedule = optax.warmup_cosine_decay_schedule(
    learning_rate / 5, learning_rate, steps // 5, steps + 1
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95)
  )
