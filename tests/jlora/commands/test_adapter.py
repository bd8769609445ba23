# SPDX-License-Identifier: Apache-2.0
"""`jlora adapter`: shown, converted, resized, joined; on files."""

import json

import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, save_orbax, write_safetensors
from jlora.commands import adapter as command
from jlora.commands import entry, extract
from jlora.formats import (
  open_adapter,
  save_diffusers,
  save_kohya,
  save_peft,
  save_qwix,
)
from jlora.loras import Lora
from tests.helpers.image_adapters import FAMILIES, draw, product


@pytest.fixture
def run(capsys):
  def start(*words):
    code = entry.run(command.COMMAND, [str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err

  return start


@pytest.fixture
def kohya(tmp_path):
  path = tmp_path / "kohya.safetensors"
  save_kohya(path, draw(FAMILIES["sdxl"]), like=FAMILIES["sdxl"])
  return path


def differs(found, want):
  return np.linalg.norm(found - want) / np.linalg.norm(want)


def test_show_tells_what_headers_tell(run, kohya):
  code, said = run("show", kohya)
  assert code == 0
  assert "kohya, family sdxl" in said
  assert "ranks: 2 (" in said
  assert "alphas: 3 (" in said
  code, said = run("show", kohya, "--json")
  assert json.loads(said)["family"] == "sdxl"
  assert len(json.loads(said)["modules"]) == len(FAMILIES["sdxl"])


def test_there_and_back_is_the_same_bytes(run, tmp_path):
  first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
  shapes = FAMILIES["sdxl"]
  save_kohya(first, draw(shapes, ranks=(2,)), like=shapes)
  assert run("convert", first, "--format=diffusers", f"--out={second}")[0] == 0
  code, said = run("convert", second, "--format=kohya", f"--out={third}")
  assert (code, said) == (0, f"written: {third} (kohya)\n")
  assert first.read_bytes() == third.read_bytes()


@pytest.mark.parametrize("name", ["diffusers", "kohya", "comfy"])
def test_convert_keeps_the_change(run, kohya, tmp_path, name):
  out = tmp_path / "out.safetensors"
  code, said = run("convert", kohya, f"--format={name}", f"--out={out}")
  assert code == 0, said
  old, new = open_adapter(kohya), open_adapter(out)
  assert set(old) == set(new)
  worst = max(differs(product(new[m]), product(old[m])) for m in old)
  assert worst < 2e-3


def test_a_peft_folder_goes_out_and_comes_back(run, tmp_path):
  base = {
    f"h.{i}.{x}.weight": np.ones((4, 6), "f4") for i in (0, 1) for x in "qk"
  }
  (tmp_path / "base").mkdir()
  write_safetensors(tmp_path / "base" / "model.safetensors", base)
  loras = {
    name: Lora(np.ones((2, 6), "f4"), np.full((2, 4), 0.5, "f4"), np.float32(3))
    for name in ("h.0.q.weight", "h.1.k.weight")
  }
  save_peft(tmp_path / "one", loras, like=base)
  small = tmp_path / "small"
  words = (f"--base={tmp_path / 'base'}", f"--out={small}", "--rank=1")
  code, said = run("resize", tmp_path / "one", *words)
  assert code == 0, said
  assert "rank 2 -> 1  kept 1.0000" in said
  assert "relative error of all modules: 0.0000" in said
  found = open_adapter(small, base)
  assert set(found) == {"h.0.q", "h.1.k"}
  np.testing.assert_allclose(product(found["h.0.q"]), 3.0, atol=5e-3)
  code, said = run("resize", tmp_path / "one", "--rank=1", f"--out={small}x")
  assert code == 1
  assert "give the model, --base=DIR" in said


def test_resize_prints_every_module_and_the_whole(run, kohya, tmp_path):
  out = tmp_path / "small.safetensors"
  words = (f"--out={out}", "--policy=norm", "--share=0.8", "--conv_rank=1")
  code, said = run("resize", kohya, *words)
  assert code == 0, said
  assert said.count("->") == len(FAMILIES["sdxl"])
  old, new = open_adapter(kohya), open_adapter(out)
  lost = sum(
    np.linalg.norm(product(new[m]) - product(old[m])) ** 2 for m in old
  )
  held = sum(np.linalg.norm(product(old[m])) ** 2 for m in old)
  told = float(said.partition("of all modules: ")[2].split()[0])
  assert told == pytest.approx((lost / held) ** 0.5, abs=2e-4)
  assert {new.ranks[m] for m, s in new.shapes.items() if s[2:] == (3, 3)} == {1}


@pytest.mark.parametrize(
  "words",
  [("energy", "share=0.9"), ("sum", "share=0.5"), ("ratio", "ratio=3"),
   ("threshold", "threshold=20"), ("quantile", "quantile=0.5"),
   ("budget", "budget_mib=0.004")],
)  # fmt: skip
def test_every_policy_is_known_and_needs_its_number(
  run, kohya, tmp_path, words
):
  policy, number = words
  out = tmp_path / f"{policy}.safetensors"
  code, said = run("resize", kohya, f"--out={out}", f"--policy={policy}")
  assert code == 1
  assert f"--policy={policy} needs --{number.partition('=')[0]}" in said
  code, said = run(
    "resize",
    kohya,
    f"--out={out}",
    f"--policy={policy}",
    f"--{number}",
    "--json",
  )
  assert code == 0, said
  rows = json.loads(said)["modules"].values()
  assert all(row["new"] <= row["old"] for row in rows)
  assert any(row["new"] < row["old"] for row in rows)


def test_join_is_exact_or_cut(run, tmp_path):
  shapes = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (8, 8),
  }
  paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
  for seed, path in enumerate(paths):
    save_diffusers(path, draw(shapes, seed=seed), like=shapes)
  one, two = (open_adapter(path) for path in paths)
  for more, ranks in (((), [4, 6]), (("--rank=3",), [3, 3])):
    out = tmp_path / f"out{len(more)}.safetensors"
    code, said = run("join", *paths, "--weights=1,-0.5", f"--out={out}", *more)
    assert code == 0, said
    found = open_adapter(out)
    assert sorted(found.ranks.values()) == ranks
    if not more:
      for module in shapes:
        want = product(one[module]) - 0.5 * product(two[module])
        assert differs(product(found[module]), want) < 2e-3


def test_mistakes_are_one_line(run, kohya, tmp_path):
  out = tmp_path / "x.safetensors"
  for words, told in (
    ((), "say show, convert, resize, join"),
    (("turn", kohya), "say show, convert, resize, join"),
    (("convert", kohya), "--out must be given"),
    (("convert", kohya, kohya), "convert takes one adapter, got 2"),
    (("show",), "show needs an adapter's path"),
    (("resize", kohya, f"--out={out}"), "resize needs --rank, or a --policy"),
    (("join", kohya, kohya, "--weights=1", f"--out={out}"), "as many weights"),
    (("join", kohya, "--weights=a", f"--out={out}"), "must be numbers"),
    (("convert", kohya, f"--out={kohya}"), "Give another"),
  ):
    code, said = run(*words)
    assert code == 1
    assert told in said
    assert said.count("\n") == 1
  assert not out.exists()


def test_what_is_not_carried_is_listed_by_reason(run, tmp_path):
  path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
  shapes = {"unet.conv_in": (8, 4), "unet.conv_out": (4, 8)}
  shifts = {"unet.conv_norm_out.weight": np.ones(4, "f4")}
  how = {"like": shapes, "family": "sd1", "shifts": shifts}
  save_kohya(path, draw(shapes), **how)
  code, said = run("convert", path, "--format=diffusers", f"--out={out}")
  assert code == 0, said
  assert "not carried: 1, unet.conv_norm_out.weight" in said
  assert "diffusers adds LoRAs alone" in said


def test_an_extraction_is_written_in_further_formats(tmp_path):
  """The changes of the PEFT folder, but for what kohya's networks lack."""
  rng = np.random.default_rng(0)
  shapes = {m.removeprefix("unet."): s for m, s in FAMILIES["sd1"].items()
            if m.startswith("unet.")}  # fmt: skip
  base = {f"{m}.weight": rng.standard_normal(s, np.float32)
          for m, s in shapes.items()}  # fmt: skip
  base["conv_norm_out.weight"] = np.ones(8, np.float32)
  tuned = {n: x + 0.1 * rng.standard_normal(x.shape, np.float32)
           for n, x in base.items()}  # fmt: skip
  paths = [tmp_path / name for name in ("base", "tuned")]
  for path, tensors in zip(paths, (base, tuned), strict=True):
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors)
  out = tmp_path / "out"
  words = (f"--base={paths[0]}", f"--finetuned={paths[1]}", f"--out={out}",
           "--rank=2", "--task_type=none", "--format=diffusers",
           "--format=comfy", "--format=kohya")  # fmt: skip
  assert entry.run(extract.COMMAND, words) == 0
  peft = open_adapter(out, base)
  files = {"diffusers": "pytorch_lora_weights", "comfy": "comfy",
           "kohya": "kohya"}  # fmt: skip
  for name, file in files.items():
    found = open_adapter(out / "formats" / f"{file}.safetensors", base)
    assert found.family == "sd1"
    assert set(found) <= set(peft)
    assert (
      len(found) < len(peft) if name == "kohya" else len(found) == len(peft)
    )
    for module, lora in found.items():
      assert differs(product(lora), product(peft[module])) < 2e-3
    if name != "diffusers":
      change = tuned["conv_norm_out.weight"] - base["conv_norm_out.weight"]
      stored = found.shifts["conv_norm_out.weight"]
      np.testing.assert_allclose(stored, change, atol=1e-3)


