# SPDX-License-Identifier: Apache-2.0
"""A merge writes finite numbers alone, and mixes no kinds of numbers."""

import functools
import io

import numpy as np
import pytest

import jlora
from jlora import merging
from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.merging import Input, Recipe, Slice
from jlora.merging.checkpoints.mergekit_forms import FORMS


def merged(folder, models, method=merging.linear, **options):
  """Merges {name: tensors}; a name "base" is the base."""
  for name, tensors in models.items():
    write_safetensors(folder / f"{name}.safetensors", tensors)
  place = {name: str(folder / f"{name}.safetensors") for name in models}
  base = place.get("base")
  inputs = tuple(Input(place[name]) for name in models if name != "base")
  recipe = Recipe(method, (Slice(inputs),), base=base, **options)
  report = jlora.merge_checkpoints(recipe, folder / "out", log=io.StringIO())
  return report, open_checkpoint(folder / "out")


def full(value, dtype="f4"):
  return {"w": np.full((4, 4), value, dtype)}


def with_nan():
  tensors = full(1.0)
  tensors["w"][1, 2] = np.nan
  return tensors


METHODS = (
  merging.linear,
  merging.slerp,
  merging.karcher,
  functools.partial(merging.linear, normalize=False),
)
OF_CHANGES = (
  merging.ties,
  merging.sce,
  merging.task_arithmetic,
  functools.partial(merging.dare, density=0.01),
  functools.partial(merging.breadcrumbs, density=0.5),
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("odd", ["a", "b"])
def test_a_damaged_model_is_named(method, odd, tmp_path):
  models = {"a": full(1.0), "b": full(2.0)} | {odd: with_nan()}
  settings = {"t": 0.5} if method is merging.slerp else {}
  with pytest.raises(ValueError, match=f"w of .*/{odd}.safetensors: 1 of 16"):
    merged(tmp_path, models, method, settings=settings)
  assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("method", OF_CHANGES)
@pytest.mark.parametrize("odd", ["a", "base"])
def test_one_that_would_drop_the_entry_is_named_too(method, odd, tmp_path):
  models = {"base": full(0.0), "a": full(1.0), "b": full(2.0)}
  models |= {odd: with_nan()}
  with pytest.raises(ValueError, match=f"w of .*/{odd}.safetensors: 1 of 16"):
    merged(tmp_path, models, method)


@pytest.mark.parametrize("method", [merging.linear, merging.passthrough])
def test_what_the_dtype_does_not_hold_is_an_error(method, tmp_path):
  models = {"a": full(1e6)} | (
    {} if method is merging.passthrough else {"b": full(1e6)}
  )
  with pytest.raises(ValueError, match="w.*float16 (holds|does not hold)"):
    merged(tmp_path, models, method, dtype="float16")


def test_a_sum_over_the_range_is_an_error(tmp_path):
  method = functools.partial(merging.linear, normalize=False)
  models = {"a": full(3e38), "b": full(3e38)}
  with pytest.raises(ValueError, match="w: merged it has values that float32"):
    merged(tmp_path, models, method)


def test_a_parameter_that_is_passed_on_is_finite_and_a_mask_is_not(tmp_path):
  mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
  tensors = full(1.0) | {"h.0.attn.masked_bias": mask}
  _, out = merged(tmp_path, {"a": tensors}, merging.passthrough)
  np.testing.assert_array_equal(out["h.0.attn.masked_bias"], mask)
  (tmp_path / "again").mkdir()
  with pytest.raises(ValueError, match="w of .*a.safetensors: 1 of 16"):
    merged(tmp_path / "again", {"a": with_nan()}, merging.passthrough)


@pytest.mark.parametrize("dtype", ["i1", "u1", "?", "i4"])
def test_integers_are_not_merged_with_floats(dtype, tmp_path):
  whole, real = full(1, dtype), full(2.0)
  for models in ({"a": whole, "b": real}, {"a": real, "b": whole}):
    with pytest.raises(ValueError, match="w is .*Integers are not merged"):
      merged(tmp_path, models)
  assert not (tmp_path / "out").exists()
  with pytest.raises(ValueError, match="w: not floating, and models differ"):
    merged(tmp_path, {"a": whole, "b": full(0, dtype)})


def test_models_of_float64_are_merged_and_it_is_noted(tmp_path):
  report, out = merged(tmp_path, {"a": full(1.0, "f8"), "b": full(3.0, "f8")})
  assert out["w"].dtype == np.float64
  np.testing.assert_array_equal(out["w"], 2.0)
  assert report.notes == ["w: float64, merged in float32"]
  (tmp_path / "one").mkdir()
  tensors = full(1 + 1e-12, "f8")
  report, out = merged(tmp_path / "one", {"a": tensors}, merging.passthrough)
  np.testing.assert_array_equal(out["w"], tensors["w"])
  assert not report.notes
  (tmp_path / "wide").mkdir()
  both = {"a": full(1.0), "b": full(3.0)}
  report, out = merged(tmp_path / "wide", both, dtype="float64")
  assert out["w"].dtype == np.float64
  assert not report.notes
  (tmp_path / "far").mkdir()
  both = {"a": full(1e300, "f8"), "b": full(3.0, "f8")}
  with pytest.raises(ValueError, match="w: merged it has values that float32"):
    merged(tmp_path / "far", both)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
  ("kind", "values", "fits"),
  [
    ("i8", [1, 2**40], False),
    ("i8", [1, -5], True),
    ("u4", [1, 2**31], False),
    ("i2", [7, -7], True),
    ("?", [True, False], True),
  ],
)
def test_integers_of_another_size_do_not_wrap_around(
  count, kind, values, fits, tmp_path
):
  """The reference gives the dtype, and is not merged itself."""
  own = {"w": np.ones(2, "f4"), "n": np.asarray(values, kind)}
  models = {"c": {**own, "n": np.zeros(2, "i4")}, "a": own, "b": own}
  for name, tensors in models.items():
    write_safetensors(tmp_path / f"{name}.safetensors", tensors)
  place = {name: str(tmp_path / f"{name}.safetensors") for name in models}
  method = merging.passthrough if count == 1 else merging.linear
  inputs = tuple(Input(place[name]) for name in "ab"[:count])
  recipe = Recipe(method, (Slice(inputs),), reference=place["c"])
  run = functools.partial(jlora.merge_checkpoints, log=io.StringIO())
  if fits:
    run(recipe, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")["n"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, values)
    return
  with pytest.raises(ValueError, match=r"n of .*a.safetensors is .*int32"):
    run(recipe, tmp_path / "out")
  assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_base_of_float64_is_noted(tmp_path):
  models = {"base": full(0.0, "f8"), "a": full(1.0), "b": full(2.0)}
  report, _ = merged(tmp_path, models, merging.task_arithmetic)
  assert report.notes == ["w: float64, merged in float32"]


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2", "floot"])
def test_a_dtype_that_holds_no_floats_as_they_are_is_refused(dtype, tmp_path):
  with pytest.raises(ValueError, match="dtype is .*; give bfloat16, float16"):
    merged(tmp_path, {"a": full(1.0), "b": full(3.0)}, dtype=dtype)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(FORMS))
