# SPDX-License-Identifier: Apache-2.0
"""How much of a full finetune does a rank-64 LoRA keep? On a real model.

  python -m experiments.quickstart            at most 6 minutes on two cores
  python -m experiments.quickstart --smoke    a tiny random model, no download

Downloads SmolLM2-135M, finetunes all its matrices on the King James Bible,
extracts a LoRA, prints what each kind of module loses, writes the adapter
folder, and scores base, finetune and base + adapter on held-out text. Model and
finetune are cached, so that a second run takes seconds, and linked to from here
as `smollm2` and `smollm2-kjv` for the README's six lines. Expect a relative
error of about one half and nearly all of the loss improvement: most of what
this finetune changed does not show in its loss.
"""

import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags

import jlora
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import extraction, models
from jlora.commands import keep_compilations

_CACHE = flags.DEFINE_string(
  "cache", None, "Folder; ~/.cache/jlora by default."
)
_OUT = flags.DEFINE_string(
  "out", None, "Where the adapter goes; a folder in the cache by default."
)
_LINKS = flags.DEFINE_string(
  "links", ".", "Folder that gets links to the model and its finetune."
)
_RANK = flags.DEFINE_integer(
  "rank", None, "Rank of every module: 64, of the tiny model 8.", lower_bound=1
)
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny random model instead.")

#: What the model and its finetune are called by the README's lines.
LINKS = ("smollm2", "smollm2-kjv")


def main(argv: list[str]) -> None:
  """Makes the pair, extracts, and prints what was kept."""
  del argv
  keep_compilations(_CACHE.value)
  rank = _RANK.value or (8 if _SMOKE.value else 64)
  with tempfile.TemporaryDirectory() as work:
    if _SMOKE.value:
      base, finetuned = finetunes.tiny_pair(work, jax.random.key(0))
      encode, text = texts.encode_bytes, texts.pydoc()
      out = pathlib.Path(_OUT.value or f"{work}/adapter")
    else:
      base, finetuned = finetunes.kjv_pair(_CACHE.value)
      link(_LINKS.value, dict(zip(LINKS, (base, finetuned), strict=True)))
      encode, text = smollm2.tokenizer(base), smollm2.kjv(_CACHE.value)
      default = f"{finetuned}-rank{rank}"
      out = pathlib.Path(_OUT.value or default)
    if _OUT.value is None:
      shutil.rmtree(out, ignore_errors=True)  # our own: can be made again
    report = _extract(base, finetuned, out, rank)
    _, held_out = texts.split(text)
    tokens = texts.excerpts(held_out, encode, rows=8, length=127)
    _score(base, finetuned, out, tokens)
    print(
      f"\nadapter: {out} ({report.totals['adapter_bytes'] / 2**20:.1f} MiB)"
    )
    if not _SMOKE.value:
      print(f"links to the pair: {' and '.join(LINKS)}")
    elif _OUT.value is None:
      print("(removed now; --out keeps it)")


def link(
  folder: str | os.PathLike[str], targets: Mapping[str, pathlib.Path]
) -> None:
  """Links to folders; links of an earlier run are made anew.

  Args:
    folder: holds the links; made if need be.
    targets: name -> what it leads to.

  Raises:
    ValueError: there is something else of that name.
  """
  place = pathlib.Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  for name, target in targets.items():
    path = place / name
    if path.is_symlink():
      path.unlink()
    if path.exists():
      raise ValueError(f"{path} is no link; --links names another folder")
    path.symlink_to(target.resolve(), target_is_directory=True)


def _extract(base, finetuned, out, rank) -> jlora.Report:
  """Extracts, writes the model card, and prints what was lost."""
  began = time.monotonic()
  report = jlora.extract_checkpoint(base, finetuned, out, rank=rank)
  seconds = time.monotonic() - began
  command = (
    f"jlora extract --base={base} --finetuned={finetuned} "
    f"--out={out} --rank={rank}"
  )
  extraction.write_card(out, report, command)
  print(f"extracted rank {rank} in {seconds:.1f} s\n")
  print(extraction.type_table(report), end="\n\n")
  print(extraction.worst_table(report), end="\n\n")
  print(extraction.rounding_line(report))
  print(extraction.ledger_lines(report), end="\n\n")
  return report


def _score(base, finetuned, out, tokens: np.ndarray) -> None:
  """Prints the held-out losses and the share of the gain that is kept."""
  apply, params = models.load(base)
  _, target = models.load(finetuned)
  checkpoint = jlora.open_checkpoint(base)
  adapter = jlora.load_peft(
    out, like=checkpoint.spec, model_type=checkpoint.model_type
  )
  # The name table gives the Flax path; a Lora reads (in, out) on both sides.
  loras = {
    models.from_hf(name)[0]: lora for name, lora in adapter.loras.items()
  }
  adapted = jlora.apply(params, loras)
  before, after, kept = (
    finetunes.held_out_loss(apply, tree, tokens)
    for tree in (params, target, adapted)
  )
  print(f"held-out loss, nats per token over {tokens[:, 1:].size} tokens")
  print(f"  base            {before:.4f}")
  print(f"  finetuned       {after:.4f}")
  print(f"  base + adapter  {kept:.4f}")
  share = (before - kept) / (before - after)
  print(f"the adapter keeps {share:.1%} of the finetune's improvement")


if __name__ == "__main__":
  app.run(main)
