# SPDX-License-Identifier: Apache-2.0
"""Merges from disk to disk: as in memory, bounded, taken up again."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.arrays.sparsifiers import match_l1
from jlora.merging.arrays.task_vectors import by_mass_or_plus
from jlora.merging.checkpoints import merger
from jlora.merging.checkpoints import run as merge_runs
from jlora.merging.checkpoints.merger import Merger
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.report import MERGE
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.runs.journal import FOLDER
from jlora.runs.pool import open_pool
from tests.jlora.checkpoints.test_quantised import quantise

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "dtype": "float32"}


def draw(seed, count=3, dtype=np.float32):
  rng = np.random.default_rng(seed)
  shapes = {"model.embed_tokens.weight": (11, 8)}
  for at in range(count):
    shapes[f"model.layers.{at}.self_attn.q_proj.weight"] = (12, 8)
    shapes[f"model.layers.{at}.mlp.up_proj.weight"] = (12, 8)
  shapes |= {"model.norm.weight": (8,), "lm_head.weight": (11, 8)}
  return {
    name: rng.standard_normal(shape, np.float32).astype(dtype)
    for name, shape in shapes.items()
  }


def write(folder, tensors, config=CONFIG):
  spec = {name: (x.shape, x.dtype) for name, x in tensors.items()}
  folder.mkdir(parents=True)
  stream_checkpoint(folder, spec, tensors.items())
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "tokenizer.json").write_text('{"of": "' + folder.name + '"}')
  return str(folder)


@pytest.fixture
def models(tmp_path):
  """Paths of a base and of two finetunes."""
  base = draw(0)
  found = [write(tmp_path / "base", base)]
  for seed in (1, 2):
    change = draw(seed)
    tuned = {name: base[name] + change[name] / 10 for name in base}
    found.append(write(tmp_path / f"tuned{seed}", tuned))
  return found


def run(recipe, out, **options):
  return merge_checkpoints(recipe, out, log=io.StringIO(), **options)


def whole(*paths):
  return (Slice(tuple(Input(path) for path in paths)),)


def contents(folder):
  return {
    file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()
  }


@pytest.fixture
def small_pieces(monkeypatch):
  """Tensors of these tests are then several pieces."""
  for name, value in (("_PIECE", 64), ("_SMALL", 32), ("_ROW", 8)):
    monkeypatch.setattr(merger, name, value)


METHODS = {
  "linear": jlora.merging.linear,
  "nuslerp": jlora.merging.nuslerp,
  "ties": functools.partial(jlora.merging.ties, elect=by_mass_or_plus),
  "dare": functools.partial(jlora.merging.dare, density=0.5, rescale=match_l1),
}


@pytest.mark.parametrize("name", METHODS)
def test_as_in_memory(name, models, tmp_path):
  base, *tuned = (dict(open_checkpoint(path)) for path in models)
  key = jax.random.key(3)
  expected = jlora.merge(tuned, method=METHODS[name], base=base, key=key)
  recipe = Recipe(METHODS[name], whole(*models[1:]), base=models[0])
  run(recipe, tmp_path / "out", key=key)
  found = open_checkpoint(tmp_path / "out")
  assert set(found) == set(expected)
  for path in expected:
    np.testing.assert_allclose(
      found[path], expected[path], rtol=1e-5, atol=1e-6
    )


def test_weights_of_inputs_gradients_and_filters(models, tmp_path):
  """Numbers are arguments of one program, whichever layer they are of."""
  settings = {"weight": [{"filter": "norm", "value": 3}, {"value": [0.0, 1.0]}]}
  inputs = (Input(models[1], None, settings), Input(models[2]))
  method = functools.partial(jlora.merging.linear, normalize=False)
  recipe = Recipe(method, (Slice(inputs),), {"weight": 0.5})
  run(recipe, tmp_path / "out")
  one, two = (open_checkpoint(path) for path in models[1:])
  found = open_checkpoint(tmp_path / "out")
  weights = {f"model.layers.{i}.mlp.up_proj.weight": i / 2 for i in range(3)}
  weights |= {"model.norm.weight": 3.0, "lm_head.weight": 0.0}
  for name, weight in weights.items():
    np.testing.assert_allclose(
      found[name], weight * one[name] + 0.5 * two[name], rtol=1e-6, atol=1e-6
    )


def test_a_setting_is_one_for_all_unless_an_input_has_its_own(models, tmp_path):
  inputs = whole(*models[1:])
  recipe = Recipe(jlora.merging.sce, inputs, {"density": 0.5}, base=models[0])
  run(recipe, tmp_path / "sce")
  own = (Slice((Input(models[1], None, {"density": 0.5}), Input(models[2]))),)
  recipe = Recipe(jlora.merging.ties, own, {"density": 1.0}, base=models[0])
  run(recipe, tmp_path / "ties")
  base, *tuned = (dict(open_checkpoint(path)) for path in models)
  expected = jlora.merge(
    tuned,
    method=jlora.merging.ties,
    base=base,
    settings={"density": [0.5, 1.0]},
  )
  found = open_checkpoint(tmp_path / "ties")
  name = "model.layers.1.mlp.up_proj.weight"
  np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_folder_is_a_checkpoint(models, tmp_path):
  recipe = Recipe(
    jlora.merging.linear,
    whole(*models[1:]),
    reference=models[0],
    dtype="bfloat16",
  )
  report = run(recipe, tmp_path / "out", max_shard_bytes=300)
  files = contents(tmp_path / "out")
  assert json.loads(files["config.json"])["dtype"] == "bfloat16"
  assert files["tokenizer.json"] == b'{"of": "base"}'
  assert len([name for name in files if name.endswith(".safetensors")]) > 3
  found = open_checkpoint(tmp_path / "out")
  assert {spec.dtype for spec in found.spec.values()} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  assert found.metadata["format"] == "pt"
  assert report.tensors == len(found)
  assert not (tmp_path / "out" / FOLDER).exists()
  again = run(recipe, tmp_path / "out", max_shard_bytes=300, resume=True)
  assert again == report


STEMS = ("diffusion_pytorch_model", "model", "model.fp16")


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("is_cut", [False, True])
def test_files_keep_the_references_names(stem, is_cut, tmp_path):
  """By which libraries find them; diffusers has a name of its own."""
  tensors = {name: np.ones(8, np.float32) for name in "vw"}
  for name in "ab":
    (tmp_path / name).mkdir()
    file = tmp_path / name / f"{stem}.safetensors"
    write_safetensors(file, tensors)
    (tmp_path / name / "config.json").write_text('{"_class_name": "UNet"}')
  models = [str(tmp_path / name) for name in "ab"]
  out = tmp_path / "out"
  limit = {"max_shard_bytes": 32 if is_cut else 2**20}
  run(Recipe(jlora.merging.linear, whole(*models)), out, **limit)
  written = sorted(contents(out).keys() - {"config.json", MERGE})
  cut = [f"{stem}-0000{at}-of-00002.safetensors" for at in (1, 2)]
  cut.append(f"{stem}.safetensors.index.json")
  assert written == (cut if is_cut else [f"{stem}.safetensors"])
  again = whole(str(out), models[1])  # and so do the results of a result
  run(Recipe(jlora.merging.linear, again), tmp_path / "again", **limit)
  assert sorted(contents(tmp_path / "again")) == sorted(contents(out))
  np.testing.assert_array_equal(open_checkpoint(out)["w"], tensors["w"])


def test_an_adapter_on_a_base_is_a_model(models, tmp_path):
  name = "model.layers.1.mlp.up_proj.weight"
  base = open_checkpoint(models[0])
  rng = np.random.default_rng(5)
  lora = jlora.Lora(
    rng.standard_normal((2, 8), np.float32),
    rng.standard_normal((2, 12), np.float32),
    np.float32(1),
  )
  jlora.save_peft(tmp_path / "lora", {name: lora}, like=base.spec)
  adapted = f"{models[0]}+{tmp_path / 'lora'}"
  run(Recipe(jlora.merging.linear, whole(adapted, models[1])), tmp_path / "out")
  found = open_checkpoint(tmp_path / "out")
  change = (lora.a.T @ lora.b).T
  expected = (base[name] + change + open_checkpoint(models[1])[name]) / 2
  np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
  kept = Recipe(jlora.merging.passthrough, whole(adapted))
  run(kept, tmp_path / "kept")
  np.testing.assert_allclose(
    open_checkpoint(tmp_path / "kept")[name],
    base[name] + change,
    rtol=1e-6,
    atol=1e-6,
  )


@pytest.fixture
def grown(tmp_path):
  """A finetune with two more tokens."""
  tensors = draw(7)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors[name] = np.concatenate([tensors[name], np.ones((2, 8), "f4")])
  return write(tmp_path / "grown", tensors)


def test_a_vocabulary_that_differs(models, grown, tmp_path):
  name = "lm_head.weight"
  base, more = (open_checkpoint(path)[name] for path in (models[0], grown))
  recipe = Recipe(jlora.merging.linear, whole(models[0], grown))
  with pytest.raises(ValueError, match="vocabulary"):
    run(recipe, tmp_path / "none")
  assert not (tmp_path / "none").exists()
  common = recipe._replace(vocabulary=jlora.pairing.common_rows)
  report = run(common, tmp_path / "common")
  found = open_checkpoint(tmp_path / "common")[name]
  np.testing.assert_allclose(found, (base + more[:11]) / 2, rtol=1e-6)
  assert any("vocabulary" in note for note in report.notes)
  run(common._replace(reference=grown), tmp_path / "more")
  found = open_checkpoint(tmp_path / "more")[name]
  np.testing.assert_allclose(found[:11], (base + more[:11]) / 2, rtol=1e-6)
  np.testing.assert_allclose(found[11:], more[11:])  # the reference's rows
  run(recipe._replace(vocabulary=jlora.pairing.keep_whole), tmp_path / "kept")
  np.testing.assert_array_equal(open_checkpoint(tmp_path / "kept")[name], base)


def test_a_head_of_its_own_unties(models, tmp_path):
  tensors = draw(9)
  del tensors["lm_head.weight"]
  config = {**CONFIG, "tie_word_embeddings": True}
  tied = write(tmp_path / "tied", tensors, config)
  run(Recipe(jlora.merging.linear, whole(tied, models[1])), tmp_path / "out")
  found = open_checkpoint(tmp_path / "out")
  head = open_checkpoint(models[1])["lm_head.weight"]
  expected = (tensors["model.embed_tokens.weight"] + head) / 2
  np.testing.assert_allclose(found["lm_head.weight"], expected, rtol=1e-6)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["tie_word_embeddings"] is False


def test_what_does_not_fit_is_said_before_anything_is_written(models, tmp_path):
  less, wide, deep = draw(3), draw(4), draw(5, count=4)
  del less["model.norm.weight"]
  wide["model.norm.weight"] = np.ones(9, np.float32)
  cases = [
    (write(tmp_path / "less", less), "less lacks model.norm.weight"),
    (write(tmp_path / "wide", wide), r"model.norm.weight \(8,\) against \(9,"),
    (write(tmp_path / "deep", deep), "Only .*deep has model.layers.3"),
    (str(tmp_path / "nowhere"), "nowhere does not exist"),
  ]
  for other, said in cases:
    with pytest.raises(ValueError, match=said):
      run(
        Recipe(jlora.merging.linear, whole(models[1], other)), tmp_path / "out"
      )
  bad = {
    "sum": Recipe(
      jlora.merging.linear,
      (Slice((Input(models[1], None, {"weight": -1}), Input(models[2]))),),
    ),
    "t": Recipe(jlora.merging.slerp, whole(*models)),
    "density": Recipe(
      jlora.merging.ties, whole(*models[1:]), {"density": 2.0}, base=models[0]
    ),
    "condition": Recipe(
      jlora.merging.linear, whole(*models[1:]),
      {"weight": [{"filter": "mlp", "value": 1.0}]},
    ),
  }  # fmt: skip
  said = {
    "sum": "weight: weights .* sum to zero",
    "t": "slerp merges 2 models, got 3",
    "density": r"density .*2.0.* must lie in",
    "condition": "none of its conditions holds",
  }
  for name, recipe in bad.items():
    with pytest.raises(ValueError, match=said[name]):
      run(recipe, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_floating_must_agree(tmp_path):
  for name, step in (("a", 1), ("b", 1), ("c", 2)):
    tensors = {"w": np.ones(2, np.float32), "step": np.int64([step])}
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  paths = {name: str(tmp_path / f"{name}.safetensors") for name in "abc"}
  run(
    Recipe(jlora.merging.linear, whole(paths["a"], paths["b"])),
    tmp_path / "out",
  )
  assert open_checkpoint(tmp_path / "out")["step"] == [1]
  with pytest.raises(ValueError, match="step: not floating"):
    run(
      Recipe(jlora.merging.linear, whole(paths["a"], paths["c"])),
      tmp_path / "no",
    )


def test_a_folder_that_is_not_empty(models, tmp_path):
  recipe = Recipe(jlora.merging.linear, whole(*models[1:]))
  out = tmp_path / "out"
  out.mkdir()
  (out / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"is not empty \(notes.txt\)"):
    run(recipe, out)
  run(recipe, out, overwrite=True, max_shard_bytes=300)
  run(recipe, out, overwrite=True)  # fewer files than before
  assert (out / "notes.txt").read_text() == "mine"
  assert len(open_checkpoint(out)) == len(open_checkpoint(models[0]))


def test_another_merge_replaces_the_first_ones_weights(models, tmp_path):
  out, name = tmp_path / "out", "model.norm.weight"
  for path in models:
    run(Recipe(jlora.merging.passthrough, whole(path)), out, overwrite=True)
    np.testing.assert_array_equal(
      open_checkpoint(out)[name], open_checkpoint(path)[name]
    )


def test_progress_is_by_bytes(models, tmp_path):
  log = io.StringIO()
  merge_checkpoints(
    Recipe(jlora.merging.linear, whole(*models[1:])), tmp_path / "out", log=log
  )
  assert log.getvalue().startswith("100% ")
  assert log.getvalue().endswith(", 0 s left\n")
  assert "error" not in log.getvalue()


def test_a_run_that_failed_goes_on(models, tmp_path, monkeypatch):
  recipe = Recipe(jlora.merging.ties, whole(*models[1:]), base=models[0])
  run(recipe, tmp_path / "whole", max_shard_bytes=500)
  real, made = Merger.__call__, []

  def failing(self, job, *more):
    if len(made) == 5:
      raise KeyboardInterrupt
    made.append(job.name)
    return real(self, job, *more)

  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    patch.setattr(Merger, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
      run(recipe, out, max_shard_bytes=500)
  with pytest.raises(ValueError, match="Use resume=True to continue"):
    run(recipe, out, max_shard_bytes=500)
  other = recipe._replace(settings={"density": 0.5})
  with pytest.raises(ValueError, match="belongs to another run: settings"):
    run(other, out, max_shard_bytes=500, resume=True)
  kept = {file.name for file in (out / FOLDER / "shards").iterdir()}
  assert kept

  def counting(self, job, *more):
    made.append(job.name)
    return real(self, job, *more)

  made.clear()
  monkeypatch.setattr(Merger, "__call__", counting)
  run(recipe, out, max_shard_bytes=500, resume=True)
  assert 0 < len(made) < len(open_checkpoint(out))
  assert contents(out) == contents(tmp_path / "whole")


PEAK = """
import io, sys
import jlora
import functools
from jlora.merging.checkpoints import run
from jlora.runs.pool import finish_in_order
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
run.finish_in_order = functools.partial(finish_in_order, memory=0)
method, *folders = sys.argv[1:]
def peak_of(folder):
  base, one, two = (f"{folder}/{name}.safetensors" for name in "abc")
  slices = (Slice((Input(one), Input(two))),)
  recipe = Recipe(getattr(jlora.merging, method), slices, base=base)
  jlora.merge_checkpoints(recipe, f"{folder}/{method}", log=io.StringIO())
  status = open("/proc/self/status").read()  # unlike rusage, of this program
  return int(status.split("VmHWM:")[1].split()[0]) * 1024