X = "transformer.x_embedder"


def write(path, tensors):
  write_safetensors(path, {k: np.asarray(x, "f4") for k, x in tensors.items()})
  return path


@pytest.fixture
def flux(tmp_path):
  rng = np.random.default_rng(0)
  return write(
    tmp_path / "flux.safetensors",
    {
      f"{X}.lora_A.weight": rng.standard_normal((2, 8)),
      f"{X}.lora_B.weight": rng.standard_normal((8, 2)),
      f"{X}.diff_b": np.ones(8),
    },
  )


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["join", "--weights=0.5"], "1 changes are stored whole"),
    (["convert", "--rank=1"], "convert has no use for --rank"),
    (["resize", "--rank=1", "--share=0.5"], "no use for --share"),
    (["resize", "--rank=1", "--weights=2"], "no use for --weights"),
    (["resize", "--policy=budget", "--budget_mib=inf"], "finite; got inf"),
    (["resize", "--policy=budget", "--budget_mib=nan"], "finite; got nan"),
  ],
)
def test_no_flag_is_passed_over(run, flux, tmp_path, words, said):
  out = tmp_path / "out.safetensors"
  code, told = run(words[0], flux, *words[1:], f"--out={out}", "--format=comfy")
  assert code == 1
  assert said in told
  assert not out.exists()


