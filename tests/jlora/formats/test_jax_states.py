# SPDX-License-Identifier: Apache-2.0
"""States of qwix, tunix and MaxText by the rules of their own code."""

import itertools
import json
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.checkpoints import (
  open_checkpoint,
  save_orbax,
  write_safetensors,
)
from jlora.formats import (
  open_adapter,
  save_maxtext,
  save_qwix,
  save_tunix,
  to_qwix,
)
from jlora.formats.jax_layouts import form_of, forms_of, read, stored
from jlora.formats.jax_states import module_pattern
from jlora.loras import Lora
from jlora.views import MatrixView, as_parameter, view_of

# One of each kind, with another size for each axis.
SHAPES = {
  "layers/0/attn/q_einsum/w": (2, 6, 4),
  "layers/0/attn/kv_einsum/w": (2, 5, 6, 4),
  "layers/0/attn/o_proj/w": (2, 4, 6),
  "layers/0/conv/kernel": (3, 6, 7),
  "layers/0/mlp/up/kernel": (6, 8),
  "embedder/input_embedding": (9, 6),
  "layers/0/norm/scale": (6,),
}
EQUATIONS = {r".*kv_einsum/w": "BSD,CKDH->CBSKH"}
VIEWS = (
  (r".*q_einsum/w", 3, MatrixView((), (1,), (0, 2))),
  (r".*kv_einsum/w", 4, MatrixView((0,), (2,), (1, 3))),
  (r".*o_proj/w", 3, MatrixView((), (0, 1), (2,))),
  (r".*conv/kernel", 3, MatrixView((), (0, 1), (2,))),
  (r".*", 2, MatrixView()),
)
RANKS = (2, 3, 1)


def draw(shapes, views=VIEWS, scale=0.3, dtype=np.float32):
  rng, found = np.random.default_rng(0), {}
  for at, (path, shape) in enumerate(shapes.items()):
    if (view := view_of(path, shape, views)) is not None:
      *batch, n_in, n_out = view.shape(shape)
      a, b = (rng.standard_normal((*batch, RANKS[at % 3], n)).astype(dtype)
              for n in (n_in, n_out))  # fmt: skip
      found[path] = Lora(a, b, np.full(batch, scale, np.float32))
  return found


def matrix(lora):
  a, b, scale = (
    np.asarray(x, np.float64) for x in (lora.a, lora.b, lora.scale)
  )
  return scale[..., None, None] * np.swapaxes(a, -1, -2) @ b


def tensor(lora, view, shape):
  """The change of the parameter itself."""
  return as_parameter(matrix(lora), view, shape)


def product(a, b, form, ndim):
  """The tensor that a library's sum over the rank gives, factors as stored."""
  letters = "abcdefgh"[:ndim]
  inner = [letters[i] for i in form.in_a], [letters[i] for i in form.in_b]
  one, two = [*inner[0], "r"], ["r", *inner[1]]
  for at in sorted(form.repeated):
    one.insert(at, letters[at])
    two.insert(at, letters[at])
  return np.einsum(f"{''.join(one)},{''.join(two)}->{letters}", a, b)


@st.composite
def weights(draw_one):
  """A view of 2 to 4 axes with inputs and outputs, and a form for it."""
  count = draw_one(st.integers(2, 4))
  axes = draw_one(st.permutations(range(count)))
  cuts = draw_one(st.tuples(*[st.integers(0, count)] * 2).map(sorted))
  parts = axes[: cuts[0]], axes[cuts[0] : cuts[1]], axes[cuts[1] :]
  view = MatrixView(tuple(sorted(parts[0])), tuple(parts[1]), tuple(parts[2]))
  shape = tuple(draw_one(st.lists(st.integers(1, 4), min_size=count,
                                  max_size=count)))  # fmt: skip
  return view, shape


