# SPDX-License-Identifier: Apache-2.0
"""Tucker, LoHa, LoKr and DoRA against their formulas, in float64."""

import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.formats import open_adapter
from jlora.formats.forms import flat, magnitude_axis, within
from tests.helpers.image_adapters import product

OUT, IN, R, K = 6, 8, 2, 3
RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.standard_normal(shape)


def tucker():
  up, mid, down = draw(OUT, R, 1, 1), draw(R, R, K, K), draw(R, IN, 1, 1)
  dense = np.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
  names = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
  return dict(zip(names, (up, mid, down), strict=True)), dense, R


def loha():
  parts = {"w1_a": (OUT, R), "w1_b": (R, IN), "w2_a": (OUT, R), "w2_b": (R, IN)}
  t = {f"hada_{name}": draw(*shape) for name, shape in parts.items()}
  one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in "12")
  return t, one * two, R * R


def loha_tucker():
  t = {}
  for i in "12":
    t |= {f"hada_t{i}": draw(R, R, K, K), f"hada_w{i}_a": draw(R, OUT),
          f"hada_w{i}_b": draw(R, IN)}  # fmt: skip
  one, two = (
    np.einsum("ijkl,jc,ip->pckl", *(t[f"hada_{x}"] for x in names))
    for names in (("t1", "w1_b", "w1_a"), ("t2", "w2_b", "w2_a"))
  )
  return t, one * two, R * R


def lokr():
  t = {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(3, R), "lokr_w2_b": draw(R, 2)}
  w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
  return t, np.kron(t["lokr_w1"], w2), 2 * R


def lokr_whole():
  t = {"lokr_w1": draw(2, 4), "lokr_w2": draw(3, 2, K, K)}
  return t, np.kron(t["lokr_w1"][..., None, None], t["lokr_w2"]), 6


def lokr_tucker():
  t = {"lokr_w1_a": draw(2, 1), "lokr_w1_b": draw(1, 4),
       "lokr_t2": draw(R, R, K, K), "lokr_w2_a": draw(R, 3),
       "lokr_w2_b": draw(R, 2)}  # fmt: skip
  w1 = t["lokr_w1_a"] @ t["lokr_w1_b"]
  w2 = np.einsum(
    "ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"]
  )
  return t, np.kron(w1[..., None, None], w2), R


FORMS = {f.__name__: f for f in (tucker, loha, loha_tucker, lokr, lokr_whole,
                                 lokr_tucker)}  # fmt: skip
# Which number divides alpha: LyCORIS', and none where both factors are whole.
DIVISOR = {"lokr_whole": None, "lokr_tucker": 1}


def write(folder, tensors, stem="unet.x"):
  path = folder / "x.safetensors"
  write_safetensors(
    path, {f"{stem}.{k}": np.asarray(v) for k, v in tensors.items()}
  )
  return path


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_every_form_is_exactly_a_lora(name, alpha, tmp_path):
  tensors, dense, rank = FORMS[name]()
  if alpha is not None:
    tensors["alpha"] = np.float64(alpha)
  adapter = open_adapter(write(tmp_path, tensors))
  lora = adapter["unet.x"]
  divisor = DIVISOR.get(name, R)
  scale = 1.0 if alpha is None or divisor is None else alpha / divisor
  want = scale * flat(dense)
  assert lora.a.dtype == np.float64
  assert adapter.shapes["unet.x"] == dense.shape
  assert adapter.ranks["unet.x"] == lora.rank == rank
  error = np.linalg.norm(product(lora) - want) / np.linalg.norm(want)
  assert error < (1e-15 if scale == 1.0 else 1e-7) * 2  # scale is float32


def test_a_lora_over_its_matrix_rank_is_recompressed():
  a, b = draw(9, IN), draw(OUT, 9)
  small = within((a, b), OUT)
  assert small[0].shape == (OUT, IN)
  np.testing.assert_allclose(small[1] @ small[0], b @ a, atol=1e-5)


@pytest.mark.parametrize("k", [(), (K, K)])
@pytest.mark.parametrize("kind", ["peft", "kohya", "older"])
def test_dora_is_its_formula_and_needs_the_base(k, kind, tmp_path):
  n = OUT if kind == "peft" else IN  # square for PEFT: told by the key
  ones = (1,) * len(k)
  weight = draw(OUT, n, *k).astype(np.float32)
  down, up = draw(R, n, *k), draw(OUT, R, *ones)
  shapes = {"peft": (1, OUT, *ones) if k else (OUT,), "kohya": (OUT, 1, *ones),
            "older": (1, n, *ones)}  # fmt: skip
  m = np.abs(draw(*shapes[kind]))
  if kind == "peft":
    t = {"lora_A.weight": down, "lora_B.weight": up,
         "lora_magnitude_vector": m}  # fmt: skip
    scale = 1.0
  else:
    t = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": m,
         "alpha": np.float64(1)}  # fmt: skip
    scale = 1 / R
  path = write(tmp_path, t)
  with pytest.raises(ValueError, match="DoRA .*depends on the weights"):
    open_adapter(path)
  turned = weight + scale * np.einsum(
    "or,ri...->oi...", up.reshape(OUT, R), down
  )
  axes = (0, *range(2, weight.ndim)) if kind == "older" else None
  axes = axes or tuple(range(1, weight.ndim))
  norm = np.sqrt(np.sum(turned**2, axis=axes, keepdims=True))
  want = flat(m.reshape(norm.shape) * turned / norm - weight)
  found = open_adapter(path, {"unet.x.weight": weight})
  lora = found["unet.x"]
  assert lora.rank == found.ranks["unet.x"] == min(want.shape)
  np.testing.assert_allclose(product(lora), want, atol=1e-5)


def test_magnitudes_that_fit_nothing_are_refused():
  with pytest.raises(ValueError, match=r"magnitudes \(5,\) fit neither"):
    magnitude_axis("dora_scale", (5,), (6, 8))
