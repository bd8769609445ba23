# SPDX-License-Identifier: Apache-2.0
"""Makes a base model and a full finetune of it: the pair that jlora reads.

  python -m experiments.finetune [--domain=kjv] [--steps=25]
    [--learning_rate=1e-4] [--cache=FOLDER] [--smoke]

The real pair is SmolLM2-135M, finetuned on the King James Bible; the tiny one
is random, finetuned on bytes of the standard library's help. Prints the two
folders and the held-out losses of both models. A step takes 8 to 17 s on two
loaded cores, the tiny pair seconds.
"""

import tempfile

import jax
from absl import app, flags, logging

from experiments.lib.data import smollm2, texts
from experiments.lib.models.finetunes import (
  held_out_loss,
  smollm2_pair,
  tiny_pair,
)
from jlora import models
from jlora.commands import keep_compilations


def main(_: list[str]) -> None:
  """Makes a pair; prints its folders and held-out losses."""
  values = flags.FLAGS
  logging.set_verbosity(logging.INFO)
  keep_compilations(values.cache)
  with tempfile.TemporaryDirectory() as work:
    if values.smoke:
      pair, encode = tiny_pair(work, jax.random.key(0)), texts.encode_bytes
      names = ["pydoc"]
    else:
      pair = smollm2_pair(
        values.cache,
        values.domain,
        steps=values.steps,
        learning_rate=values.learning_rate,
      )
      encode, names = smollm2.tokenizer(pair[0]), list(texts.CORPORA)
    held_out = {name: texts.parts(name, values.cache)[1] for name in names}
    for folder in pair:
      apply, params = models.load(folder)
      for name, text in held_out.items():
        tokens = texts.excerpts(text, encode, rows=8, length=255)
        loss = held_out_loss(apply, params, tokens)
        said = f"held-out {texts.label(name)}"
        print(f"{folder.name}: {loss:.3f} nats per token, {said}")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string(
    "domain", "kjv", "The text, of experiments.lib.data.texts."
  )
  flags.DEFINE_integer("steps", 25, "Updates of 4 x 128 tokens.")
  flags.DEFINE_float("learning_rate", 1e-4, "The largest.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
