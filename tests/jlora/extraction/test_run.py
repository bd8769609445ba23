# SPDX-License-Identifier: Apache-2.0
"""Extraction from disk to disk: what is in the folder, and refusals."""

import functools
import io
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora import ranks
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.extraction import run as runs
from jlora.extraction.module import Extractor
from jlora.extraction.report import read_report, write_report
from jlora.factoring.factorisers import krylov, svd
from jlora.formats.peft.layouts import VLLM
from jlora.pairing.match import common_rows, same_rows
from jlora.paths import matching
from jlora.runs import fingerprints
from jlora.runs.journal import FOLDER
from tests.helpers.small_pairs import (
  adapter_tensors,
  change_of,
  draw,
  files_of,
  shared_extractor,
  write_pair,
)

BF16 = ml_dtypes.bfloat16
LAYERS = ("model.layers.0", "model.layers.1")
Q, UP = "self_attn.q_proj", "mlp.up_proj"
MODULES = [f"{layer}.{part}" for layer in LAYERS for part in (Q, UP)]


def tensors(seed, dtype):
  """Two layers of two matrices, a bias and a norm each, and a table."""
  made = {"model.embed_tokens.weight": draw(9, 8, dtype=dtype)}
  for at, layer in enumerate(LAYERS):
    seeds = iter(range(seed + 10 * at, seed + 10 * at + 4))
    made |= {
      f"{layer}.{Q}.weight": draw(8, 8, seed=next(seeds), dtype=dtype),
      f"{layer}.{Q}.bias": draw(8, seed=next(seeds), dtype=dtype),
      f"{layer}.{UP}.weight": draw(12, 8, seed=next(seeds), dtype=dtype),
      f"{layer}.norm.weight": draw(8, seed=next(seeds), dtype=dtype),
    }
  return made


BASE, FINETUNED = tensors(0, BF16), tensors(100, np.float32)
FINETUNED["model.embed_tokens.weight"] = BASE["model.embed_tokens.weight"]


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch):
  monkeypatch.setattr(runs, "Extractor", shared_extractor)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  return write_pair(tmp_path_factory.mktemp("pair"), BASE, FINETUNED)


@pytest.fixture
def extract_to(pair, tmp_path):
  """An extraction at rank 3 of the pair into `out`, quiet."""
  return functools.partial(
    runs.extract_checkpoint,
    *pair,
    tmp_path / "out",
    rank=3,
    base_model="base",
    log=io.StringIO(),
  )


def delta(module, base=BASE, finetuned=FINETUNED):
  name = f"{module}.weight"
  return finetuned[name].astype(np.float64) - base[name].astype(np.float64)


def relative_error(folder, module):
  exact = delta(module)
  rest = exact - change_of(folder, module)
  return np.linalg.norm(rest) / np.linalg.norm(exact)


def row_of(report, name):
  rows = [
    row for row in report.ledger if name in row["base"] + row["finetuned"]
  ]
  assert len(rows) == 1
  return rows[0]