@settings(max_examples=60, deadline=None)
@given(weights())
def test_every_layout_is_the_change_and_is_read_again(found):
  view, shape = found
  if not view.inputs or not view.outputs:
    return
  *batch, n_in, n_out = view.shape(shape)
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((*batch, 2, n), np.float32)
          for n in (n_in, n_out))  # fmt: skip
  lora = Lora(a, b, np.full(batch, 0.5, np.float32))
  want = tensor(lora, view, shape)
  for form in forms_of(view):
    one, two = stored(lora, view, form, shape)
    rank = 2 * int(np.prod([shape[at] for at in view.batch
                            if at not in form.repeated]))  # fmt: skip
    assert (one.shape, two.shape) == form.shapes(shape, rank)
    if not form.is_flat:
      np.testing.assert_allclose(
        product(one, two, form, len(shape)), want, atol=1e-5
      )
    back = Lora(*read((one, two), view, form, shape), np.ones(batch))
    np.testing.assert_allclose(tensor(back, view, shape), want, atol=1e-5)


@pytest.mark.parametrize(
  ("equation", "shape", "view", "a", "b"),
  [
    ("BTD,NDH->BTNH", (2, 12, 4), MatrixView((), (1,), (0, 2)), (12, 3),
     (3, 2, 4)),
    ("BTNH,NHD->BTD", (2, 4, 8), MatrixView((), (0, 1), (2,)), (2, 4, 3),
     (3, 8)),
    ("...D,DF->...F", (5, 6), MatrixView(), (5, 3), (3, 6)),
    ("BSD,CKDH->CBSKH", (2, 5, 6, 4), MatrixView((0,), (2,), (1, 3)), (6, 3),
     (3, 2, 5, 4)),
    ("ETD,EDF->ETF", (2, 5, 6), MatrixView((0,), (1,), (2,)), (2, 5, 3),
     (3, 6)),
    ("BTD,DNH->BTNH", (7, 5, 2, 4), MatrixView((0,), (1,), (2, 3)), (7, 5, 3),
     (7, 3, 2, 4)),
    ("dot", (5, 2, 4), MatrixView((), (0,), (1, 2)), (5, 3), (3, 8)),
    ("dot", (7, 5, 4), MatrixView((0,), (1,), (2,)), (7, 5, 3), (7, 3, 4)),
    (None, (5, 7, 4), MatrixView((1,), (0,), (2,)), (5, 7, 3), (3, 7, 4)),
  ],
)  # fmt: skip
def test_shapes_are_those_of_qwix(equation, shape, view, a, b):
  assert form_of("x/kernel", view, equation).shapes(shape, 3) == (a, b)


@pytest.mark.parametrize("pad", [True, False])
def test_a_state_is_read_as_the_same_change(pad, tmp_path):
  loras = draw(SHAPES)
  shifts = {"layers/0/norm/scale": np.ones(6, np.float32)}
  left = save_qwix(tmp_path / "x", loras, like=SHAPES, equations=EQUATIONS,
                   views=VIEWS, shifts=shifts, pad=pad)  # fmt: skip
  assert set(left) == {"layers/0/norm/scale", "embedder/input_embedding"}
  assert "looked up" in left["embedder/input_embedding"]
  said = json.loads((tmp_path / "x/lora_config.json").read_text())
  assert said["alpha"] == said["rank"] == 6 if pad else len(said["rules"]) == 4
  base = {path: np.zeros(shape) for path, shape in SHAPES.items()}
  adapter = open_adapter(tmp_path / "x", base)
  assert adapter.format == "qwix"
  assert set(adapter.by_parameter()) == set(loras) - set(left)
  for path, lora in adapter.items():
    view = adapter.readers[path].view
    want = tensor(loras[path], view_of(path, SHAPES[path], VIEWS), SHAPES[path])
    found = tensor(lora, view, SHAPES[path])
    np.testing.assert_allclose(found, want, atol=1e-5)
    if pad:
      assert adapter.ranks[path] == 6
  if not pad:
    return
  # Without a base the axes may lie in another order: the same values.
  alone = open_adapter(tmp_path / "x")
  for path, lora in alone.items():
    want = tensor(loras[path], view_of(path, SHAPES[path], VIEWS), SHAPES[path])
    np.testing.assert_allclose(
      np.linalg.norm(matrix(lora)), np.linalg.norm(want), rtol=1e-5
    )
  tree = to_qwix({"layers/0/mlp/up/kernel": loras["layers/0/mlp/up/kernel"]},
                 like=SHAPES)  # fmt: skip
  assert tree["layers"][0]["mlp"]["up"]["kernel_lora_a"].shape == (6, 3)


