# SPDX-License-Identifier: Apache-2.0
"""A run goes on exactly where its newest snapshot is, even after SIGKILL."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jlora.adapting.programs import Branch, Rows, Shift
from jlora.training.inits import init_lora
from jlora.training.snapshots import Snapshot, load_snapshot, save_snapshot
from jlora.training.trainer import trained_part

PARAMS = {"layers": [{"w": jnp.ones((7, 6))}, {"w": jnp.ones((7, 6))}]}


def draw(step, ranks=2):
  programs = init_lora(PARAMS, ranks)
  optimiser = optax.MultiSteps(optax.adamw(1e-3), 2)
  state = optimiser.init(trained_part(programs))
  return Snapshot(programs, state, jax.random.key(3), step)


def test_everything_comes_back_bit_for_bit(tmp_path):
  kept = draw(7)
  assert save_snapshot(tmp_path, kept) == tmp_path / "7"
  save_snapshot(tmp_path, draw(12))
  found = load_snapshot(tmp_path, draw(0))
  assert found.step == 12
  assert load_snapshot(tmp_path / "7", draw(0)).step == 7
  chex.assert_trees_all_equal(found[:2], kept[:2])
  assert found.key == kept.key
  chex.assert_trees_all_equal_dtypes(found[:2], kept[:2])


def scaled(params, x):
  return x * params


def test_programs_of_every_kind_come_back(tmp_path):
  programs = {
    "layers/0/w": Branch(scaled, jnp.full(3, 2.0), 0.5),
    "layers/1/w": Rows(jnp.ones((2, 5))),
    "norm": Shift(jnp.arange(3.0)),
  }
  empty = jax.tree.map(jnp.zeros_like, programs)
  key, state = jax.random.key(0), {"count": jnp.int32(1)}
  save_snapshot(tmp_path, Snapshot(programs, state, key, 1))
  found = load_snapshot(tmp_path, Snapshot(empty, state, key, 0)).programs
  chex.assert_trees_all_equal(found, programs)


def test_another_runs_snapshot_is_refused(tmp_path):
  with pytest.raises(ValueError, match="neither safetensors nor|does not"):
    load_snapshot(tmp_path / "none", draw(0))
  save_snapshot(tmp_path, draw(1))
  with pytest.raises(
    ValueError, match=r"4 leaves|of another run: .*a: float32"
  ):
    load_snapshot(tmp_path, draw(0, ranks=3))
  other = draw(0)._replace(state=optax.sgd(1.0).init({}))
  with pytest.raises(ValueError, match="Paths differ"):
    load_snapshot(tmp_path, other)
  with pytest.raises(ValueError, match="exists"):
    save_snapshot(tmp_path, draw(1))


RUN = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
from experiments.lib.models import finetunes
from jlora import models
from jlora.training.inits import init_lora
from jlora.adapting.programs import Branch, Rows, Shift
from jlora.training.snapshots import Snapshot, load_snapshot, save_snapshot
from jlora.training.trainer import train
folder, steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
config = {**finetunes.TINY, "num_hidden_layers": 1}
model, params = models.init(config, jax.random.key(0))
loss = lambda params, tokens: finetunes.nll(model, params, tokens)
schedule = optax.warmup_cosine_decay_schedule(1e-4, 1e-2, 3, 20)
init, update = train(loss, optax.MultiSteps(optax.adamw(schedule), 2),
                     dropout=0.1)
programs = init_lora(params, 4)
run = Snapshot(programs, init(programs), jax.random.key(1), 0)
if resume:
  run = load_snapshot(folder, run)
update = jax.jit(update)
while run.step < steps:
  key = jax.random.fold_in(run.key, run.step)
  tokens = jax.random.randint(key, (2, 17), 0, 256)
  programs, state, value = update(run.programs, run.state, params, tokens,
                                  key=key)
  run = Snapshot(programs, state, run.key, run.step + 1)
  print(run.step, np.float32(value).tobytes().hex(), flush=True)
  if run.step % 2 == 0:
    save_snapshot(folder, run)
"""


def start(folder, mode, steps=6):
  return subprocess.Popen(
    [sys.executable, "-c", RUN, str(folder), str(steps), mode],
    cwd=pathlib.Path(__file__).parents[3],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stdout=subprocess.PIPE,
    text=True,
  )


def losses(text):
  return dict(re.findall(r"^(\d+) (\w+)$", text, re.M))


@pytest.mark.long
def test_a_killed_run_has_the_same_losses(tmp_path):
  with start(tmp_path / "whole", "fresh") as whole:
    expected = losses(whole.communicate()[0])
  with start(tmp_path / "killed", "fresh") as killed:
    before = [killed.stdout.readline() for _ in range(3)]
    killed.send_signal(signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL
  with start(tmp_path / "killed", "resume") as rest:
    found = losses(rest.communicate()[0])
  assert whole.returncode == rest.returncode == 0
  assert len(set(expected.values())) == len(expected) == 6
  assert losses("".join(before)).items() <= expected.items()
  assert 2 <= len(found) <= 4  # two or four steps were saved
  assert found.items() <= expected.items()