def test_the_folder_is_complete(extract_to, tmp_path):
  report = extract_to()
  files = files_of(tmp_path / "out")
  assert sorted(files) == [
    "adapter_config.json",
    "adapter_model.safetensors",
    "report.json",
  ]
  config = json.loads(files["adapter_config.json"])
  assert (config["r"], config["lora_alpha"]) == (3, 3)
  assert config["base_model_name_or_path"] == "base"
  assert read_report(tmp_path / "out") == report
  assert [row["path"] for row in report.modules] == sorted(
    f"{module}.weight" for module in MODULES
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_errors_are_those_of_the_files(extract_to, tmp_path, dtype):
  """Recomputed in float64 from what lies on disk, rounding included."""
  report = extract_to(dtype=dtype)
  for row in report.modules:
    module = row["path"].removesuffix(".weight")
    exact, change = delta(module), change_of(tmp_path / "out", module)
    error = np.linalg.norm(exact - change)
    norm = np.linalg.norm(exact)
    cosine = np.sum(exact * change) / norm / np.linalg.norm(change)
    assert row["relative_error"] == pytest.approx(error / norm, rel=1e-5)
    assert row["mse"] == pytest.approx(error**2 / exact.size, rel=1e-5)
    assert row["cosine_distance"] == pytest.approx(1 - cosine, rel=1e-4)
    assert row["mean_abs_delta"] == pytest.approx(np.abs(exact).mean())
    assert row["bytes"] == 3 * sum(exact.shape) * jnp.dtype(dtype).itemsize
    stored = adapter_tensors(tmp_path / "out")[f"{module}.lora_A.weight"]
    assert stored.dtype == dtype
  errors2 = sum((row["relative_error"] * row["norm"]) ** 2
                for row in report.modules)  # fmt: skip
  norms2 = sum(row["norm"] ** 2 for row in report.modules)
  assert report.totals["relative_error"] ** 2 == pytest.approx(errors2 / norms2)


def test_float32_factors_are_the_best(extract_to):
  for row in extract_to().modules:
    sigma = np.linalg.svd(delta(row["path"][:-7]), compute_uv=False)
    best = np.sqrt(np.sum(sigma[3:] ** 2) / np.sum(sigma**2))
    assert row["relative_error"] == pytest.approx(best, rel=1e-4)
    assert row["singular_values"] == pytest.approx(sigma[:3], rel=1e-4)


def test_bias_and_norm_are_carried(extract_to, tmp_path):
  report = extract_to()
  stored = adapter_tensors(tmp_path / "out")
  for layer in LAYERS:
    bias, norm = f"{layer}.{Q}.bias", f"{layer}.norm.weight"
    change = FINETUNED[bias] - BASE[bias].astype(np.float32)
    np.testing.assert_allclose(
      stored[f"{layer}.{Q}.lora_B.bias"], change, rtol=1e-6
    )
    np.testing.assert_array_equal(stored[norm], FINETUNED[norm])
    assert row_of(report, bias)["status"] == "kept whole"
    assert row_of(report, norm)["status"] == "kept whole"
  assert row_of(report, "model.embed_tokens.weight")["status"] == "unchanged"


def test_vllm_gets_neither_and_the_ledger_says_so(extract_to, tmp_path):
  report = extract_to(profile=VLLM)
  stored = adapter_tensors(tmp_path / "out")
  assert {name.rpartition(".lora_")[0] for name in stored} == set(MODULES)
  for name in (f"{LAYERS[0]}.{Q}.bias", f"{LAYERS[0]}.norm.weight"):
    row = row_of(report, name)
    assert row["status"] == "not representable"
    assert "vLLM refuses" in row["why"]


def test_a_matrix_not_selected_is_reported_and_not_carried(
  extract_to, tmp_path
):
  report = extract_to(select=matching(exclude=".*q_proj.*"))
  row = row_of(report, f"{LAYERS[0]}.{Q}.weight")
  assert (row["status"], row["why"]) == ("not representable", "not selected")
  stored = adapter_tensors(tmp_path / "out")
  assert f"{LAYERS[0]}.{Q}.weight" not in stored
  assert not np.any(change_of(tmp_path / "out", f"{LAYERS[0]}.{Q}"))
  assert np.any(stored[f"{LAYERS[0]}.{Q}.lora_B.bias"])


def test_policies_choose_below_the_cap(extract_to, tmp_path):
  policy = lambda s: ranks.energy(s.values, s.norms, 0.6)  # noqa: E731
  report = extract_to(rank=8, policy=policy)
  assert len({row["rank"] for row in report.modules}) > 1
  for row in report.modules:
    sigma = np.linalg.svd(delta(row["path"][:-7]), compute_uv=False)
    share = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert row["rank"] == 1 + np.sum(share < 0.6)
    assert row["relative_error"] == pytest.approx(
      relative_error(tmp_path / "out", row["path"][:-7]), rel=1e-5
    )


def test_a_byte_budget_is_kept(extract_to, tmp_path):
  limit = 500
  policy = lambda s: ranks.budget(s.values, s.unit_bytes, limit)  # noqa: E731
  report = extract_to(policy=policy)
  # Of a module that got no rank no bytes are written.
  factors = [
    value
    for name, value in adapter_tensors(tmp_path / "out").items()
    if "lora_" in name and value.ndim == 2 and np.any(value)
  ]
  spent = sum(value.nbytes for value in factors)
  assert limit - 4 * (12 + 8) < spent <= limit
  assert report.totals["adapter_bytes"] == spent


def test_ranks_may_be_numpy_integers_and_zero(extract_to):
  def policy(spectra):
    return dict(zip(sorted(spectra.values), np.arange(4), strict=True))

  report = extract_to(policy=policy)
  assert sorted(row["rank"] for row in report.modules) == [1, 2, 3]
  row = row_of(report, min(f"{module}.weight" for module in MODULES))
  assert row["status"] == "not representable"
  assert "rank 0" in row["why"]


@pytest.mark.parametrize("chosen", [4, -1, 1.5])
def test_a_policy_outside_the_cap_is_refused(extract_to, chosen):
  with pytest.raises(ValueError, match="policy gave 4 modules"):
    extract_to(policy=lambda s: dict.fromkeys(s.values, chosen))


def test_orbax_and_shards_give_the_same_adapter(extract_to, pair, tmp_path):
  extract_to()
  expected = files_of(tmp_path / "out")["adapter_model.safetensors"]
  finetuned = open_checkpoint(pair[1])
  save_orbax(tmp_path / "orbax", dict(finetuned))
  stream_checkpoint(
    tmp_path / "shards",
    finetuned.spec,
    finetuned.items(),
    max_shard_bytes=1000,
  )
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
  for form in ("orbax", "shards"):
    runs.extract_checkpoint(
      pair[0],
      tmp_path / form,
      tmp_path / f"from_{form}",
      rank=3,
      log=io.StringIO(),
    )
    found = files_of(tmp_path / f"from_{form}")["adapter_model.safetensors"]
    assert found == expected


def test_one_compilation_a_shape_on_one_device(extract_to, monkeypatch):
  made = []

  def extractor(*args):
    made.append(runs_extractor(*args, on_host=False))
    made[0].devices = made[0].devices[:1]
    return made[0]

  runs_extractor = shared_extractor.__wrapped__
  monkeypatch.setattr(runs, "Extractor", extractor)
  extract_to(rank=2)
  assert made[0].compilations == 2  # four modules of two shapes


def test_large_tensors_are_split_over_the_devices(
  extract_to, tmp_path, monkeypatch
):
  def large(name):
    return name.startswith("base_model") and UP in name

  extract_to()
  expected = open_checkpoint(tmp_path / "out/adapter_model.safetensors")
  expected = {name: expected[name] for name in expected}
  split, real = [], Extractor.split
  monkeypatch.setattr(
    Extractor,
    "split",
    lambda self, job, *rest: (
      split.append(job.pair.path), real(self, job, *rest))[1],
  )  # fmt: skip
  extract_to(split_bytes=4 * 8 * 8, overwrite=True)  # (12, 8) is larger
  assert split == [f"{layer}.{UP}.weight" for layer in LAYERS]
  found = open_checkpoint(tmp_path / "out/adapter_model.safetensors")
  for name, tensor in expected.items():
    if large(name):
      np.testing.assert_allclose(found[name], tensor, rtol=1e-3, atol=1e-4)
    else:
      np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [f"{MODULES[1]}.weight", "model.norm.weight"])
