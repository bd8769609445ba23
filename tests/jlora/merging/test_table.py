# SPDX-License-Identifier: Apache-2.0
"""One table: every merge of arrays against every property it should have.

A method joins by a row of METHODS. What it does not have is said there.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.merging.arrays.sparsifiers import match_l1
from jlora.merging.arrays.task_vectors import by_count, by_mass, by_mass_or_plus

SHAPE = (8, 6)


@dataclasses.dataclass(frozen=True)
class Row:
  """A method with settings, and what is true of it.

  Attributes:
    method: the method.
    models: how many it is tried with.
    of_base: it needs the base.
    symmetric: models are interchangeable, with their weights.
    whole: models that are all the same come out as they are.
    leaves_out: weight 0 is as if the model were not there.
    adds: weights need no sum: all 0 are no change.
    scales: twice the models and the base give twice the result.
  """

  method: Callable
  models: int = 3
  of_base: bool = True
  symmetric: bool = True
  whole: bool = True
  leaves_out: bool = True
  adds: bool = True
  scales: bool = True


def row(method, *, then=None, **settings):
  return Row(functools.partial(method, **settings), **(then or {}))


def ties_of_a_model(stack, weights, base=None):
  """TIES with one threshold for a model of two parameters, as in the paper."""
  jlora.merging.ties(stack, weights, base)  # what it refuses
  halves = lambda x: dict(zip("ab", jnp.split(x, 2, axis=-1), strict=True))  # noqa: E731
  models, under = [halves(x) for x in jnp.asarray(stack)], halves(base)
  threshold = jlora.merging.magnitude_thresholds(models, under, 0.3)
  merged = jlora.merge(
    models,
    method=jlora.merging.ties,
    base=under,
    weights=weights,
    settings={"threshold": threshold},
  )
  return jnp.concatenate([merged["a"], merged["b"]], axis=-1)


MEAN = {"of_base": False, "adds": False}
DRAWN = {"symmetric": False}
METHODS = {
  "linear": row(jlora.merging.linear, then=MEAN),
  "sum": row(jlora.merging.linear, normalize=False, then={"of_base": False}),
  "passthrough": row(
    jlora.merging.passthrough, then={"models": 1, "of_base": False}
  ),
  "nearswap": row(
    jlora.merging.nearswap,
    t=0.5,
    then={"models": 1, "whole": False, "scales": False},
  ),
  "slerp": row(jlora.merging.slerp, then={**MEAN, "models": 2}),
  "nuslerp": row(jlora.merging.nuslerp, then={"models": 2}),
  "nuslerp rows": row(jlora.merging.nuslerp, axis=-1, then={"models": 2}),
  "multislerp": row(jlora.merging.multislerp, then={"adds": False}),
  "karcher": row(jlora.merging.karcher, then={"adds": False}),
  "task_arithmetic": row(jlora.merging.task_arithmetic, normalize=True),
  "ties": row(jlora.merging.ties, density=1.0),
  "ties trimmed": row(jlora.merging.ties, density=0.3, then={"whole": False}),
  "ties of a model": row(ties_of_a_model, then={"whole": False}),
  "ties as mergekit": row(
    jlora.merging.ties,
    density=0.5,
    elect=by_mass_or_plus,
    then={"whole": False},
  ),
  "ties by count": row(
    jlora.merging.ties, density=0.5, elect=by_count, then={"whole": False}
  ),
  "dare_linear": row(
    jlora.merging.dare, density=0.5, then={**DRAWN, "whole": False}
  ),
  "dare_ties": row(
    jlora.merging.dare,
    density=0.5,
    elect=by_mass,
    rescale=match_l1,
    then={**DRAWN, "whole": False},
  ),
  "della": row(
    jlora.merging.della, density=0.6, then={**DRAWN, "whole": False}
  ),
  "della_linear": row(
    jlora.merging.della,
    density=0.6,
    elect=None,
    normalize=False,
    then={**DRAWN, "whole": False},
  ),
  "breadcrumbs": row(
    jlora.merging.breadcrumbs, density=0.5, gamma=0.1, then={"whole": False}
  ),
  "breadcrumbs_ties": row(
    jlora.merging.breadcrumbs,
    density=1.0,
    elect=by_mass,
    normalize=True,
  ),
  "sce": row(jlora.merging.sce, density=1.0),
  "sce selected": row(
    jlora.merging.sce, density=0.3, then={"leaves_out": False}
  ),
  "model_stock": row(jlora.merging.model_stock),
  "ram": row(jlora.merging.ram, then={"scales": False}),
  "ramplus_tl": row(jlora.merging.ram, strength=0.1, then={"scales": False}),
  "arcee_fusion": row(
    jlora.merging.arcee_fusion,
    then={"models": 1, "whole": False, "scales": False},
  ),
  "tsv": row(jlora.merging.tsv, then={"whole": False}),
  "iso_c": row(jlora.merging.iso_c, then={"whole": False}),
}
# It takes equal weights alone.
UNWEIGHTED = ("model_stock",)

every = pytest.mark.parametrize("name", METHODS)


def run(name, stack, weights, base):
  """The merge operation by operation, as an array of NumPy."""
  return np.asarray(METHODS[name].method(stack, weights, base))


@functools.cache
def inputs(name, seed=0):
  """Models near a base, weights and the base, of NumPy."""
  rng = np.random.default_rng(seed)
  count = METHODS[name].models
  base = rng.standard_normal(SHAPE, np.float32)
  change = rng.standard_normal((count, *SHAPE), np.float32)
  weights = np.float32(rng.uniform(0.5, 2, count))
  if name in UNWEIGHTED:
    weights[:] = 1
  return base + np.float32(0.3) * change, weights, base


def close(found, wanted, tolerance=2e-5):
  np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=tolerance)


def rounded(x):
  """To what bfloat16 holds, in float32."""
  return x.astype(jnp.bfloat16).astype(np.float32)


# Their other settings change nothing that a compiler or a mesh could.
SAME = ("ties", "ties as mergekit", "ties by count", "sum", "sce")
SAME += ("della_linear", "breadcrumbs_ties", "dare_linear", "nuslerp")


# They decompose whole matrices.
GATHERED = ("tsv", "iso_c")


@pytest.mark.parametrize("name", [n for n in METHODS if n not in SAME])
def test_compiled_batched_sharded_and_in_bfloat16(name):
  """Two layers over 8 devices at once, each as it is alone on one.

  And rounded once: within half an ulp of the result in float32.
  """
  batch = [inputs(name, seed) for seed in (0, 1)]
  stack, weights, base = (np.stack(x) for x in zip(*batch, strict=True))
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  place = lambda x, *spec: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  given = (
    place(stack.astype(jnp.bfloat16), None, None, "x"),
    place(weights),
    place(base.astype(jnp.bfloat16), None, "x"),
  )
  merge = jax.jit(jax.vmap(METHODS[name].method)).lower(*given).compile()
  assert ("all-gather" in merge.as_text()) == (name in GATHERED)
  found = merge(*given)
  assert found.dtype == jnp.bfloat16
  for i, own in enumerate(np.asarray(found)):
    exact = run(name, rounded(stack[i]), weights[i], rounded(base[i]))
    off = np.abs(own.astype(np.float32) - exact)
    assert (off <= np.abs(exact) * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("name", [n for n in METHODS if n != "ties of a model"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_numpy_gives_what_jax_does(name, dtype):
  """To float32's rounding; and what is kept of a change is the same."""
  stack, weights, base = inputs(name, seed=3)
  stack, base = stack.astype(dtype), base.astype(dtype)
  found = METHODS[name].method(stack, weights, base)
  assert type(found) is np.ndarray
  assert found.dtype == dtype
  program = jax.jit(lambda *x: METHODS[name].method(x[0], weights, x[1]))
  wanted = np.asarray(program(jnp.asarray(stack), jnp.asarray(base)))
  np.testing.assert_array_equal(found == base, wanted == base)
  close(
    *(np.float32(x) for x in (found, wanted)), max(jnp.finfo(dtype).eps, 1e-5)
  )


