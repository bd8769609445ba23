# SPDX-License-Identifier: Apache-2.0
"""Recipes over all families against float64, and beside mergekit.

  python -m tests.merges [--only=REGEX] [--mergekit=PATH/mergekit-yaml]

Then every model type of transformers whose layers are put in another order.
Exits with 1 if a result is not the reference's, or does not load.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {
  "HF_HUB_OFFLINE": "1",
  "JAX_PLATFORMS": "cpu",
  "TRANSFORMERS_VERBOSITY": "error",
}
warnings.simplefilter("ignore")

import transformers  # noqa: E402  after what it reads

from tests.jlora.pairing.test_layer_numbers import walk  # noqa: E402
from tests.merges import check  # noqa: E402
from tests.merges.recipes import CASES  # noqa: E402


def main(words: list[str] | None = None) -> int:
  """Tries the recipes; 1 if any is not right."""
  parser = argparse.ArgumentParser(prog="python -m tests.merges")
  parser.add_argument("--only", default="", help="A regex of names.")
  parser.add_argument("--mergekit", help="mergekit-yaml, to run beside.")
  asked = parser.parse_args(words)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  wrong = 0
  for name, case in CASES.items():
    if not re.search(asked.only, name):
      continue
    with tempfile.TemporaryDirectory() as folder:
      faults = check.faults(case, Path(folder))
      said = "; ".join(faults[:3]) or "right"
      if asked.mergekit:
        said += f" | mergekit: {beside(asked.mergekit, case, Path(folder))}"
    wrong += bool(faults)
    print(f"{case.family:16} {name:34} {said}", flush=True)
  if not asked.only:
    for is_old in (False, True):
      faults, right, refused = walk(is_old)
      wrong += len(faults)
      print(f"orders of layers: {right} follow, {refused} refused, {faults}")
  return int(bool(wrong))


def beside(mergekit: str, case, folder: Path) -> str:
  """Runs mergekit on the same recipe; says how far it is from the reference."""
  file, out = check.write_recipe(case, folder), folder / "theirs"
  text = file.read_text()
  file.write_text(text + "dtype: float32\n")
  command = [mergekit, str(file), str(out), "--quiet", "--no-copy-tokenizer"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  file.write_text(text)
  if done.returncode:
    return (done.stderr.strip().splitlines() or ["failed"])[-1][:150]
  try:
    far = check.distances(case, folder, out)
  except KeyError as error:
    return f"has a tensor {error}"
  finally:
    shutil.rmtree(out, ignore_errors=True)
  name = max(far, key=lambda name: far[name])
  over = sum(value > case.close for value in far.values())
  return f"{far[name]:.1e} off at {name}, {over} of {len(far)} over"


if __name__ == "__main__":
  sys.exit(main())
