# SPDX-License-Identifier: Apache-2.0
"""Rows switched by their modalities: the base stays the base, bit by bit."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora import models
from jlora.adapting.rows import adapt_rows
from jlora.adapting.transforms import apply
from jlora.loras import Lora
from jlora.models.attention import Span
from jlora.routing.modalities import Routes, check_cache, routes, used_only
from tests.jlora.adapting.test_models import CONFIGS, loras_for

KEY = jax.random.key(0)
TEXTS = jax.random.randint(jax.random.key(1), (5, 7), 0, 23)
BY = {(): None, "image": "eye", "sound": "ear", ("image", "sound"): "eye"}
PRESENT = jnp.array([
  [False, False], [True, False], [False, True], [True, True], [False, False]
])  # fmt: skip


@pytest.fixture
def standard_promotion():
  """Optax counts in int32 and multiplies by floats."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@functools.cache
def small(dtype=jnp.float32):
  """A model and adapters of other ranks and modules."""
  run, params = models.init(CONFIGS["llama, tied"], KEY, dtype=dtype)
  eye = loras_for(params, 1, 2)
  ear = {p: x for p, x in loras_for(params, 2, 4).items() if "attn" in p}
  return run, params, {"eye": eye, "ear": ear}


@functools.cache
def table():
  return routes(small()[2], BY)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_text_rows_are_the_base_bit_by_bit_beside_any_others(dtype):
  """The base's rows one by one: in products of all of them XLA rounds otherwise
  where their number is odd, without any adapter."""
  run, params, _ = small(dtype)
  bank, ways = table()
  one = jax.vmap(lambda row: run(params, row[None])[0])
  base = np.asarray(jax.jit(one)(TEXTS))
  rows = jax.jit(lambda present: adapt_rows(run)(
    params, bank, ways.ids(present), TEXTS
  ))  # fmt: skip
  for flags in itertools.product(PRESENT[:4].tolist(), repeat=2):
    present = PRESENT.at[jnp.array([1, 3])].set(jnp.array(flags))
    found = np.asarray(rows(present))
    for i in (0, 4):
      assert found[i].tobytes() == base[i].tobytes()
  assert found[2].tobytes() != base[2].tobytes()


def test_a_mixed_batch_is_runs_of_one_mode():
  run, params, adapters = small()
  bank, ways = table()
  found = jax.jit(adapt_rows(run))(params, bank, ways.ids(PRESENT), TEXTS)
  for i, name in enumerate([None, "eye", "ear", "eye", None]):
    own = params if name is None else apply(params, adapters[name])
    np.testing.assert_allclose(
      found[i], run(own, TEXTS[i : i + 1])[0], rtol=1e-4, atol=1e-5
    )
  order = jnp.array([3, 0, 2, 4, 1])
  other = jax.jit(adapt_rows(run))(
    params, bank, ways.ids(PRESENT[order]), TEXTS[order]
  )
  np.testing.assert_allclose(found[order], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_set_has_one_id_and_a_hole_is_named(count):
  names = [f"m{i}" for i in range(count)]
  sets = [
    own for size in range(count + 1)
    for own in itertools.combinations(names, size)
  ]  # fmt: skip
  adapters = {
    f"a{i}": {"w": Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))}
    for i in range(len(sets))
  }
  by = {own: f"a{i}" for i, own in enumerate(sets)}
  _, ways = routes(adapters, by)
  for i, own in enumerate(sets):
    present = jnp.array([[name in own for name in ways.modalities]])
    assert ways.ids(present).tolist() == [i]
  assert len(ways.table) == 2**count
  assert ways.ids(present).dtype == jnp.int32
  for own in sets[1:]:
    holes = {key: name for key, name in by.items() if key != own}
    if {n for key in holes for n in key} != set(names):
      continue
    text = "{" + ", ".join(own) + "}"
    with pytest.raises(ValueError, match=f"1 sets.*no entry: {text}"):
      routes(adapters, holes)


def test_a_priority_fills_the_table():
  adapters = small()[2]
  singles = {"image": "eye", "sound": "ear"}
  _, first = routes(adapters, singles, priority=["image", "sound"])
  _, whole = routes(adapters, BY)
  assert first.modalities == whole.modalities == ("image", "sound")
  assert first.table.tolist() == whole.table.tolist() == [-1, 0, 1, 0]
  _, other = routes(adapters, singles, priority=["sound", "image"])
  assert other.ids(jnp.array([[True, True]])).tolist() == [1]
  said = {**singles, frozenset(("image", "sound")): None}
  _, both = routes(adapters, said, priority=["image", "sound"])
  assert both.table.tolist() == [-1, 0, 1, -1]
  with pytest.raises(ValueError, match=r"no entry: \{sound\}"):
    routes(adapters, {"image": "eye"}, priority=["image", "sound"])


