# SPDX-License-Identifier: Apache-2.0
"""States that are written, in models of qwix and tunix, against merged weights.

Needs the extra `formats`; tunix's own needs `foreign`: `make test-foreign`.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora.checkpoints import open_checkpoint, save_orbax
from jlora.formats import open_adapter, save_qwix, save_tunix, to_qwix
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.views import MatrixView, as_parameter, view_of

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  qwix = pytest.importorskip("qwix")

pytestmark = pytest.mark.filterwarnings("ignore")
EQUATIONS = {"q/kernel": "BTD,NDH->BTNH", "o/kernel": "BTNH,NHD->BTD",
             "kv/kernel": "BTD,CDKH->CBTKH", "moe/kernel": "ETD,EDF->ETF",
             "heads/kernel": "dot"}  # fmt: skip
VIEWS = (
  ("q/kernel", 3, MatrixView((), (1,), (0, 2))),
  ("o/kernel", 3, MatrixView((), (0, 1), (2,))),
  ("kv/kernel", 4, MatrixView((0,), (1,), (2, 3))),
  ("moe/kernel", 3, MatrixView((0,), (1,), (2,))),
  ("heads/kernel", 3, MatrixView((), (0,), (1, 2))),
  ("conv/kernel", 3, MatrixView((), (0, 1), (2,))),
  ("fc/kernel", 2, MatrixView()),
)


class Model(nnx.Module):
  """Each kind of product once, einsums of all kinds."""

  def __init__(self, rngs):
    self.fc = nnx.Linear(8, 12, rngs=rngs)
    self.q = nnx.Einsum("BTD,NDH->BTNH", (2, 12, 4), rngs=rngs)
    self.o = nnx.Einsum("BTNH,NHD->BTD", (2, 4, 8), rngs=rngs)
    self.kv = nnx.Einsum("BTD,CDKH->CBTKH", (2, 8, 2, 4), rngs=rngs)
    self.moe = nnx.Einsum("ETD,EDF->ETF", (2, 8, 8), rngs=rngs)
    self.heads = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)

  def __call__(self, x):
    y = self.o(self.q(self.fc(x)))
    y = y + self.kv(y).sum(0).reshape(y.shape)
    y = self.moe(y) + self.heads(y).sum((-1, -2))[..., None]
    return self.conv(y)


@pytest.fixture
def lenient():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def draw(shapes, views, ranks=(2, 3, 1)):
  """Loras of all of a model's matrices, and the changes that they are."""
  rng, loras, changes = np.random.default_rng(0), {}, {}
  for at, (path, shape) in enumerate(shapes.items()):
    view = view_of(path, shape, views)
    *batch, n_in, n_out = view.shape(shape)
    a, b = (
      rng.standard_normal((*batch, ranks[at % len(ranks)], n), np.float32)
      for n in (n_in, n_out)
    )
    scale = np.full(batch, 0.3, np.float32)
    loras[path] = Lora(a, b, scale)
    matrix = 0.3 * np.swapaxes(a, -1, -2) @ b
    changes[path] = as_parameter(matrix, view, shape)
  return loras, changes


def merged(model, changes):
  """The model with changes added to its parameters."""
  state = nnx.state(model, nnx.Param)
  flat = dict(nnx.to_flat_state(state))
  for at, leaf in flat.items():
    if (change := changes.get("/".join(map(str, at)))) is not None:
      leaf.set_value(leaf.get_value() + change)
  nnx.update(model, nnx.from_flat_state(flat))
  return model


def provider(folder):
  said = json.loads((folder / "lora_config.json").read_text())
  if "rules" not in said:
    return qwix.LoraProvider(**said)
  return qwix.LoraProvider([qwix.LoraRule(**rule) for rule in said["rules"]])


@pytest.mark.parametrize("pad", [True, False])
def test_qwix_computes_what_merged_weights_do(pad, lenient, tmp_path):
  x = jax.random.normal(jax.random.key(1), (2, 5, 8))
  plain = flatten(nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0)), nnx.Param)))
  shapes = {path: leaf.shape for path, leaf in plain.items()
            if "kernel" in path}  # fmt: skip
  loras, changes = draw(shapes, VIEWS)
  how = {"like": shapes, "equations": EQUATIONS, "views": VIEWS, "pad": pad}
  assert save_qwix(tmp_path / "x", loras, **how) == {}
  model = qwix.apply_lora_to_model(
    Model(nnx.Rngs(0)), provider(tmp_path / "x"), x, rngs=nnx.Rngs(2)
  )
  abstract = nnx.state(model, nnx.LoRAParam)
  want = merged(Model(nnx.Rngs(0)), changes)(x)
  before = model(x)
  nnx.update(model, restored(tmp_path / "x" / "state", abstract))
  assert far(model(x), want) < 1e-5
  assert far(before, want) > 1e-2
  # The same in memory.
  again = qwix.apply_lora_to_model(
    Model(nnx.Rngs(0)), provider(tmp_path / "x"), x, rngs=nnx.Rngs(3)
  )
  nnx.update(again, to_qwix(loras, **how))
  np.testing.assert_array_equal(again(x), model(x))