def test_nan_is_an_error_that_leaves_no_adapter(tmp_path, name, bad):
  base = BASE | {"model.norm.weight": np.ones(8, np.float32)}
  broken = np.array(FINETUNED.get(name, base["model.norm.weight"]), np.float32)
  broken.flat[3] = bad
  sides = write_pair(tmp_path, base, FINETUNED | {name: broken})
  with pytest.raises(ValueError, match=rf"{name}: 1 of {broken.size} values"):
    runs.extract_checkpoint(*sides, tmp_path / "out", rank=3, log=io.StringIO())
  assert not list((tmp_path / "out").glob("*"))[1:]  # the journal alone


def test_a_change_too_large_for_float32_is_an_error(tmp_path):
  name = f"{MODULES[0]}.weight"
  large = np.full((8, 8), 3e38, np.float32)
  sides = write_pair(
    tmp_path, BASE | {name: large.astype(BF16)}, FINETUNED | {name: -large}
  )
  with pytest.raises(ValueError, match="larger than float32 holds"):
    runs.extract_checkpoint(*sides, tmp_path / "out", rank=3, log=io.StringIO())


def test_nothing_changed_is_an_error(pair, tmp_path):
  with pytest.raises(ValueError, match="Nothing to extract"):
    runs.extract_checkpoint(
      pair[0], pair[0], tmp_path / "out", log=io.StringIO()
    )
  assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_equal_values_in_another_dtype_are_unchanged(tmp_path):
  name = f"{MODULES[0]}.weight"
  same = {key: value.astype(np.float32) for key, value in BASE.items()}
  sides = write_pair(tmp_path, BASE, same | {name: FINETUNED[name]})
  report = runs.extract_checkpoint(
    *sides, tmp_path / "out", rank=3, log=io.StringIO()
  )
  assert report.totals["ledger"] == {
    "extracted": 1,
    "unchanged": len(BASE) - 1,
    "kept whole": 0,
    "not representable": 0,
  }


