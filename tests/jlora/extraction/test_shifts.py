# SPDX-License-Identifier: Apache-2.0
"""What is no matrix: named and weighed, or returned; nothing gets lost."""

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.factoring.factorisers import svd
from jlora.paths import flatten, matching
from jlora.selection import is_linear
from jlora.views import MatrixView

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
# A kind of block -> shapes of its parameters, of two widths.
BLOCKS = {
  "dense": lambda d, n: {"up/kernel": (d, n), "up/bias": (n,)},
  "scanned": lambda d, n: {
    "layers/up/kernel": (3, d, n), "layers/up/bias": (3, n),
    "layers/norm/scale": (3, d), "layers/query/kernel": (3, d, 2, n),
    "layers/query/bias": (3, 2, n), "layers/out/kernel": (3, 2, n, d),
  },
  "second axis": lambda d, n: {
    "h/up/kernel": (d, 3, n + d), "h/norm/scale": (d, 3),
  },
  "heads": lambda d, n: {
    "query/kernel": (d, 2, n), "query/bias": (2, n), "out/kernel": (2, n, d),
    "out/bias": (d,), "attn/qkv/kernel": (d, 3, 2, n),
  },
  "convolution": lambda d, n: {
    "Conv_0/kernel": (3, 3, d, n), "Conv_0/bias": (n,),
    "stem/kernel": (2, 2, 3, n), "stem/bias": (n,), "conv1/weight": (n, d, 3),
  },
  "experts": lambda d, n: {
    "moe/experts/wi": (4, d, n), "moe/experts/wo": (4, n, d),
    "moe/gate/kernel": (d, 4), "moe/experts/bias": (4, n),
  },
  "table": lambda d, n: {"embed/embedding": (n + 5, d), "cls": (1, 1, d)},
  "scalars": lambda d, n: {"temperature": (), "one": (1,), "gate/scale": (d,)},
}  # fmt: skip


@st.composite
def pairs(draw):
  """Two trees of some blocks, each leaf of a dtype, some of them unchanged."""
  kinds = draw(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3)
  )
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  base, finetuned = {"m/kernel": rng.normal(size=(4, 6))}, {}
  for at, kind in enumerate(kinds):
    for path, shape in BLOCKS[kind](8, 5).items():
      base[f"b{at}/{path}"] = np.asarray(rng.normal(size=shape))
  for path, leaf in base.items():
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([0, 1e-3, 1]))
    base[path] = leaf.astype(dtype)
    change = size * np.asarray(rng.normal(size=leaf.shape))
    finetuned[path] = (base[path].astype(float) + change).astype(dtype)
  return base, finetuned


def nested(flat):
  """A flat dict as a tree of dicts."""
  tree = {}
  for path, leaf in flat.items():
    *holders, last = path.split("/")
    node = tree
    for holder in holders:
      node = node.setdefault(holder, {})
    node[last] = leaf
  return tree


@pytest.mark.filterwarnings("ignore:.*hold more numbers than their weights")
@settings(max_examples=25, deadline=None)
@given(pairs())
def test_at_full_rank_with_shifts_nothing_is_lost(pair):
  """Leaf by leaf, to one rounding of the leaf's dtype."""
  base, finetuned = (nested(jax.tree.map(jnp.asarray, x)) for x in pair)
  programs = jlora.extract(base, finetuned, rank=10**6, factor=svd, shifts=True)
  got = flatten(jlora.apply(base, programs))
  want, start = flatten(finetuned), flatten(base)
  assert set(programs) == set(want)
  for path, leaf in want.items():
    assert got[path].dtype == leaf.dtype
    new, old, was = (
      np.asarray(x[path], np.float64) for x in (want, got, start)
    )
    # The leaf's own rounding, and float32's of the factors.
    one = float(jnp.finfo(leaf.dtype).eps) * np.abs(new)
    factors = 3e-6 * np.linalg.norm(new - was) + 1e-6 * np.abs(was)
    assert np.all(np.abs(new - old) <= one + factors), path


SMALL = {
  "q": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
  "norm": {"scale": jnp.ones(6)},
}


def changed(**by):
  """The small tree with a change of some leaves."""
  flat = flatten(SMALL)
  moved = {p.replace("/", "_"): p for p in flat}
  for name, size in by.items():
    flat[moved[name]] = flat[moved[name]] + size
  return nested(flat)


def test_what_is_left_out_is_named_and_weighed():
  finetuned = changed(q_kernel=1.0, q_bias=2.0, norm_scale=1.0)
  # ‖kernel‖² 48, ‖bias‖² 32, ‖norm‖² 6.
  whole = np.sqrt(48 + 32 + 6)
  said = (
    f"2 changed parameters are no matrices and left out, "
    f"{np.sqrt(38) / whole:.1%} of the change: q/bias \\(8,\\) "
    f"{np.sqrt(32) / whole:.1%}, norm/scale \\(6,\\) {np.sqrt(6) / whole:.1%}"
  )
  with pytest.warns(UserWarning, match=said):
    loras = jlora.extract(SMALL, finetuned, rank=1)
  assert list(loras) == ["q/kernel"]


@pytest.mark.parametrize(
  ("select", "named"),
  [
    (is_linear, ["q/bias", "norm/scale"]),
    (matching("q/.*"), ["q/bias"]),
    (matching("q/kernel"), []),
    (lambda _, leaf: len(leaf.shape) == 2, ["q/bias", "norm/scale"]),
  ],
)
def test_a_selection_says_of_names_what_it_says_of_matrices(select, named):
  finetuned = changed(q_kernel=1.0, q_bias=2.0, norm_scale=1.0)
  run = functools.partial(
    jlora.extract, SMALL, finetuned, rank=1, select=select
  )
  assert sorted(run(shifts=True)) == sorted(["q/kernel", *named])
  with warnings.catch_warnings(record=True, action="always") as seen:
    run()
  assert len(seen) == bool(named)
  for path in named:
    assert path in str(seen[0].message)


