# SPDX-License-Identifier: Apache-2.0
"""Ports from disk to disk: by token, killed at any step and resumed."""

import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.extraction import expand_map, extract_checkpoint, project
from jlora.extraction.port_run import PORT, port_checkpoint
from jlora.formats import (
  OtherBaseWarning,
  fingerprint,
  load_peft,
  read_fingerprint,
)
from jlora.loras import dense
from jlora.runs.journal import FOLDER
from tests.helpers.kills import Killed, count_operations, killed_at
from tests.helpers.small_pairs import draw, files_of

Q = [f"model.layers.{at}.self_attn.q_proj.weight" for at in range(2)]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OLD, NEW = ["a", "b", "c", "d", "e"], ["x", "c", "a", "b", "e", "y", "z"]


def write(folder, tensors, tokens):
  """A checkpoint with a tokenizer."""
  folder.mkdir()
  write_safetensors(folder / "model.safetensors", tensors)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  vocabulary = {token: number for number, token in enumerate(tokens)}
  text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
  (folder / "tokenizer.json").write_text(text)


def tensors_of(rows, seed):
  """The tensors of a small model with a vocabulary."""
  shapes = {EMBED: (rows, 6), HEAD: (rows, 6), **dict.fromkeys(Q, (4, 6))}
  return {
    name: draw(*shape, seed=seed + at)
    for at, (name, shape) in enumerate(shapes.items())
  }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """An adapter of all of a model, and a base with other tokens."""
  folder = tmp_path_factory.mktemp("made")
  old = tensors_of(len(OLD), 0)
  write(folder / "old", old, OLD)
  tuned = {name: w + draw(*w.shape, seed=99) for name, w in old.items()}
  write(folder / "tuned", tuned, OLD)
  extract_checkpoint(
    folder / "old", folder / "tuned", folder / "adapter", rank=6,
    log=io.StringIO(),
  )  # fmt: skip
  write(folder / "new", tensors_of(len(NEW), 50), NEW)
  return folder


def port(made, out, target="new", **options):
  return port_checkpoint(
    made / "adapter", made / "old", made / target, out,
    log=io.StringIO(), **options,
  )  # fmt: skip


def test_rows_of_a_vocabulary_go_with_their_tokens(made, tmp_path):
  report = port(made, tmp_path / "out")
  old, tuned, new = (open_checkpoint(made / n) for n in ("old", "tuned", "new"))
  found = load_peft(tmp_path / "out", like=new.spec, config=new.config).loras
  for name in (EMBED, HEAD):
    change = np.asarray(dense(found[name]))
    change = change if name == EMBED else change.T
    for row, token in enumerate(NEW):
      wanted = np.zeros(6)
      if token in OLD:
        at = OLD.index(token)
        wanted = tuned[name][at] - old[name][at]
      np.testing.assert_allclose(change[row], wanted, atol=1e-5)
    row = report["modules"][name]
    assert (row["carried_rows"], row["new_rows"], row["lost_rows"]) == (4, 3, 1)
    rows = [OLD.index(t) for t in NEW if t in OLD]
    there = [NEW.index(t) for t in NEW if t in OLD]
    before, after = old[name][rows], new[name][there]
    drift = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert row["drift"] == pytest.approx(drift, rel=1e-5)
    assert row["kept"] < 1  # the change of "d" has no place
  assert read_fingerprint(tmp_path / "out") == fingerprint(new, found)


def test_without_tokenizers_a_grown_vocabulary_is_refused(made, tmp_path):
  write(tmp_path / "bare", tensors_of(len(NEW), 50), NEW)
  (tmp_path / "bare" / "tokenizer.json").unlink()
  with pytest.raises(
    ValueError, match=r"has 5 rows in the source and 7 .*bare"
  ):
    port(made, tmp_path / "out", target=tmp_path / "bare")
  assert not (tmp_path / "out").exists()
  mapped = {EMBED: None, HEAD: None}
  report = port(made, tmp_path / "out", target=tmp_path / "bare", paths=mapped)
  assert report["unmapped"] == [HEAD, EMBED] or set(mapped) == {
    *report["unmapped"]
  }


