# SPDX-License-Identifier: Apache-2.0
"""Programs put together at random compute what merged ones do."""

import math
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
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
def programs(draw):
  """Draws (fn of the weight, the weight, a Lora, its view)."""
  sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
  roles = draw(st.permutations(range(len(sizes))).map(tuple))
  cuts = sorted(draw(st.lists(st.integers(1, len(sizes) - 1), max_size=1))) or [
    1
  ]
  batch = draw(st.integers(0, max(0, len(sizes) - 2)))
  view = MatrixView(
    tuple(sorted(roles[:batch])),
    tuple(sorted(roles[batch : batch + cuts[0]])),
    tuple(sorted(roles[batch + cuts[0] :])),
  )
  if not view.inputs or not view.outputs:
    view = MatrixView((), tuple(range(len(sizes) - 1)), (len(sizes) - 1,))
  w = numbers(draw, *sizes)
  size = lambda axes: math.prod(sizes[i] for i in axes)  # noqa: E731
  lead = [sizes[i] for i in view.batch]
  rank = draw(st.integers(1, 2))
  lora = Lora(
    numbers(draw, *lead, rank, size(view.inputs)),
    numbers(draw, *lead, rank, size(view.outputs)),
    numbers(draw, *lead),
  )
  steps, now = [], w
  for _ in range(draw(st.integers(0, 4))):
    step = draw(st.sampled_from(STEPS))(draw, now)
    if 0 < math.prod(step(now).shape) < 2000:
      steps.append(step)
      now = step(now)
  steps.append(product(draw, now))

  def fn(params):
    value = params["w"]
    for step in steps:
      value = step(value)
    return value

  return fn, w, lora, view


@settings(max_examples=30, deadline=None)
@given(programs())
def test_adapted_is_merged_with_every_gradient(drawn):
  fn, w, lora, view = drawn
  rules = (("w", w.ndim, view),)

  def adapted(w, lora):
    params = bind({"w": w}, {"w": lora}, views=rules)
    return adapt(fn)(params)

  def merged(w, lora):
    return fn(apply({"w": w}, {"w": lora}, views=rules))

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # dense sums, where there is no rule
    found, back = jax.vjp(adapted, w, lora)
  wanted, right = jax.vjp(merged, w, lora)
  chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-3)
  cotangent = jnp.cos(jnp.arange(wanted.size)).reshape(wanted.shape)
  chex.assert_trees_all_close(
    back(cotangent), right(cotangent), rtol=1e-3, atol=1e-2
  )