def test_a_stack_has_its_axis_in_both_factors():
  with pytest.raises(ValueError, match=r"stacked along axis \(3,\)"):
    form_of("x/w", MatrixView((3,), (1,), (0, 2)), None)


def test_patterns_match_what_they_are_made_of_alone():
  made = [f"layers/{i}/{x}" for i in (0, 2, 11) for x in ("q", "a.b-c")]
  made += ["layers_3/x", "head", "9/y", "blocks/0/layers/1/q"]
  pattern = module_pattern(made)
  others = ["layers/1/q", "layers/02/q", "layers/0/q/z", "layers/0/aXb-c",
            "layers_4/x", "9/q", "blocks/0/layers/2/q", ""]  # fmt: skip
  assert [x for x in made + others if re.fullmatch(pattern, x)] == made


@pytest.mark.parametrize(
  ("said", "how"),
  [
    ("its name does not tell whether an einsum", {"like": {"h/kernel":
                                                           (6, 2, 4)}}),
    ("`like` has no x/kernel", {"like": {"y/kernel": (6, 8)}}),
    ("is read as (6, 9), the Lora's is (6, 8)", {"like": {"x/kernel":
                                                          (6, 9)}}),
    ("is no einsum of two operands", {"like": {"x/kernel": (6, 8)},
                                      "equations": {".*": "BTD->BT"}}),
    ("one of them is wrong", {"like": {"x/kernel": (6, 8)},
                              "equations": {".*": "BTF,DF->BTD"}}),
    ("dtype must be a floating one", {"like": {"x/kernel": (6, 8)},
                                      "dtype": np.int32}),
    ("No parameter is left to write", {"like": {"x/kernel": (6, 8)},
                                       "select": lambda path, shape: False}),
    ("exists", {"like": {"x/kernel": (6, 8)}, "folder": "."}),
  ],
)  # fmt: skip
def test_refusals_of_the_writer(said, how, tmp_path):
  like = how.pop("like")
  lora = draw({"x/kernel": (6, 8)})["x/kernel"]
  name = "h/kernel" if "h/kernel" in like else "x/kernel"
  views = ((".*", 3, MatrixView((), (0,), (1, 2))), *VIEWS)
  with pytest.raises(ValueError, match=re.escape(said)):
    save_qwix(tmp_path / how.pop("folder", "x"), {name: lora}, like=like,
              views=views, **how)  # fmt: skip
  assert [*tmp_path.iterdir()] == []


def test_a_parameter_is_there_once(tmp_path):
  lora = draw({"x/kernel": (6, 8)})["x/kernel"]
  with pytest.raises(ValueError, match="1 Loras have the name of another"):
    save_qwix(tmp_path / "x", {"x/kernel": lora, "params/x/kernel": lora},
              like={"x/kernel": (6, 8)})  # fmt: skip


def damage(tree, rule):
  def build(folder):
    save_orbax(folder / "state", tree)
    if rule is not None:
      (folder / "lora_config.json").write_text(json.dumps(rule))
    return folder

  return build


A, B = np.ones((6, 2), np.float32), np.ones((2, 8), np.float32)
PAIR = {"x/kernel_lora_a": A, "x/kernel_lora_b": B}
STACK = {"x/w_lora_a": np.ones((2, 6, 2)), "x/w_lora_b": np.ones((2, 2, 8))}
RULE = {"module_path": ".*", "rank": 2, "alpha": 4}