def test_what_did_not_change_is_no_loss_but_has_its_place():
  """The structure hangs on shapes alone, as under jit."""
  finetuned = changed(q_kernel=1.0)
  assert list(jlora.extract(SMALL, finetuned, rank=1)) == ["q/kernel"]
  run = functools.partial(jlora.extract, rank=1, shifts=True)
  eager, traced = run(SMALL, finetuned), jax.jit(run)(SMALL, finetuned)
  assert jax.tree.structure(eager) == jax.tree.structure(traced)
  assert not eager["q/bias"].delta.any()


def test_traced_parameters_of_two_axes_are_named():
  base = {"h": {"w": jnp.ones((3, 6, 8)), "norm": jnp.ones((3, 6))}}
  run = functools.partial(jlora.extract, rank=1)
  with pytest.warns(UserWarning, match=r"1 parameters.*changed or not: h/norm"):
    jax.eval_shape(run, base, base)
  jax.eval_shape(functools.partial(run, shifts=True), base, base)
  assert list(run(base, base)) == ["h/w"]  # eager: nothing changed


@pytest.mark.parametrize("cut", [P("x"), P()])
def test_arrays_on_several_devices_are_weighed_where_they_lie(cut):
  place = NamedSharding(jax.make_mesh((2,), ("x",)), cut)
  base, finetuned = jax.device_put(
    (SMALL, changed(q_kernel=1.0, q_bias=2.0)), place
  )
  with pytest.warns(UserWarning, match=r"1 changed.*q/bias \(8,\) 63.2%"):
    jlora.extract(base, finetuned, rank=1)
  programs = jlora.extract(base, finetuned, rank=1, shifts=True)
  assert programs["q/bias"].delta.sharding.is_equivalent_to(place, 1)
  # Closed over, they are concrete, but nothing may be looked at.
  run = lambda: jlora.extract(base, finetuned, rank=1)  # noqa: E731
  assert list(jax.eval_shape(run)) == ["q/kernel"]


def test_matrices_without_a_view_are_no_exception():
  base = {"q": jnp.ones((6, 8)), "k": jnp.ones((6, 8))}
  finetuned = jax.tree.map(lambda w: w + 1, base)
  views = [("q", 2, MatrixView())]
  with pytest.warns(UserWarning, match=r"1 changed.*k \(6, 8\) 70.7%"):
    jlora.extract(base, finetuned, rank=1, views=views)
  programs = jlora.extract(base, finetuned, rank=1, views=views, shifts=True)
  assert programs["k"].delta.shape == (6, 8)


def test_leaves_that_are_not_floating_are_named():
  base = {"w": jnp.ones((6, 8)), "step": jnp.int32(3), "same": jnp.int32(1)}
  finetuned = {**base, "step": jnp.int32(4)}
  with pytest.warns(UserWarning, match="1 leaves that differ.*left out: step"):
    jlora.extract(base, finetuned, rank=1)


def test_open_checkpoints_are_weighed_too(tmp_path):
  from jlora.checkpoints.safetensors import write_safetensors

  names = {"m.q.weight": np.ones((6, 8), "f4"), "m.q.bias": np.ones(6, "f4")}
  for side, add in (("base", 0), ("ft", 1)):
    write_safetensors(
      tmp_path / f"{side}.safetensors", {n: w + add for n, w in names.items()}
    )
  files = [tmp_path / f"{side}.safetensors" for side in ("base", "ft")]
  base, finetuned = map(jlora.open_checkpoint, files)
  with pytest.warns(UserWarning, match=r"1 changed.*m.q.bias \(6,\) 33.3%"):
    jlora.extract(base, finetuned, rank=1)
  programs = jlora.extract(base, finetuned, rank=1, shifts=True)
  np.testing.assert_array_equal(programs["m.q.bias"].delta, 1)


@pytest.mark.filterwarnings("ignore:.*hold more numbers than their weights")
def test_what_comes_out_goes_into_bind():
  """Loras beside the weights, shifts on them: the finetune's outputs."""
  rng = np.random.default_rng(0)
  finetuned = jax.tree.map(
    lambda w: w + rng.normal(size=w.shape).astype(np.float32), SMALL
  )
  programs = jlora.extract(SMALL, finetuned, rank=8, shifts=True)

  def model(params, x):
    x = x * params["norm"]["scale"][None]
    return x @ params["q"]["kernel"] + params["q"]["bias"][None]

  x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
  found = jlora.adapt(model, strict=True)(jlora.bind(SMALL, programs), x)
  np.testing.assert_allclose(found, model(finetuned, x), atol=1e-4)


def test_the_storage_dtype_is_the_shifts_too():
  finetuned = changed(q_bias=2.0)
  programs = jlora.extract(
    SMALL, finetuned, rank=1, shifts=True, dtype=jnp.bfloat16
  )
  assert programs["q/bias"].delta.dtype == jnp.bfloat16


def test_doors_for_loras_alone_name_the_shifts(tmp_path):
  programs = jlora.extract(SMALL, changed(q_bias=2.0), rank=1, shifts=True)
  with pytest.raises(ValueError, match="are no Loras: norm/scale: Shift"):
    jlora.save_peft(tmp_path / "out", programs, like=flatten(SMALL))
