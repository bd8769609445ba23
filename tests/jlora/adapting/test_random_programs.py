# SPDX-License-Identifier: Apache-2.0
"""Programs put together at random compute what merged ones do."""

import functools
import math
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jlora.adapting import adapt, apply, bind
from jlora.loras import Lora
from jlora.views import MatrixView


def numbers(draw, *sizes):
  """Draws an array of a few figures, without zeros."""
  seed = draw(st.integers(0, 2**31 - 1))
  return jnp.asarray(np.random.RandomState(seed).randn(*sizes), jnp.float32)


def axis_of(draw, w):
  return draw(st.integers(0, w.ndim - 1))


def transpose(draw, w):
  order = draw(st.permutations(range(w.ndim)))
  return lambda w: jnp.transpose(w, order)


def reshape(draw, w):
  """Joins two neighbouring axes, or splits one."""
  axis, sizes = axis_of(draw, w), list(w.shape)
  parts = [n for n in range(2, sizes[axis]) if sizes[axis] % n == 0]
  if axis + 1 < w.ndim and (not parts or draw(st.booleans())):
    sizes[axis : axis + 2] = [sizes[axis] * sizes[axis + 1]]
  elif parts:
    part = draw(st.sampled_from(parts))
    sizes[axis : axis + 1] = [part, sizes[axis] // part]
  return lambda w: w.reshape(sizes)


def new_axis(draw, w):
  axis = draw(st.integers(0, w.ndim))
  return lambda w: jnp.expand_dims(w, axis)


def slice_(draw, w):
  axis = axis_of(draw, w)
  start = draw(st.integers(0, w.shape[axis] - 1))
  step = draw(st.integers(1, 2))
  return lambda w: lax.slice_in_dim(w, start, None, step, axis)


def slice_at(draw, w):
  """A slice whose start the program computes."""
  axis = axis_of(draw, w)
  size = draw(st.integers(1, w.shape[axis]))
  start = jnp.int32(draw(st.integers(0, w.shape[axis])))
  return lambda w: lax.dynamic_slice_in_dim(w, start, size, axis)


def take(draw, w):
  axis = axis_of(draw, w)
  ids = draw(
    st.lists(st.integers(0, w.shape[axis] - 1), min_size=1, max_size=4)
  )
  return lambda w: jnp.take(w, jnp.array(ids), axis)


def pad(draw, w):
  axis, width = axis_of(draw, w), draw(st.integers(-1, 2))
  widths = [(width, 1, 0) if i == axis else (0, 0, 0) for i in range(w.ndim)]
  return lambda w: lax.pad(w, jnp.float32(0), widths)


def rev(draw, w):
  axis = axis_of(draw, w)
  return lambda w: jnp.flip(w, axis)


def repeat(draw, w):
  axis = axis_of(draw, w)
  return lambda w: jnp.repeat(w, 2, axis)


def tile(draw, w):
  axis = axis_of(draw, w)
  reps = [2 if i == axis else 1 for i in range(w.ndim)]
  return lambda w: jnp.tile(w, reps)


def scale(draw, w):
  """Scales along some axes: rows, columns, or all entries."""
  on = draw(st.lists(st.booleans(), min_size=w.ndim, max_size=w.ndim))
  sizes = [n if is_on else 1 for n, is_on in zip(w.shape, on, strict=True)]
  by = numbers(draw, *sizes)
  if draw(st.booleans()):
    return lambda w: w * by
  return lambda w: w / (2 + by**2)


def plus(draw, w):
  more = numbers(draw, *w.shape)
  if draw(st.booleans()):
    return lambda w: more - w
  return lambda w: w + more


def beside(draw, w):
  axis = axis_of(draw, w)
  sizes = [1 if i == axis else n for i, n in enumerate(w.shape)]
  more = numbers(draw, *sizes)
  return lambda w: jnp.concatenate([w, more, -w], axis)


def split(draw, w):
  axis = axis_of(draw, w)
  cut = draw(st.integers(0, w.shape[axis] - 1))
  return lambda w: jnp.split(w, [cut], axis)[1]


def bend(draw, w):
  """Has no rule: the dense sum."""
  return jnp.tanh


STEPS = [
  transpose, reshape, new_axis, slice_, slice_at, take, pad, rev, repeat, tile,
  scale, plus, beside, split, bend,
]  # fmt: skip


def product(draw, w):
  """Sums over some axes with an input, which batches some others."""
  roles = draw(
    st.lists(st.sampled_from("sbk"), min_size=w.ndim, max_size=w.ndim)
  )
  labels = "cdefghijklmn"[: w.ndim]
  on_x = [at for at, role in zip(labels, roles, strict=True) if role != "k"]
  sizes = [w.shape[labels.index(at)] for at in on_x]
  kept = [at for at, role in zip(labels, roles, strict=True) if role != "s"]
  x = numbers(draw, 3, *sizes)
  spec = f"a{''.join(on_x)},{labels}->a{''.join(draw(st.permutations(kept)))}"
  return lambda w: jnp.einsum(spec, x, w)


@st.composite
def views(draw, ndim):
  """Draws which axes of a weight are batch axes, inputs and outputs."""
  order = draw(st.permutations(range(ndim)))
  batch = draw(st.integers(0, ndim - 2))
  reads = draw(st.integers(batch + 1, ndim - 1))
  cut = (order[:batch], order[batch:reads], order[reads:])
  return MatrixView(*(tuple(sorted(axes)) for axes in cut))


@st.composite
def programs(draw, kind):
  """Draws a program with a step of a kind, a weight, and its Lora and view."""
  sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
  view, rank = draw(views(len(sizes))), draw(st.integers(1, 2))
  lead, reads, writes = (
    [sizes[i] for i in axes] for axes in (view.batch, view.inputs, view.outputs)
  )
  lora = Lora(
    numbers(draw, *lead, rank, math.prod(reads)),
    numbers(draw, *lead, rank, math.prod(writes)),
    numbers(draw, *lead),
  )
  w = numbers(draw, *sizes)
  others = st.lists(st.sampled_from(STEPS), max_size=2)
  steps, now = [], jax.eval_shape(lambda w: w, w)
  for make in [*draw(others), kind, *draw(others)]:
    step = make(draw, now)
    after = jax.eval_shape(step, now)
    if 0 < math.prod(after.shape) < 2000:
      steps, now = [*steps, step], after
  steps.append(product(draw, now))

  def fn(params):
    return functools.reduce(lambda w, step: step(w), steps, params["w"])

  return fn, w, lora, view


def shifted(fn, w, lora, make):
  """Computes a function of what `make` makes, and all gradients."""
  found, back = jax.vjp(lambda w, lora: fn(make(w, lora)), w, lora)
  return found, back(jnp.cos(jnp.arange(found.size)).reshape(found.shape))


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_adapted_is_merged_with_every_gradient(kind, data):
  fn, w, lora, view = data.draw(programs(kind))
  rules = (("w", w.ndim, view),)

  @jax.jit
  def both(w, lora):
    return [
      shifted(adapt(fn), w, lora, lambda w, lora: bind(
        {"w": w}, {"w": lora}, views=rules)),
      shifted(fn, w, lora, lambda w, lora: apply(
        {"w": w}, {"w": lora}, views=rules)),
    ]  # fmt: skip

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # dense sums, where there is no rule
    found, wanted = both(w, lora)
  chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-2)