def test_the_base_is_never_written_to(run, flux, tmp_path):
  base = write(tmp_path / "base.safetensors", {"x_embedder.weight": np.eye(8)})
  before = base.read_bytes()
  code, said = run("convert", flux, f"--base={base}", f"--out={base}",
                   "--format=comfy", "--family=flux")  # fmt: skip
  assert code == 1
  assert "is or holds what is read" in said
  assert base.read_bytes() == before


def test_a_folder_is_no_file(run, flux, tmp_path):
  (tmp_path / "folder").mkdir()
  code, said = run("convert", flux, f"--out={tmp_path}/folder",
                   "--format=comfy", "--family=flux")  # fmt: skip
  assert (code, "is a folder; give the name of a file" in said) == (1, True)


def test_names_with_and_without_component_are_not_joined(run, flux, tmp_path):
  rng, name = np.random.default_rng(1), "context_embedder"
  other = write(
    tmp_path / "other.safetensors",
    {
      f"{name}.lora_A.weight": rng.standard_normal((2, 8)),
      f"{name}.lora_B.weight": rng.standard_normal((8, 2)),
    },
  )
  mine = write(
    tmp_path / "mine.safetensors",
    {
      f"{X}.lora_A.weight": rng.standard_normal((2, 8)),
      f"{X}.lora_B.weight": rng.standard_normal((8, 2)),
    },
  )
  out = tmp_path / "out.safetensors"
  code, said = run("join", mine, other, f"--out={out}", "--format=diffusers")
  assert code == 1
  assert "1 of 2 names have a pipeline's component in front" in said


def test_a_part_without_a_change_is_resized_to_rank_0(run, tmp_path):
  stem = "lora_unet_double_blocks_0_img_attn_qkv"
  rng = np.random.default_rng(2)
  up = np.zeros((24, 4))
  up[:8, :2], up[16:, 2:] = rng.standard_normal((2, 8, 2))
  path = write(
    tmp_path / "qkv.safetensors",
    {
      f"{stem}.lora_down.weight": rng.standard_normal((4, 8)),
      f"{stem}.lora_up.weight": up,
    },
  )
  out = tmp_path / "out.safetensors"
  code, said = run("resize", path, "--rank=1", f"--out={out}",
                   "--family=flux")  # fmt: skip
  assert code == 0, said
  assert "to_k  rank 0 -> 0  kept 1.0000" in said
  assert open_adapter(out).ranks["transformer.transformer_blocks.0.attn.to_q"]


@pytest.fixture
def llamas(tmp_path):
  """Two small Llamas and their parameters."""
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens": (12, 8), "model.norm": (8,),
            "lm_head": (12, 8)}  # fmt: skip
  for i in range(3):
    shapes |= {f"model.layers.{i}.mlp.{n}_proj": (6, 8) for n in ("up", "gate")}
  base = {f"{m}.weight": rng.standard_normal(s, np.float32)
          for m, s in shapes.items()}  # fmt: skip
  tuned = {n: x + 0.1 * rng.standard_normal(x.shape, np.float32)
           for n, x in base.items()}  # fmt: skip
  config = {"model_type": "llama", "num_hidden_layers": 3,
            "architectures": ["LlamaForCausalLM"],
            "tie_word_embeddings": False}  # fmt: skip
  paths = [tmp_path / name for name in ("base", "tuned")]
  for path, tensors in zip(paths, (base, tuned), strict=True):
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
  return paths