small, large = map(peak_of, folders)
print(large - small)
"""


@pytest.fixture(scope="module")
def folders_by_rows(tmp_path_factory):
  """Folders of three models each, by the rows of their tensors."""
  folders = {}
  for rows in (2**4, 2**9, 2**11, 2**13):
    folder = folders[rows] = tmp_path_factory.mktemp("models")
    w = np.random.default_rng(0).standard_normal((rows, 2**12), np.float32)
    tensors = {f"layers.{at}.q.weight": w for at in range(3)}
    write_safetensors(folder / "a.safetensors", tensors)
    for name in "bc":
      os.link(folder / "a.safetensors", folder / f"{name}.safetensors")
  yield folders
  for folder in folders.values():
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  ("method", "small", "large", "copies"),
  # Three copies for each of three models. Pieces are below 2**9 rows; those in
  # work add up to 50 MiB on a busy machine, so 2**13 rows, 128 MiB.
  [("ties", 2**4, 2**11, 3 * 3), ("task_arithmetic", 2**9, 2**13, 1)],
)
def test_memory_is_bounded_by_the_largest_tensor(
  method, small, large, copies, folders_by_rows
):
  """Merging larger tensors takes copies of what they are larger by."""
  done = subprocess.run(
    [sys.executable, "-c", PEAK, method]
    + [folders_by_rows[rows] for rows in (small, large)],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert int(done.stdout) < copies * (large - small) * 2**12 * 4


def test_two_threads_or_one_the_same_bytes(
  models, tmp_path, monkeypatch, small_pieces
):
  recipe = Recipe(METHODS["dare"], whole(*models[1:]), base=models[0])
  run(recipe, tmp_path / "many")
  one = functools.partial(open_pool, 1)
  monkeypatch.setattr(merge_runs, "open_pool", one)
  run(recipe, tmp_path / "one")
  assert contents(tmp_path / "many") == contents(tmp_path / "one")
  assert MERGE in contents(tmp_path / "one")


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_dare_keeps_its_share_and_the_mean(density, tmp_path, small_pieces):
  """Of many draws, in pieces: as many as the density says, the mean the sum."""
  shape = (40, 50)
  for at, name in enumerate("abc"):
    w = np.full(shape, (1.0, 3.0, 0.0)[at], np.float32)
    write_safetensors(tmp_path / f"{name}.safetensors", {"w": w})
  base, *tuned = (str(tmp_path / f"{name}.safetensors") for name in "abc")
  method = functools.partial(jlora.merging.dare, density=density)
  recipe = Recipe(method, whole(*tuned), base=base)
  found = []
  for seed in range(6):
    run(recipe, tmp_path / "out", key=jax.random.key(seed), overwrite=True)
    found.append(np.float64(open_checkpoint(tmp_path / "out")["w"]))
  # Changes are 2 and -1, so the sum says which were kept.
  sums = (np.stack(found) - 1) * np.float64(density)
  kept = np.stack(
    [np.isin(sums.round(4), values) for values in ((2, 1), (-1, 1))]
  )
  assert np.isin(sums.round(4), (0, 1, 2, -1)).all()
  error = np.sqrt(density * (1 - density) / kept[0].size)
  np.testing.assert_allclose(kept.mean((1, 2, 3)), density, atol=5 * error)
  both = (
    kept[0] & kept[1]
  ).mean()  # masks of models know nothing of each other
  np.testing.assert_allclose(both, density**2, atol=5 * error)
  mean = np.mean(found)
  np.testing.assert_allclose(mean, 1 + 2 - 1, atol=5 * 5**0.5 * error / density)
  again = (kept[0][0] == kept[0][1]).mean()  # another key, another mask
  chance = density**2 + (1 - density) ** 2
  assert abs(again - chance) < 5 * np.sqrt(chance * (1 - chance) / sums[0].size)


def test_no_parameters_are_copied_from_the_reference(tmp_path):
  """They are not averaged, cast or asked of the others, and are told."""
  name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
  base, other = draw(0), draw(1)
  base |= {name.format(0): np.float32([1, 1 / 3]), "position_ids": np.arange(3)}
  other |= {
    name.format(0): np.float32([7, 7]),
    name.format(1): np.ones(2, "f4"),
  }
  one, two = write(tmp_path / "one", base), write(tmp_path / "two", other)
  recipe = Recipe(jlora.merging.linear, whole(one, two), dtype="bfloat16")
  report = run(recipe, tmp_path / "out")
  found = open_checkpoint(tmp_path / "out")
  assert found.keys() == base.keys()
  for kept in (name.format(0), "position_ids"):
    np.testing.assert_array_equal(found[kept], base[kept])
    assert found[kept].dtype == base[kept].dtype
  notes = [note for note in report.notes if name.format(1) in note]
  assert len(notes) == 1
  assert "no parameters, of" in notes[0]


def test_a_packed_model_is_refused_by_name(tmp_path):
  tensors = draw(0)
  packed = {f"{n}_packed": np.zeros((2, 2), np.int32) for n in tensors}
  packed |= {f"{n}_scale": np.ones((2, 1), np.float32) for n in tensors}
  one, two = write(tmp_path / "one", tensors), write(tmp_path / "two", packed)
  with pytest.raises(ValueError, match=r"two is quantised \(compressed-tens"):
    run(Recipe(jlora.merging.linear, whole(one, two)), tmp_path / "out")


def test_a_model_in_four_bits_is_merged_by_its_values(tmp_path):
  """Its result is floating, and its configuration says nothing else."""
  name = "model.layers.0.self_attn.q_proj.weight"
  tensors = draw(0)
  made, values = quantise(tensors[name], "nf4", 16)
  packed = {n: x for n, x in tensors.items() if n != name}
  packed |= {n.replace("m.weight", name, 1): x for n, x in made.items()}
  config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
  one = write(tmp_path / "one", packed, config)
  two = write(tmp_path / "two", tensors)
  run(Recipe(jlora.merging.linear, whole(one, two)), tmp_path / "out")
  found = open_checkpoint(tmp_path / "out")
  assert found.keys() == tensors.keys()
  assert "quantization_config" not in found.config
  expected = (values + tensors[name]) / 2
  np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