def test_tensors_without_entries_stay(name, tmp_path):
  form = FORMS[name]
  tensors = {"w": full(1.0)["w"], "v": np.ones((0, 3), "f4")}
  tensors |= {"u": np.ones(0, "f4")}
  models = dict.fromkeys("ab", tensors)
  if name in ("passthrough", "nearswap", "arcee_fusion"):
    models = {"a": tensors}
  if form.base in ("subtracted", "optional"):
    models["base"] = tensors
  settings = {form.numbers[key]: 0.5 for key in form.required}
  settings = {k: v for k, v in settings.items() if k != "weight"}
  _, out = merged(tmp_path, models, form.method, settings=settings)
  assert {n: x.shape for n, x in out.items()} == {
    n: x.shape for n, x in tensors.items()
  }
  np.testing.assert_allclose(out["w"], 1, rtol=1e-6)


@pytest.mark.parametrize(
  ("method", "settings", "said"),
  [
    (merging.della, {}, "w: .*'density'"),
    (merging.linear, {"foo": 1}, "w: .*'foo'"),
    (lambda stack, weights, base=None, *, key=None: stack[0], {"t": 1}, "'t'"),
  ],
)
def test_settings_that_lack_or_are_not_known(method, settings, said, tmp_path):
  models = {"base": full(0.0), "a": full(1.0), "b": full(2.0)}
  with pytest.raises(ValueError, match=said):
    merged(tmp_path, models, method, settings=settings)
  assert not (tmp_path / "out").exists()