def test_a_grown_vocabulary(tmp_path):
  name = "model.embed_tokens.weight"
  table = np.concatenate([BASE[name].astype(np.float32) + 1, draw(2, 8)])
  sides = write_pair(tmp_path, BASE, FINETUNED | {name: table})
  run = functools.partial(
    runs.extract_checkpoint, *sides, rank=3, log=io.StringIO()
  )
  whole = run(tmp_path / "whole")
  stored = adapter_tensors(tmp_path / "whole")
  np.testing.assert_array_equal(stored[name], table)
  assert "9 in the base, 11 in" in row_of(whole, name)["why"]
  rows = run(tmp_path / "rows", vocabulary=common_rows)
  assert row_of(rows, name)["status"] == "extracted"
  assert "9 common rows" in row_of(rows, name)["why"]
  with pytest.raises(ValueError, match="Pass keep_whole or common_rows"):
    run(tmp_path / "refused", vocabulary=same_rows)
  assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"split_bytes": 0}, "split_bytes must be at least 1"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"select": matching("none")}, "No matrix of .* is selected"),
  ],
)
def test_bad_options_leave_nothing(extract_to, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    extract_to(**options)
  assert not (tmp_path / "out").exists()


def test_strangers_share_nothing(tmp_path):
  sides = write_pair(tmp_path, {"a.weight": draw(2, 2)}, {"b": draw(2, 2)})
  with pytest.raises(ValueError, match="a.weight against b. Is this the base"):
    runs.extract_checkpoint(*sides, tmp_path / "out")


def test_a_folder_that_is_not_empty_is_refused(extract_to, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  for resume in (False, True):
    with pytest.raises(ValueError, match=r"is not empty \(notes.txt\)"):
      extract_to(resume=resume)
  extract_to(overwrite=True)
  assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(extract_to, tmp_path):
  (tmp_path / "out").write_text("mine")
  with pytest.raises(ValueError, match="is a file"):
    extract_to(overwrite=True)


def test_overwriting_gives_what_a_new_folder_gets(extract_to, tmp_path):
  extract_to()
  expected = files_of(tmp_path / "out")
  extract_to(rank=2, overwrite=True)
  assert files_of(tmp_path / "out") != expected
  extract_to(overwrite=True)
  assert files_of(tmp_path / "out") == expected


VERIFIED = {
  "by": "PEFT", "version": "0", "modules": 1, "worst_difference": 0.0,
}  # fmt: skip


def test_a_finished_run_resumed_gives_its_report(
  extract_to, tmp_path, monkeypatch
):
  report = extract_to()
  expected = files_of(tmp_path / "out")
  monkeypatch.setattr(runs, "factor_missing", None)  # nothing is done again
  assert extract_to(resume=True) == report
  assert files_of(tmp_path / "out") == expected
  # As --verify does, and as a user may; a policy that chooses the same ranks.
  write_report(tmp_path / "out", report._replace(verified=VERIFIED))
  (tmp_path / "out" / "README.md").write_text("mine")
  found = extract_to(
    resume=True, policy=lambda s: dict.fromkeys(s.values, 3), rank=3
  )
  assert found == report._replace(verified=VERIFIED)


def test_a_policy_counts_by_the_ranks_it_gives(extract_to, tmp_path):
  """Also where modules got no rank, which are in no row of the report."""
  policy = lambda s: ranks.budget(s.values, s.unit_bytes, 300)  # noqa: E731
  report = extract_to(policy=policy)
  assert report.run["unlisted"]
  assert extract_to(resume=True, policy=policy) == report
  named = extract_to(
    resume=True,
    policy=lambda s: ranks.budget(s.values, s.unit_bytes, 299 + 1),
  )
  assert named == report
  for other in (None, lambda s: ranks.budget(s.values, s.unit_bytes, 500)):
    with pytest.raises(ValueError, match="The policy gives other ranks than"):
      extract_to(resume=True, policy=other)


# What makes a result, changed: options or files -> what the error names.
CHANGES = {
  "rank": ({"rank": 2}, "rank was 3, is 2"),
  "dtype": ({"dtype": jnp.bfloat16}, "dtype was float32, is bfloat16"),
  "factor": ({"factor": svd}, "factor was krylov, is svd"),
  "profile": ({"profile": VLLM}, "profile was PEFT, is vLLM"),
  "vocabulary": ({"vocabulary": common_rows}, "vocabulary was keep_whole"),
  "key": ({"key": jnp.ones(2, jnp.uint32)}, r"key was \[0, 0\], is \[1, 1\]"),
  "select": ({"select": matching(exclude=".*up_proj.*")}, "refused was"),
  "base_model": ({"base_model": "other"}, "base_model was base, is other"),
  "task_type": ({"task_type": "SEQ_CLS"}, "task_type was None, is SEQ_CLS"),
  "rename": ({"rename": lambda path: f"x.{path}"}, "rename was None"),
  "whole": ({"whole": ".*0.norm.*"}, "whole was None"),
  "split_bytes": ({"split_bytes": 16}, "split was"),
  "finetuned": ("finetuned/model.safetensors", "finetuned times was"),
  "base": ("base/model.safetensors", "base times was"),
  "config.json": ("base/config.json", "base was"),
  "tokenizer.json": ("finetuned/tokenizer.json", "finetuned was"),
  "gone": ("out/adapter_model.safetensors", "adapter_model.* is gone"),
  "changed": ("out/adapter_config.json", "adapter_config.json was changed"),
  "report": ("out/report.json", "report.json is not as it was written"),
}


def _change(file):
  """Changes a file: its content, or its time alone, or removes it."""
  if file.name == "model.safetensors":
    os.utime(file, ns=(0, 10**9))
  elif file.name == "adapter_model.safetensors":
    file.unlink()
  elif file.name == "report.json":
    file.write_text(file.read_text().replace("mse", "other"))
  else:
    file.write_text((file.read_text() if file.exists() else "{}") + " ")


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_made_a_result_counts_or_it_is_not_given(
  tmp_path, monkeypatch, change, message
):
  monkeypatch.setattr(runs, "Extractor", Extractor)
  config = {"vocab_size": 9}
  pair = write_pair(tmp_path, BASE, FINETUNED, config)
  extract = functools.partial(
    runs.extract_checkpoint, *pair, tmp_path / "out", log=io.StringIO()
  )
  options = {"rank": 3, "base_model": "base"}
  report = extract(**options)
  assert extract(**options, resume=True) == report
  if isinstance(change, dict):
    options |= change
  else:
    _change(tmp_path / change)
  before = files_of(tmp_path / "out")
  with pytest.raises(ValueError, match=message):
    extract(**options, resume=True)
  assert files_of(tmp_path / "out") == before
  assert extract(**options, overwrite=True)  # the way that errors tell


def test_the_same_files_elsewhere_are_another_run(tmp_path):
  pair = write_pair(tmp_path / "one", BASE, FINETUNED)
  extract = functools.partial(
    runs.extract_checkpoint, out=tmp_path / "out", rank=3, log=io.StringIO()
  )
  extract(*pair)
  (tmp_path / "link").symlink_to(tmp_path / "one")
  (tmp_path / "one").rename(tmp_path / "two")
  (tmp_path / "one").symlink_to(tmp_path / "two")
  with pytest.raises(ValueError, match="base paths was"):
    extract(*pair, resume=True)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_run_is_not_mixed_from_two_inputs(tmp_path, monkeypatch, side, file):
  """Its input is written anew between the first and the last tensor."""
  pair = write_pair(tmp_path, BASE, FINETUNED, {"vocab_size": 9})
  real = runs.choose_ranks

  def change(*args):
    os.utime(pair[side] / file, ns=(0, 10**9))
    return real(*args)

  monkeypatch.setattr(runs, "choose_ranks", change)
  with pytest.raises(ValueError, match="changed "):
    runs.extract_checkpoint(*pair, tmp_path / "out", rank=3, log=io.StringIO())
  assert not (tmp_path / "out" / "report.json").exists()


def test_nothing_is_written_to_what_is_read(pair, tmp_path):
  """By its own name, by a link, or as a folder that holds it."""
  (tmp_path / "link").symlink_to(pair[0])
  before = files_of(pair[0].parent)
  for out in (*pair, pair[0].parent, tmp_path / "link"):
    for way in ({}, {"overwrite": True}, {"resume": True}):
      with pytest.raises(ValueError, match="is or holds what is read"):
        runs.extract_checkpoint(*pair, out, rank=3, log=io.StringIO(), **way)
  assert files_of(pair[0].parent) == before


def test_a_folder_inside_an_input_changes_nothing_of_it(tmp_path):
  pair = write_pair(tmp_path, BASE, FINETUNED)
  before = files_of(pair[1])
  out = pair[1] / "adapter"
  extract = functools.partial(
    runs.extract_checkpoint, *pair, out, rank=3, log=io.StringIO()
  )
  assert extract(resume=True) == extract(resume=True)
  after = files_of(pair[1])
  assert {name: after[name] for name in before} == before
  assert sorted(after.keys() - before.keys()) == [
    f"adapter/{name}" for name in sorted(files_of(out))
  ]


def test_two_runs_at_once_are_one_and_an_error(
  extract_to, tmp_path, monkeypatch
):
  """The second ends at once, whatever it was told, and takes nothing away."""
  real, said = runs.choose_ranks, []

  def second(*args):
    monkeypatch.setattr(runs, "choose_ranks", real)
    for way in ({}, {"overwrite": True}, {"resume": True}):
      with pytest.raises(ValueError, match="being written by another run") as e:
        extract_to(**way)
      said.append(str(e.value))
    return real(*args)

  monkeypatch.setattr(runs, "choose_ranks", second)
  report = extract_to()
  assert len(said) == 3
  assert f"process {os.getpid()} on" in said[0]
  assert extract_to(resume=True) == report
  assert not list((tmp_path / "out").glob(".*"))


def test_links_in_the_output_are_not_written_through(extract_to, tmp_path):
  out, mine = tmp_path / "out", tmp_path / "mine"
  out.mkdir()
  names = ["adapter_model.safetensors", "adapter_config.json", "report.json"]
  for name in names:
    (tmp_path / name).write_text("precious")
    (out / name).symlink_to(tmp_path / name)
  mine.mkdir()
  (mine / "run.json").write_text("precious")
  (out / ".journal").symlink_to(mine)
  with pytest.raises(ValueError, match="is a link to .*mine; remove it"):
    extract_to(overwrite=True)
  (out / ".journal").unlink()
  extract_to(overwrite=True)
  assert not any((out / name).is_symlink() for name in names)
  assert all((tmp_path / name).read_text() == "precious" for name in names)
  assert (mine / "run.json").read_text() == "precious"


def test_resuming_with_other_options_names_them(
  extract_to, tmp_path, monkeypatch
):
  monkeypatch.setattr(runs, "write_adapter", _stop)
  with pytest.raises(KeyboardInterrupt):
    extract_to()
  monkeypatch.undo()
  monkeypatch.setattr(runs, "Extractor", shared_extractor)
  assert (tmp_path / "out" / FOLDER).exists()
  other = functools.partial(svd)
  for options, message in (
    ({"rank": 2}, "rank was 3, is 2"),
    ({"dtype": jnp.bfloat16}, "dtype was float32, is bfloat16"),
    ({"factor": other}, r"factor was krylov, is svd\(\)"),
    (
      {"factor": functools.partial(krylov, passes=3)},
      r"factor was krylov, is krylov\(passes=3\)",
    ),
    ({"split_bytes": 16}, "split was"),
    ({"key": jnp.ones(2, jnp.uint32)}, "key was"),
    ({"select": matching(exclude=".*up_proj.*")}, "refused was"),
  ):
    with pytest.raises(ValueError, match=message):
      extract_to(resume=True, **options)
  with pytest.raises(ValueError, match="is not empty"):
    extract_to()
  # The words of `key(0)`, which is the default.
  monkeypatch.setattr(runs, "Extractor", Extractor)
  extract_to(resume=True, key=jnp.zeros(2, jnp.uint32))


def test_a_name_is_the_same_in_every_process():
  named = fingerprints.name_of(
    functools.partial(svd, key=test_strangers_share_nothing)
  )
  assert named == "svd(key=<function test_strangers_share_nothing>)"


def _stop(*_, **__):
  raise KeyboardInterrupt


def test_another_finetune_is_another_run(extract_to, tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "write_adapter", _stop)
  with pytest.raises(KeyboardInterrupt):
    extract_to()
  base, other = write_pair(
    tmp_path / "other",
    BASE,
    FINETUNED | {"model.norm.weight": draw(8)},
  )
  with pytest.raises(ValueError, match="finetuned was .*, is "):
    runs.extract_checkpoint(
      base, other, tmp_path / "out", rank=3, resume=True, log=io.StringIO()
    )