@pytest.mark.parametrize("name", ["ties trimmed", "della", *GATHERED])
def test_explicit_axes(name):
  """Sorts and decompositions refuse a cut side of such a type by themselves."""
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
  place = lambda x, *spec: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  stack, weights, base = inputs(name)
  given = place(stack, None, "x", "y"), place(weights), place(base, "x", "y")
  found = jax.jit(METHODS[name].method)(*given)
  assert found.sharding.spec == PartitionSpec("x", "y")
  close(found, run(name, stack, weights, base))


@every
def test_equal_models_come_out(name):
  stack, weights, base = inputs(name)
  same = np.repeat(stack[:1], len(stack), axis=0)
  found = run(name, same, weights / weights.sum(), base)
  assert np.allclose(found, stack[0], atol=1e-5) == METHODS[name].whole


@pytest.mark.parametrize(
  "name",
  [
    name
    for name, own in METHODS.items()
    if own.models != 2 and own.whole and name not in UNWEIGHTED
  ],
)
def test_one_model_comes_out_bit_by_bit(name):
  stack, _, base = (x.astype(jnp.bfloat16) for x in inputs(name))
  found = run(name, stack[:1], [1.0], base)
  np.testing.assert_array_equal(found, stack[0])


@every
def test_models_are_interchangeable(name):
  stack, weights, base = inputs(name)
  wanted = run(name, stack, weights, base)
  found = run(name, np.roll(stack, 1, 0), np.roll(weights, 1), base)
  if METHODS[name].symmetric:
    close(found, wanted)
  else:  # entries are drawn by a model's place
    assert not np.allclose(found, wanted, atol=1e-3)