def test_a_head_that_is_tied_no_more_is_told(tmp_path):
  """The embedding's change reached the head too, and will not on the target."""
  tied, new = ({EMBED: draw(5, 6, seed=s), Q[0]: draw(4, 6)} for s in (1, 2))
  tuned = {name: w + draw(*w.shape, seed=9) for name, w in tied.items()}
  for name, tensors in (("old", tied), ("tuned", tuned)):
    write(tmp_path / name, tensors, OLD)
  write(tmp_path / "new", {**new, HEAD: draw(5, 6, seed=3)}, OLD)
  extract_checkpoint(
    tmp_path / "old", tmp_path / "tuned", tmp_path / "adapter", rank=4,
    log=io.StringIO(),
  )  # fmt: skip
  with pytest.warns(UserWarning, match="the head does not get the change"):
    port(tmp_path, tmp_path / "out")


def test_a_map_that_says_two_kinds_of_things_is_refused():
  with pytest.raises(ValueError, match=r"1 entries .* h\.0\. -> h\.1; end"):
    expand_map({"h.0.": "h.1"}, ["h.0.q"])
  with pytest.raises(ValueError, match="1 names are mapped that the adapter"):
    expand_map({"h.0.": "h.1."}, ["h.1.q"])
  longest = {"h.": "g.", "h.0.": None, "h.0.k": "k"}
  found = expand_map(longest, ["h.0.q", "h.0.k", "h.1.q"])
  assert found == {"h.0.q": None, "h.0.k": "k", "h.1.q": "g.1.q"}


def test_a_source_that_is_another_is_told(made, tmp_path):
  with pytest.warns(OtherBaseWarning, match="4 of 4 weights"):
    port_checkpoint(
      made / "adapter", made / "tuned", made / "old", tmp_path / "out",
      log=io.StringIO(),
    )  # fmt: skip


def test_a_port_killed_at_any_operation_resumes(made, tmp_path):
  """At each third operation, before and after it by turns."""
  run = functools.partial(port, made, paths={EMBED: None, HEAD: None})
  count = count_operations(lambda: run(tmp_path / "whole"))
  expected = files_of(tmp_path / "whole")
  assert count > 40
  for at in range(0, count, 3):
    out = tmp_path / f"out{at}"
    with pytest.raises(Killed), killed_at(at, after=bool(at % 2)):
      run(out)
    run(out, resume=True)
    assert files_of(out) == expected, at


KILLED = """
import io, os, signal, sys
from jlora.extraction.port_run import port_checkpoint
from jlora.extraction import project
real, calls = os.replace, []
def counted(*args):
  calls.append(args)
  if len(calls) == 4:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*args)
os.replace = counted
port_checkpoint(*sys.argv[1:], method=project, k=2, log=io.StringIO())
"""


def test_a_port_that_was_killed_goes_on(made, tmp_path):
  """At the third module's rename: two are in the journal."""
  out = tmp_path / "out"
  words = [made / "adapter", made / "old", made / "new", out]
  ended = subprocess.run(
    [sys.executable, "-c", KILLED, *map(str, words)],
    cwd=pathlib.Path(__file__).parents[3],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
  )
  assert ended.returncode == -signal.SIGKILL
  assert len(list((out / FOLDER).glob("*.safetensors"))) == 2
  port(made, out, method=project, k=2, resume=True)
  port(made, tmp_path / "whole", method=project, k=2)
  assert files_of(out) == files_of(tmp_path / "whole")


def test_a_finished_port_is_given_out_if_it_is_the_same(made, tmp_path):
  out = tmp_path / "out"
  report = port(made, out)
  with pytest.raises(ValueError, match="is not empty"):
    port(made, out)
  assert port(made, out, resume=True) == json.loads(json.dumps(report))
  with pytest.raises(ValueError, match="keep was 0.0, is 0.5"):
    port(made, out, keep=0.5, resume=True)
  text = (out / PORT).read_text().replace('"is_kept": true', '"is_kept": false')
  (out / PORT).write_text(text)
  with pytest.raises(ValueError, match="is not as it was written"):
    port(made, out, resume=True)
  assert port(made, out, overwrite=True) == report