@pytest.mark.parametrize(
  ("said", "tree", "rule", "base"),
  [
    ("x/kernel lacks lora_b", {"x/kernel_lora_a": A}, None, None),
    ("without LoRA parameters", {"x/kernel": A}, None, None),
    ("have different ranks", {**PAIR, "x/kernel_lora_a": A.T}, None, None),
    ("has rank 2, and rank 3", PAIR, RULE | {"rank": 3}, None),
    ("and no rule in", PAIR, RULE | {"module_path": "y"}, None),
    ("a finite alpha", PAIR, RULE | {"alpha": "1"}, None),
    ("a regex module_path", PAIR, RULE | {"module_path": "("}, None),
    ("no parameter for 1 names", PAIR, RULE, {"y/kernel": (6, 8)}),
    ("it is for another model", PAIR, RULE, {"x/kernel": (6, 9)}),
    ("give the base, whose shapes tell", STACK, RULE, None),
    ("NaN", {**PAIR, "x/kernel_lora_a": np.nan * A}, RULE, None),
  ],
)  # fmt: skip
def test_refusals_of_the_reader(said, tree, rule, base, tmp_path):
  folder = damage(tree, rule)(tmp_path)
  with pytest.raises(ValueError, match=re.escape(said)):
    [*open_adapter(folder, base).values()]


def test_alpha_and_a_stack_are_told_by_rule_and_base(tmp_path):
  damage(PAIR, RULE)(tmp_path)
  adapter = open_adapter(tmp_path, {"y/kernel": (6, 8), "x/kernel": (6, 8)})
  assert adapter.alphas == {"x/kernel": 4.0}
  assert float(adapter["x/kernel"].scale) == 2
  (tmp_path / "two").mkdir()
  damage(STACK | PAIR, RULE)(tmp_path / "two")
  base = {"x/w": (2, 6, 8)}
  found = open_adapter(tmp_path / "two", base, allow_missing=True)
  assert found.shapes == {"x/w": (2, 8, 6)}
  assert found["x/w"].a.shape == (2, 2, 6)
  assert set(found.left_out) == {"x/kernel"}


LAYER = "decoder/layers/self_attention"
SCANNED = {
  "query": (6, 3, 2, 4), "key": (6, 3, 1, 4), "out": (2, 3, 4, 6),
}  # fmt: skip


def maxtext_shapes(base, rank, kind):
  """What `get_lora_param_shape` of MaxText's lora_utils.py returns."""
  if kind in ("query", "key", "value"):
    return (*base[:-2], rank), (rank, *base[1:])
  if len(base) == 4:
    return (*base[:-1], rank), (rank, base[1], base[-1])
  return (*base[:-1], rank), (rank, base[-1])


@pytest.mark.parametrize("scanned", [True, False])
def test_maxtext_restores_what_it_asks_for(scanned, tmp_path):
  shapes, views = {}, []
  for kind, shape in SCANNED.items():
    heads = (0, 2) if kind == "out" else (2, 3)
    rest = (3,) if kind == "out" else (0,)
    sides = (heads, rest) if kind == "out" else (rest, heads)
    if scanned:
      shapes[f"{LAYER}/{kind}/kernel"] = shape
      views.append((f".*{kind}/kernel", 4, MatrixView((1,), *sides)))
      continue
    lower = [tuple(at - (at > 1) for at in side) for side in sides]
    views.append((f".*{kind}/kernel", 3, MatrixView((), *lower)))
    for i in range(2):
      path = f"decoder/layers_{i}/self_attention/{kind}/kernel"
      shapes[path] = (shape[0], *shape[2:])
  loras = {f"params/{path}": lora for path, lora in draw(shapes, views).items()}
  extra = {"decoder/layers/mlp/wo/kernel": (8, 6), "decoder/norm/scale": (6,)}
  if not scanned:
    loras.pop("params/decoder/layers_1/self_attention/query/kernel")
  loras["params/decoder/layers/mlp/wo/kernel"] = draw({"x": (8, 6)})["x"]
  like = {f"params/{path}": shape for path, shape in (shapes | extra).items()}
  left = save_maxtext(tmp_path / "x", loras, like=like, views=views)
  assert [*left] == ["params/decoder/layers/mlp/wo/kernel"]
  config = json.loads((tmp_path / "x/adapter_config.json").read_text())
  assert config["target_modules"] == ["q_proj", "k_proj", "o_proj"]
  assert config["r"] == config["lora_alpha"] == 3
  # The tree that MaxText asks orbax for, None where there is no LoRA.
  wanted = {}
  for path, shape in (shapes | extra).items():
    *above, leaf = path.split("/")
    node = wanted
    for name in above:
      node = node.setdefault(name, {})
    kind = above[-1]
    if "self_attention" in path:
      pair = maxtext_shapes(shape, config["r"], kind)
      node |= {f"lora_{side}.kernel": np.zeros(own, np.float32)
               for side, own in zip("ab", pair, strict=True)}  # fmt: skip
    else:
      node[leaf] = None
  target = {"params": {"params": wanted}}
  with ocp.PyTreeCheckpointer() as checkpointer:
    restored = checkpointer.restore(
      (tmp_path / "x/0/items").absolute(),
      item=target,
      transforms={},
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    )
  assert (tmp_path / "x/0/items/commit_success.txt").exists()
  for path, shape in shapes.items():
    node = restored["params"]["params"]
    for name in path.split("/")[:-1]:
      node = node[name]
    view = view_of(path, shape, views)
    given = loras.get(f"params/{path}")
    want = np.zeros(shape) if given is None else tensor(given, view, shape)
    form = form_of("x/w", view, None)
    found = product(node["lora_a.kernel"], node["lora_b.kernel"], form,
                    len(shape))  # fmt: skip
    np.testing.assert_allclose(found, want, atol=1e-5)
  if not scanned:
    adapter = open_adapter(tmp_path / "x", like, allow_missing=False)
    assert adapter.format == "maxtext"
    assert set(adapter) == {f"params/{path}" for path in shapes}