@every
def test_weight_0_leaves_a_model_out(name):
  stack, _, base = inputs(name)
  if len(stack) == 1 or name in UNWEIGHTED:
    pytest.skip("has no weights to choose by")
  only = np.eye(len(stack), dtype=np.float32)[0]
  factors = np.where(only == 1, 1, 3).astype(np.float32)[:, None, None]
  found = run(name, stack, only, base)
  again = run(name, factors * stack, only, base)
  if METHODS[name].leaves_out:
    close(found, again)
    if METHODS[name].whole:
      close(found, stack[0])
  else:
    assert not np.allclose(found, again, atol=1e-4)


@every
def test_weights_of_sum_0(name):
  stack, _, base = inputs(name)
  own, nothing = METHODS[name], np.zeros(len(stack))
  opposed = np.array([1.0, -1.0, 0.0])[: len(stack)]
  if name in UNWEIGHTED:
    with pytest.raises(ValueError, match="takes equal weights"):
      own.method(stack, opposed, base)
  elif not own.adds:
    for weights in (nothing, opposed[:2].tolist() + [0] * (len(stack) - 2)):
      with pytest.raises(ValueError, match="sum to zero"):
        own.method(stack, weights, base)
  else:
    assert np.isfinite(run(name, stack, opposed, base)).all()
    found = run(name, stack, nothing, base)
    if name.startswith("nuslerp"):
      close(found, run(name, stack, np.ones(2), base))
    else:
      close(found, base if own.of_base else 0 * base)


@every
def test_no_change_stays_none(name):
  stack, weights, base = inputs(name)
  found = run(name, np.stack([base] * len(stack)), weights, base)
  is_sum = name in ("sum", "passthrough")
  close(found, base * weights.sum() if is_sum else base, 1e-6)
  found = run(name, 0 * stack, weights, 0 * base)
  np.testing.assert_array_equal(found, 0 * base)


@every
def test_what_is_nan_is_seen(name):
  stack, weights, base = (x.copy() for x in inputs(name))
  stack[0, 2, 3] = np.nan
  assert np.isnan(run(name, stack, weights, base)[2, 3])
  if METHODS[name].of_base:
    stack[0, 2, 3], base[2, 3] = 1, np.nan
    assert np.isnan(run(name, stack, weights, base)[2, 3])


@every
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-6, 6))
def test_units_and_signs_do_not_matter(name, seed, power):
  stack, weights, base = inputs(name, seed)
  found = run(name, stack, weights, base)
  assert np.isfinite(found).all()
  if METHODS[name].scales:
    # mergekit's plus where as many are against as for is not odd.
    sign = 1 if name == "ties by count" else -1
    factor = np.float32(sign * 2.0**power)
    again = run(name, factor * stack, weights, factor * base)
    close(again / factor, found)


@every
def test_the_door(name):
  stack, weights, base = inputs(name)
  own, count = METHODS[name], len(stack)
  for wrong, why in (
    ((stack, [1.0] * 7, base), "must be one for each of"),
    ((stack, [np.nan] * count, base), "must be finite"),
    ((stack.astype(int), weights, base), "floating stack"),
    ((list(stack), weights, base), "use jnp.stack"),
    (([jlora.Lora(base, base, 1)] * count, weights), "was given Loras"),
  ):
    with pytest.raises(ValueError, match=why):
      own.method(*wrong)
  if own.of_base:
    with pytest.raises(ValueError, match="differ in shape"):
      own.method(stack, weights, base[:1])
    if name not in ("nuslerp", "nuslerp rows", "multislerp", "karcher"):
      with pytest.raises(ValueError, match="pass the base"):
        own.method(stack, weights)
