# SPDX-License-Identifier: Apache-2.0
"""`jlora extract` of JAX's models: a state is written, and no PEFT folder."""

import json

import numpy as np
import pytest

from jlora.checkpoints import save_orbax, write_safetensors
from jlora.commands import entry, extract
from jlora.formats import open_adapter
from tests.helpers.image_adapters import product

ATTENTION = "decoder/layers_{}/self_attention/{}/kernel"
SHAPES = {
  **{ATTENTION.format(i, "query"): (8, 2, 4) for i in range(2)},
  **{ATTENTION.format(i, "out"): (2, 4, 8) for i in range(2)},
  "decoder/layers_0/mlp/wi/kernel": (8, 16),
  "decoder/norm/scale": (8,),
}
EQUATION = "--equation=.*/(query|out)/kernel=dot"


@pytest.fixture
def pair(tmp_path):
  """Two models that differ by changes of rank 2, and the changes."""
  rng = np.random.default_rng(0)
  base = {k: rng.standard_normal(s, np.float32) for k, s in SHAPES.items()}
  changes = {k: 0.1 * np.ones(s, np.float32) for k, s in SHAPES.items()}
  tuned = {name: base[name] + changes[name] for name in base}
  for side, tensors in (("base", base), ("tuned", tuned)):
    save_orbax(tmp_path / side, tensors)
  return tmp_path, changes


@pytest.fixture
def run(pair, capsys):
  def start(*words):
    tmp, _ = pair
    sides = (f"--base={tmp / 'base'}", f"--finetuned={tmp / 'tuned'}")
    code = entry.run(
      extract.COMMAND, [*sides, f"--out={tmp / 'out'}", "--rank=2", *words]
    )
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err

  return start


@pytest.mark.parametrize(
  ("name", "words", "missing"),
  [
    ("qwix", (EQUATION,), ("decoder/norm/scale",)),
    ("tunix", (EQUATION,), ("decoder/norm/scale",)),
    (
      "maxtext",
      (),
      ("decoder/norm/scale", "decoder/layers_0/mlp/wi/kernel"),
    ),
  ],
)
def test_each_state_holds_the_change(run, pair, name, words, missing):
  tmp, changes = pair
  code, said = run(f"--format={name}", *words)
  assert code == 0, said
  assert f"formats/{name} ({name})" in said
  assert not (tmp / "out" / "adapter_config.json").exists()
  assert "library_name: jax" in (tmp / "out" / "README.md").read_text()
  found = open_adapter(tmp / "out" / "formats" / name, tmp / "base")
  assert found.format == name
  assert set(found) == set(SHAPES) - set(missing)
  for path, lora in found.items():
    out = product(lora)
    change = changes[path].reshape(out.shape[::-1]).T
    np.testing.assert_allclose(out, change, atol=1e-5)
  report = json.loads((tmp / "out" / "report.json").read_text())
  lost = [n for row in report["ledger"] if row["status"] == "not representable"
          for n in row["base"]]  # fmt: skip
  assert set(lost) == set(missing)
  assert {row["path"] for row in report["modules"]} == set(found)


def test_what_was_factored_is_not_lost_for_want_of_an_equation(run, pair):
  tmp, _ = pair
  code, said = run("--format=qwix")
  assert code == 1
  assert "does not tell whether an einsum" in said
  code, said = run("--format=qwix", EQUATION, "--resume")
  assert code == 0, said
  code, said = run("--format=qwix", EQUATION, "--resume")
  assert code == 0, said
  code, said = run("--format=tunix", EQUATION, "--resume")
  assert code == 1, said
  code, said = run("--format=tunix", EQUATION, "--overwrite")
  assert code == 0, said
  assert (tmp / "out" / "formats" / "tunix").is_dir()


@pytest.mark.parametrize(
  ("words", "told"),
  [
    (["--format=qwix", "--format=peft"], "peft has no names"),
    (["--format=qwix", "--format=tunix"], "a run writes one state"),
    (["--format=maxtext", EQUATION], "maxtext has no use for --equation"),
    ([EQUATION], "--equation is for --format=qwix"),
    (["--format=qwix", "--equation=x"], "must be REGEX=EINSUM"),
  ],
)
def test_mistakes_are_one_line_before_the_work(run, pair, words, told):
  tmp, _ = pair
  code, said = run(*words)
  assert (code, said.count("\n")) == (1, 1)
  assert told in said
  assert not (tmp / "out").exists()


def test_models_of_pytorch_have_no_state_but_tunix(tmp_path, capsys):
  file = tmp_path / "base.safetensors"
  write_safetensors(file, {"a.q.weight": np.ones((4, 6), np.float32)})
  words = [f"--base={file}", f"--finetuned={file}", f"--out={tmp_path}/x"]
  for name in ("qwix", "maxtext"):
    assert entry.run(extract.COMMAND, [*words, f"--format={name}"]) == 1
    said = capsys.readouterr().err
    assert f"{name} needs the checkpoint of the JAX model" in said