def test_maxtext_refuses_layers_along_another_axis(tmp_path):
  path = "decoder/layers/self_attention/query/kernel"
  views = ((".*", 4, MatrixView((0,), (1,), (2, 3))),)
  loras = draw({path: (3, 6, 2, 4)}, views)
  with pytest.raises(ValueError, match="another axis than the second"):
    save_maxtext(tmp_path / "x", loras, like={path: (3, 6, 2, 4)}, views=views)
  with pytest.raises(ValueError, match="No parameter is left"):
    save_maxtext(tmp_path / "x", draw({"m/kernel": (6, 8)}),
                 like={"m/kernel": (6, 8)})  # fmt: skip


LLAMA = {"model_type": "llama", "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
MODULES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8),
           "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8),
           "mlp.down_proj": (8, 12)}  # fmt: skip
HF = {
  f"model.layers.{i}.{name}.weight": shape
  for i, (name, shape) in itertools.product(range(2), MODULES.items())
}


def test_transformers_names_go_to_tunix_and_back(tmp_path):
  loras = draw(HF, ((".*", 2, MatrixView((), (1,), (0,))),))
  loras["model.embed_tokens.weight"] = draw({"x": (10, 8)})["x"]
  left = save_tunix(tmp_path / "x", loras, config=LLAMA)
  assert left == {"model.embed_tokens.weight": "tunix has no parameter for it"}
  alone = open_adapter(tmp_path / "x")
  assert alone.format == "tunix"
  assert alone.shapes["layers/1/attn/q_proj/w"] == (8, 8)
  base = {name: np.zeros(shape, np.float32) for name, shape in HF.items()}
  (tmp_path / "base").mkdir()
  write_safetensors(tmp_path / "base/model.safetensors", base)
  (tmp_path / "base/config.json").write_text(json.dumps(LLAMA))
  found = open_adapter(tmp_path / "x", open_checkpoint(tmp_path / "base"))
  assert set(found.by_parameter()) == set(HF)
  for name, lora in found.by_parameter().items():
    np.testing.assert_allclose(matrix(lora), matrix(loras[name]), atol=1e-5)
  for wrong, said in (
    ({"config": LLAMA | {"model_type": "bert"}}, "has no row"),
    ({"config": {"model_type": "llama"}}, "tells None as num_attention"),
    ({}, "give either"),
  ):
    with pytest.raises(ValueError, match=said):
      save_tunix(tmp_path / "y", loras, **wrong)