def test_adapters_of_language_models_go_to_mlx_and_back(run, llamas, tmp_path):
  base, tuned = llamas
  out, again, back = (tmp_path / name for name in ("out", "mlx", "back"))
  words = (f"--base={base}", f"--finetuned={tuned}", f"--out={out}",
           "--rank=2", "--format=mlx")  # fmt: skip
  assert entry.run(extract.COMMAND, words) == 0
  peft, found = open_adapter(out, base), open_adapter(out / "formats/mlx")
  assert set(found) == set(peft)
  for module, lora in found.items():
    assert differs(product(lora), product(peft[module])) < 2e-3
  how = (f"--base={base}", "--format=mlx", f"--out={again}")
  code, said = run("convert", out, *how)
  assert code == 0, said
  assert "not carried: 1, model.norm.weight" in said
  for module, lora in open_adapter(again, base).items():
    assert differs(product(lora), product(peft[module])) < 2e-3
  code, said = run("convert", again, f"--base={base}", "--format=peft",
                   f"--out={back}")  # fmt: skip
  assert code == 0, said
  for module, lora in open_adapter(back, base).items():
    assert differs(product(lora), product(peft[module])) < 4e-3
  code, said = run("show", again)
  assert code == 0
  assert "mlx, family unknown" in said
  code, said = run("convert", out, "--format=mlx", f"--out={again}x")
  assert code == 1
  assert "MLX needs the model's config.json: give it, --base=DIR." in said


def test_adapters_of_language_models_go_to_tunix_and_back(
  run, llamas, tmp_path
):
  base, tuned = llamas
  out, again = tmp_path / "out", tmp_path / "again"
  words = (f"--base={base}", f"--finetuned={tuned}", f"--out={out}",
           "--rank=2", "--format=tunix")  # fmt: skip
  assert entry.run(extract.COMMAND, words) == 0
  assert entry.run(extract.COMMAND, (*words, "--overwrite")) == 0
  peft, found = (open_adapter(place, base) for place in (
    out, out / "formats/tunix"))  # fmt: skip
  assert found.format == "tunix"
  assert set(found) == set(peft) - {"model.embed_tokens"}
  for module, lora in found.items():
    assert differs(product(lora), product(peft[module])) < 2e-3
  how = (f"--base={base}", f"--out={again}")
  code, said = run("convert", out / "formats/tunix", *how)
  assert code == 0, said
  assert f"written: {again} (tunix)" in said
  code, said = run("show", again)
  assert code == 0
  assert "tunix, family unknown" in said
  assert "layers/0/mlp/up_proj/kernel" in said
  for name in ("qwix", "maxtext"):
    code, said = run("convert", again, f"--format={name}", f"--base={base}",
                     f"--out={again}x")  # fmt: skip
    assert code == 1
    assert "needs the checkpoint of the JAX model" in said
  code, said = run("convert", again, "--format=tunix", f"--out={again}x")
  assert "need the shapes of the model's parameters" in said


def test_states_of_jax_are_converted_with_their_own_base(run, tmp_path):
  path, state = "decoder/layers_0/self_attention/query/kernel", tmp_path / "x"
  base = {path: np.ones((6, 2, 4), np.float32),
          "decoder/norm/scale": np.ones(6, np.float32)}  # fmt: skip
  save_orbax(tmp_path / "base", base)
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((3, n), np.float32) for n in (6, 8))
  lora = Lora(a, b, np.float32(0.5))
  equations = {path: "BTD,DNH->BTNH"}
  save_qwix(state, {path: lora}, like=base, equations=equations)
  how = (f"--base={tmp_path / 'base'}", "--dtype=float32")
  code, said = run("convert", state, *how, "--format=qwix",
                   f"--out={tmp_path / 'no'}")  # fmt: skip
  assert code == 1
  assert "does not tell whether an einsum" in said
  for name in ("maxtext", "qwix"):
    out = tmp_path / name
    code, said = run("convert", state, *how, f"--format={name}",
                     "--equation=.*/kernel=dot", f"--out={out}")  # fmt: skip
    assert code == 0, said
    found = open_adapter(out, tmp_path / "base")
    assert found.format == name
    assert differs(product(found[path]), product(lora)) < 1e-6
  assert "kernel_lora_b/value" in str(open_checkpoint(tmp_path / "qwix").spec)