def test_another_table_does_not_compile_again():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def ids(ways, present):
    return ways.ids(present)

  _, ways = table()
  assert ids(ways, PRESENT).tolist() == [-1, 0, 1, 0, -1]
  other = Routes(ways.names, ways.modalities, ways.table[::-1])
  assert ids(other, PRESENT).tolist() == [0, 1, 0, -1, 0]


def gradients(present):
  run, params, _ = small()
  bank, ways = table()

  def loss(bank):
    y = adapt_rows(run)(params, bank, ways.ids(present), TEXTS)
    return jnp.mean(jnp.sin(y))

  return bank, jax.jit(jax.grad(loss))(bank)


@pytest.mark.usefixtures("standard_promotion")
def test_text_has_no_gradient_and_an_image_batch_leaves_sound_as_it_was():
  _, slopes = gradients(jnp.zeros((5, 2), bool))
  assert all((x == 0).all() for x in jax.tree.leaves(slopes))
  bank, first = gradients(PRESENT)
  _, images = gradients(PRESENT.at[2].set(jnp.array([False, True])[::-1]))
  part = lambda loras: {  # noqa: E731
    path: {"a": x.a, "b": x.b} for path, x in loras.items()
  }
  optimiser = optax.adamw(1e-2, weight_decay=0.1)
  safe = used_only(optimiser)
  own = part(bank)
  states = [one.init(own) for one in (optimiser, safe)]
  moved = []
  for one, state in zip((optimiser, safe), states, strict=True):
    change, state = one.update(part(first), state, own)
    once = optax.apply_updates(own, change)
    change, after = one.update(part(images), state, once)
    twice = optax.apply_updates(once, change)
    kinds = [(path, name) for path in own for name in "ab"]
    steps = [
      np.asarray(once[path][name] - twice[path][name]) for path, name in kinds
    ]
    moved.append([bool(step[1].any()) for step in steps])
    assert all(step[0].any() for step in steps)
  assert any(moved[0])  # momentum and decay move it
  assert not any(moved[1])
  # Its moments wait too.
  for path in own:
    for name in "ab":
      np.testing.assert_array_equal(
        after[0].mu[path][name][1], state[0].mu[path][name][1]
      )
  assert int(after[0].count) == 2


def test_a_cache_of_another_adapter_is_refused():
  check_cache(jnp.array([0, -1, 1]), np.array([0, -1, 1]))
  with pytest.raises(
    ValueError, match=r"2 rows.*row 0: -1 in the cache, now 0, row 2"
  ):
    check_cache(jnp.array([0, -1, 1]), jnp.array([-1, -1, 0]))
  with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
    check_cache(jnp.zeros(2, int), jnp.zeros(3, int))
  with pytest.raises(ValueError, match="outside of jit"):
    jax.jit(lambda ids: check_cache(ids, ids))(jnp.zeros(2, int))


def test_what_is_generated_under_another_adapters_cache_is_wrong():
  """An image comes in a later turn: the keys of the text before it are old."""
  run, params, adapters = small()
  _, ways = table()
  tuned = apply(params, adapters["eye"])
  first, after = Span(0, 8, None), Span(jnp.int32(4), 8, None)
  caches = [
    run.extend(own, TEXTS[:1, :4], first, {})[1] for own in (params, tuned)
  ]
  on_old, on_new = (
    run.extend(tuned, TEXTS[:1, 4:5], after, cache)[0] for cache in caches
  )
  assert np.abs(on_old - on_new).max() > 1e-3
  then, now = ways.ids(PRESENT[:1]), ways.ids(PRESENT[1:2])
  with pytest.raises(ValueError, match="compute their keys and values again"):
    check_cache(now, then)


def test_what_does_not_fit_is_refused():
  adapters = small()[2]
  with pytest.raises(ValueError, match="not given: nose"):
    routes(adapters, {**BY, "smell": "nose"})
  with pytest.raises(ValueError, match=r"twice: \{image, sound\}"):
    routes(adapters, {**BY, ("sound", "image"): "eye"})
  with pytest.raises(ValueError, match="0 modalities"):
    routes(adapters, {(): None})
  with pytest.raises(ValueError, match="priority is"):
    routes(adapters, BY, priority=["image"])
  with pytest.raises(ValueError, match="no adapters"):
    routes({}, BY)
  with pytest.raises(ValueError, match="9 modalities"):
    routes(adapters, {tuple(map(str, range(9))): "eye"})
  with pytest.warns(UserWarning, match="no set of modalities: ear"):
    routes(adapters, {(): None, "image": "eye"})
  _, ways = table()
  with pytest.raises(ValueError, match=r"int32 \(5, 2\)"):
    ways.ids(PRESENT.astype(jnp.int32))
  with pytest.raises(ValueError, match=r"\(5, 3\)"):
    ways.ids(jnp.ones((5, 3), bool))
