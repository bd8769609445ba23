# SPDX-License-Identifier: Apache-2.0
"""Plans from headers, and the fingerprint that tells one run from another."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.safetensors import write_safetensors
from jlora.extraction.planning import fingerprint, plan_jobs, without_paths
from jlora.messages import name_some
from jlora.pairing.match import common_rows, keep_whole, pair_up
from jlora.paths import matching
from jlora.views import KERNEL, LINEAR
from tests.helpers.small_pairs import draw, write_pair

Q, FC = "h.0.attn.q.weight", "h.0.mlp.c_fc.weight"
BIAS, TABLE = "h.0.mlp.c_fc.bias", "wte.weight"
BASE = {
  Q: draw(8, 8),
  FC: draw(8, 12),
  BIAS: draw(12),
  TABLE: draw(9, 8).astype(np.float16),
}
OPTIONS = {"rank": 8, "factor": "krylov"}

every = matching()


def plan_of(folders, select=every, vocabulary=keep_whole):
  base, finetuned = map(open_checkpoint, folders)
  pairing = pair_up(base.spec, finetuned.spec, vocabulary=vocabulary)
  return plan_jobs(base, finetuned, pairing, select, 8)


def views_of(plan):
  return {job.pair.path: job.view for job in plan.jobs}


@pytest.fixture
def folders(tmp_path):
  return write_pair(tmp_path, BASE, {n: x + x for n, x in BASE.items()}, {})


def test_a_plan_has_pairs_views_and_what_is_refused(folders):
  plan = plan_of(folders, matching(exclude=r".*\.q\..*"))
  assert {pair.path for pair in plan.pairing.pairs} == set(BASE)
  assert [job.pair for job in plan.jobs] == list(plan.pairing.pairs)
  assert views_of(plan) == {Q: LINEAR, FC: LINEAR, TABLE: KERNEL, BIAS: None}
  assert {job.pair.path for job in plan.jobs if job.is_refused} == {Q}
  ranks = {job.pair.path: job.rank for job in plan.jobs}
  assert ranks == {Q: 0, FC: 8, TABLE: 8, BIAS: 0}
  assert plan.model_type is None


@pytest.mark.parametrize("side", [0, 1])
def test_a_model_type_on_either_side_sets_the_views(folders, side):
  (folders[side] / "config.json").write_text('{"model_type": "gpt2"}')
  plan = plan_of(folders)
  assert plan.model_type == "gpt2"
  assert (views_of(plan)[FC], views_of(plan)[Q]) == (KERNEL, None)
  assert [job.why for job in plan.jobs if job.pair.path == Q] == [
    "GPT2LMHeadModel is not known to have it"
  ]


def test_select_sees_matrices_alone_and_the_base_spec(folders):
  seen = {}

  def select(path, spec):
    seen[path] = spec.shape, spec.dtype
    return True

  plan_of(folders, select)
  assert seen == {
    name: (BASE[name].shape, BASE[name].dtype) for name in (Q, FC, TABLE)
  }


def test_no_tensor_is_read(folders):
  plan = plan_of(folders)
  headers = sum(next(iter(c.spec.values())).start or 0 for c in plan[:2])
  read = sum(c.bytes_read for c in plan[:2])
  assert 0 < read <= headers


def test_nothing_shared_names_both(tmp_path):
  names = [f"x{at}.weight" for at in range(5)]
  folders = write_pair(tmp_path, BASE, {name: draw(2, 3) for name in names})
  with pytest.raises(ValueError, match="Is this the base") as error:
    plan_of(folders)
  assert f"No tensor of {folders[0]} is in {folders[1]}" in str(error.value)
  assert f"against {name_some(names)}" in str(error.value)
  assert "and 1 more against" in str(error.value)


@pytest.mark.parametrize("select", [matching("none"), matching(exclude=".*")])
def test_nothing_selected_says_what_there_is(folders, select):
  with pytest.raises(ValueError, match="No matrix of .* is selected") as error:
    plan_of(folders, select)
  assert "and 1 more" in str(error.value)


def test_no_matrix_at_all_is_refused(tmp_path):
  with pytest.raises(ValueError, match="No matrix of .* is selected"):
    plan_of(write_pair(tmp_path, {"x.bias": draw(3)}, {"x.bias": draw(3)}))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("text", ["", '{"model_type": '])
def test_a_broken_config_is_named(folders, side, text):
  file = folders[side] / "config.json"
  file.write_text(text)
  with pytest.raises(ValueError, match="no JSON") as error:
    plan_of(folders)
  assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["{}", '{"model_type": null}'])
def test_a_config_without_a_type_is_none(folders, text):
  (folders[0] / "config.json").write_text(text)
  assert plan_of(folders).model_type is None


def test_bytes_are_of_both_tensors_in_their_own_dtypes(tmp_path):
  tuned = {Q: BASE[Q].astype(np.float16), TABLE: BASE[TABLE]}
  plan = plan_of(write_pair(tmp_path, BASE, tuned))
  found = {job.pair.path: job.nbytes for job in plan.jobs}
  assert found == {Q: 64 * (4 + 2), TABLE: 72 * (2 + 2)}


def print_of(folders, key=None, options=OPTIONS, **given):
  return fingerprint(plan_of(folders, **given), key, options)


def differing(left, right):
  return {name for name in {*left, *right} if left.get(name) != right.get(name)}


def test_the_same_run_has_the_same_fingerprint(folders):
  first = print_of(folders)
  assert print_of(folders) == first == json.loads(json.dumps(first))
  assert OPTIONS.items() <= first.items()
  for key in (jax.random.key(0), jax.random.PRNGKey(0)):
    assert print_of(folders, key) == first


@pytest.mark.parametrize("name", OPTIONS)
def test_any_option_changes_it(folders, name):
  other = print_of(folders, options=OPTIONS | {name: "other"})
  assert differing(print_of(folders), other) == {name}


def test_the_key_changes_it(folders):
  first = print_of(folders)
  for key in (jax.random.key(1), jnp.ones(2, jnp.uint32)):
    assert differing(first, print_of(folders, key)) == {"key"}


def test_the_selection_changes_it(folders):
  other = print_of(folders, select=matching(exclude=r".*\.q\..*"))
  assert differing(print_of(folders), other) == {"refused"}


def test_the_model_type_changes_it(folders):
  first = print_of(folders)
  (folders[0] / "config.json").write_text('{"model_type": "gpt2"}')
  assert differing(first, print_of(folders)) == {"base", "modules"}


def test_the_vocabulary_changes_it(tmp_path):
  folders = write_pair(tmp_path, BASE, BASE | {TABLE: draw(11, 8)})
  first, other = (
    print_of(folders, vocabulary=policy) for policy in (keep_whole, common_rows)
  )
  assert "pairs" in differing(first, other)


@pytest.mark.parametrize(("side", "name"), [(0, "base"), (1, "finetuned")])
def test_any_file_changes_it(folders, side, name):
  first = print_of(folders)
  file = folders[side] / "model.safetensors"
  stat = file.stat()
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  assert differing(first, print_of(folders)) == {f"{name} times"}
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert print_of(folders) == first
  tensors = BASE | {BIAS: BASE[BIAS].astype(np.float16)}
  write_safetensors(file, tensors)
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert name in differing(first, print_of(folders))


def test_the_place_of_the_files_counts_apart(folders, tmp_path):
  """Processes on several machines may have copies of them."""
  first = print_of(folders)
  moved = [shutil.copytree(path, tmp_path / f"moved-{path.name}",
                           copy_function=shutil.copy2)
           for path in folders]  # fmt: skip
  other = print_of(moved)
  assert differing(first, other) == {"base paths", "finetuned paths"}
  assert without_paths(first) == without_paths(other)


@pytest.mark.parametrize(("side", "name"), [(0, "base"), (1, "finetuned")])
def test_other_values_in_an_orbax_directory_change_it(
  folders, tmp_path, side, name
):
  """Its specs name no files, so the directory's own are looked at."""
  paths = list(folders)
  paths[side] = tmp_path / "orbax"
  save = functools.partial(save_orbax, paths[side])
  save(BASE)
  first = print_of(paths)
  assert print_of(paths) == first
  shutil.rmtree(paths[side])
  save(BASE | {Q: BASE[Q] + 1})
  found = differing(first, print_of(paths))
  assert f"{name} times" in found
  assert found <= {name, f"{name} times", f"{name} paths"}