def restored(place, abstract):
  """A state as orbax restores it into a model's own."""
  import orbax.checkpoint as ocp

  args = ocp.checkpoint_utils.construct_restore_args(abstract)
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore(
      place, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args)
    )


def far(found, want):
  return float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want))


def test_what_qwix_trains_is_read(lenient, tmp_path):
  x = jax.random.normal(jax.random.key(1), (2, 5, 8))
  model = qwix.apply_lora_to_model(
    Model(nnx.Rngs(0)), qwix.LoraProvider(module_path=".*", rank=3, alpha=6.0),
    x, rngs=nnx.Rngs(2),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
    leaf.set_value(jnp.asarray(rng.normal(size=leaf.get_value().shape), "f4"))
  save_orbax(tmp_path / "lora", nnx.state(model, nnx.LoRAParam))
  (tmp_path / "base").mkdir()
  plain = nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
  save_orbax(tmp_path / "base" / "x", plain)
  base = open_checkpoint(tmp_path / "base" / "x")
  adapter = open_adapter(tmp_path / "lora", base)
  assert adapter.notes == ["no alpha: the scale is 1"]
  changes = {}
  for path, lora in adapter.by_parameter().items():
    a, b = (np.asarray(part) for part in (lora.a, lora.b))
    matrix = 2.0 * np.swapaxes(a, -1, -2) @ b  # alpha / rank
    # The view of the name; the tensor is the same by any that fits.
    view = adapter.readers[path].view
    changes[path] = as_parameter(matrix, view, base.spec[path].shape)
  assert set(changes) == {path for path in base if "kernel" in path}
  want = merged(Model(nnx.Rngs(0)), changes)(x)
  assert far(model(x), want) < 1e-5


LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "vocab_size": 32}  # fmt: skip


def test_tunix_restores_what_is_written(lenient, tmp_path):
  pytest.importorskip("tunix")
  from tunix.models.llama3 import model as llama
  from tunix.sft.checkpoint_manager import CheckpointManager

  def build():
    config = llama.ModelConfig(
      num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=4,
      head_dim=8, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip
    return llama.Llama3(config, rngs=nnx.Rngs(0))

  rng = np.random.default_rng(0)
  loras, changes = {}, {}
  sizes = {"self_attn.q_proj": (16, 32), "self_attn.v_proj": (16, 16),
           "self_attn.o_proj": (32, 16), "mlp.down_proj": (24, 16)}  # fmt: skip
  for layer in range(2):
    for at, (name, (n_in, n_out)) in enumerate(sizes.items()):
      a, b = (rng.standard_normal((1 + at % 2, n), np.float32)
              for n in (n_in, n_out))  # fmt: skip
      module = f"model.layers.{layer}.{name}"
      loras[module] = Lora(a, b, np.float32(0.2))
      leaf = "kernel" if "mlp" in name else "w"
      path = f"layers/{layer}/{name.replace('self_attn', 'attn')}/{leaf}"
      changes[path.replace(".", "/")] = 0.2 * a.T @ b
  assert save_tunix(tmp_path / "x", loras, config=LLAMA) == {}
  tokens = jnp.arange(6)[None] % 32
  places = jnp.arange(6)
  inputs = (tokens, places[None], None, (places[:, None] >= places)[None])
  model = qwix.apply_lora_to_model(
    build(), provider(tmp_path / "x"), *inputs, rngs=nnx.Rngs(1)
  )
  manager = CheckpointManager(str(tmp_path / "x"))
  step, said = manager.maybe_restore(model, restore_only_lora_params=True)
  manager.close()
  assert step == 0
  assert said == {"lora": {"lora_rank": 2, "lora_alpha": 2.0}}
  whole = build()
  shapes = {path: leaf.shape for path, leaf in
            flatten(nnx.to_pure_dict(nnx.state(whole))).items()}  # fmt: skip
  changes = {path: x.reshape(shapes[path]) for path, x in changes.items()}
  want = merged(whole, changes)(*inputs)[0]
  assert far(model(*inputs)[0], want) < 1e-5
  assert far(build()(*inputs)[0], want) > 1e-2
  # And what tunix saves is read.
  manager = CheckpointManager(str(tmp_path / "own"))
  manager.save(7, model, save_only_lora_params=True, force=True)
  manager.close()
  adapter = open_adapter(tmp_path / "own")
  assert adapter.format == "tunix"
  for path, lora in adapter.items():
    found = (np.asarray(lora.a).T @ np.asarray(lora.b)).ravel()
    np.testing.assert_allclose(found, changes[path].ravel(), atol=1e-5)
