# SPDX-License-Identifier: Apache-2.0
"""Gates that read a layer's input, against their equation written out."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora import models
from jlora.adapting.banks import make_bank
from jlora.adapting.binding import bind
from jlora.adapting.programs import Branch, Gated
from jlora.adapting.rows import adapt_rows
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.training.snapshots import Snapshot, load_snapshot, save_snapshot
from jlora.training.trainer import train, trained_part
from jlora.views import LINEAR
from tests.jlora.adapting.test_meshes import mapped, mesh_of
from tests.jlora.adapting.test_models import CONFIGS, TOKENS, Stacked, linen

N, R, IN, OUT = 3, 2, 6, 8


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def bank_of(n=N, r=R, width=IN, out=OUT, lead=(), seed=0):
  return Lora(
    draw(seed, n, *lead, r, width),
    draw(seed + 1, n, *lead, r, out),
    draw(seed + 2, n, *lead),
  )


def softmax_gate(params, x):
  """A gate of its own for every row."""
  return jax.nn.softmax(jnp.einsum("...i,ni->...n", x, params["rows"]))


def first_row_gate(params, x):
  """One gate for all rows of an example, which may be broadcast."""
  return softmax_gate(params, x[..., :1, :])


def constant(params, x):
  return params


def program_of(gate=softmax_gate, **kwargs):
  bank = bank_of(**kwargs)
  shape = (*bank.a.shape[1:-2], bank.a.shape[0], bank.a.shape[-1])
  return Gated(bank, {"rows": draw(7, *shape)}, gate)


def reference(program, w, x):
  """The equation, for x (..., in) and one matrix w (in, out)."""
  bank = program.bank
  gates = program.gate(program.params, x)
  gates = jnp.broadcast_to(gates, (*x.shape[:-1], len(bank.a)))
  u = jnp.einsum("...i,nri->...nr", x, bank.a)
  return x @ w + jnp.einsum(
    "...nr,...n,n,nro->...o", u, gates, bank.scale, bank.b
  )


def same(found, wanted, rtol=1e-4, atol=1e-5):
  for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def with_gradients(function):
  """(value, its gradients in the program, w and x), compiled."""

  def total(program, w, x):
    y = function(program, w, x)
    return jnp.sum(jnp.sin(y)), y

  return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


def heads(w):
  return w.reshape(IN, 2, OUT // 2)


FORMS = {
  "x w": (lambda p, x: x @ p["w"], lambda w: w),
  "from the other side": (lambda p, x: (p["w"].T @ x.T).T, lambda w: w),
  "stored (out, in)": (lambda p, x: x @ p["weight"].T, lambda w: w.T),
  "heads": (
    lambda p, x: jnp.einsum("td,dhk->thk", x, p["q"]["kernel"]).reshape(
      -1, OUT
    ),
    heads,
  ),
  "heads are read": (
    lambda p, x: jnp.einsum(
      "hkt,hkd->td", x.T.reshape(2, IN // 2, -1), p["o"]["kernel"]
    ),
    lambda w: w.reshape(2, IN // 2, OUT),
  ),
  "cut along the outputs": (
    lambda p, x: jnp.concatenate(
      [x @ part for part in jnp.split(p["w"], [2], axis=1)], -1
    ),
    lambda w: w,
  ),
  "cast and nested": (
    lambda p, x: jax.jit(lambda w, x: x @ w.astype(jnp.float32))(p["w"], x),
    lambda w: w,
  ),
  "remat": (jax.checkpoint(lambda p, x: x @ p["w"]), lambda w: w),
  "cond": (
    lambda p, x: lax.cond(
      x[0, 0] > -1e9, lambda w: x @ w, lambda w: 2 * (x @ w), p["w"]
    ),
    lambda w: w,
  ),
  "a loop": (
    lambda p, x: lax.fori_loop(
      0, 1, lambda _, y: y + x @ p["w"], jnp.zeros((len(x), OUT))
    ),
    lambda w: w,
  ),
  "row by row": (
    lambda p, x: lax.map(lambda row: row @ p["w"], x),
    lambda w: w,
  ),
  "vmap": (lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), lambda w: w),
  "w for every row": (
    lambda p, x: jax.vmap(jnp.dot)(
      x, jnp.broadcast_to(p["w"][None], (len(x), IN, OUT))
    ),
    lambda w: w,
  ),
}
NAMES = {"stored (out, in)": "weight", "heads": "q/kernel"}
NAMES["heads are read"] = "o/kernel"
TORCH = ((r"weight", 2, LINEAR),)


def params_of(name, w):
  path = NAMES.get(name, "w")
  own = FORMS[name][1](w)
  for key in reversed(path.split("/")):
    own = {key: own}
  return own, path


@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_those_of_the_equation(name):
  form, program = FORMS[name][0], program_of()
  w, x = draw(3, IN, OUT), draw(4, 5, IN)

  def run(program, w, x):
    params, path = params_of(name, w)
    views = TORCH if name == "stored (out, in)" else None
    return adapt(form, strict=True)(
      bind(params, {path: program}, views=views), x
    )

  if name == "a loop":  # of a length that is not static in reverse
    same(run(program, w, x), reference(program, w, x))
    return
  found = with_gradients(run)(program, w, x)
  wanted = with_gradients(reference)(program, w, x)
  same(found, wanted, rtol=1e-3, atol=1e-4)
  moved = jax.tree.map(lambda g: np.abs(g).max() > 1e-3, found[1][0])
  assert all(jax.tree.leaves(moved))


sizes = st.integers(1, 5)


@settings(max_examples=15, deadline=None)
@given(
  n=sizes, r=sizes, width=sizes, out=sizes,
  rows=st.lists(sizes, max_size=3), seed=st.integers(0, 99),
  gate=st.sampled_from([softmax_gate, first_row_gate, constant]),
)  # fmt: skip
def test_any_shapes(n, r, width, out, rows, seed, gate):
  if gate is first_row_gate and not rows:
    return
  program = program_of(gate, n=n, r=r, width=width, out=out, seed=seed)
  if gate is constant:
    program = dataclasses.replace(program, params=draw(seed, n))
  w, x = draw(seed, width, out), draw(seed + 1, *rows, width)
  found = adapt(lambda p, x: x @ p["w"], strict=True)(
    bind({"w": w}, {"w": program}), x
  )
  same(found, reference(program, w, x), rtol=1e-3, atol=1e-4)


def test_layers_that_are_scanned_have_gates_of_their_own():
  program = program_of(lead=(4,), width=OUT)
  w, x = draw(3, 4, OUT, OUT) / 4, draw(4, 5, OUT)

  def run(program, w, x):
    @jax.checkpoint
    def body(x, w):
      return jnp.tanh(x @ w), None

    fn = lambda p, x: lax.scan(body, x, p["w"])[0]  # noqa: E731
    return adapt(fn, strict=True)(bind({"w": w}, {"w": program}), x)

  def wanted(program, w, x):
    for i in range(4):
      bank = jax.tree.map(lambda leaf, i=i: leaf[:, i], program.bank)
      own = Gated(bank, {"rows": program.params["rows"][i]}, softmax_gate)
      x = jnp.tanh(reference(own, w[i], x))
    return x

  same(
    with_gradients(run)(program, w, x),
    with_gradients(wanted)(program, w, x),
    rtol=1e-3,
    atol=1e-4,
  )

  def unrolled(p, x):
    for i in range(4):
      x = jnp.tanh(x @ p["w"][i])
    return x

  by_number = lambda p, x: lax.fori_loop(  # noqa: E731
    0, 4, lambda i, x: jnp.tanh(x @ p["w"][i]), x
  )
  bound = bind({"w": w}, {"w": program})
  for fn in (unrolled, by_number):
    same(adapt(fn, strict=True)(bound, x), wanted(program, w, x), rtol=1e-3)


def test_experts_of_one_product_have_gates_of_their_own():
  program = program_of(lead=(4,))
  w, x = draw(3, 4, IN, OUT), draw(4, 4, 5, IN)
  run = adapt(lambda p, x: jnp.einsum("eci,eio->eco", x, p["w"]), strict=True)
  found = run(bind({"w": w}, {"w": program}), x)
  for i in range(4):
    bank = jax.tree.map(lambda leaf, i=i: leaf[:, i], program.bank)
    own = Gated(bank, {"rows": program.params["rows"][i]}, softmax_gate)
    same(found[i], reference(own, w[i], x[i]))


def test_vmap_over_inputs_and_over_parameters_of_the_gate():
  program, w, x = program_of(), draw(3, IN, OUT), draw(4, 5, 7, IN)
  many = draw(9, 4, N, IN)

  def run(rows, x):
    own = dataclasses.replace(program, params={"rows": rows})
    return adapt(lambda p, x: x @ p["w"])(bind({"w": w}, {"w": own}), x)

  found = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(many, x)
  assert found.shape == (4, 5, 7, OUT)
  for i in range(4):
    own = dataclasses.replace(program, params={"rows": many[i]})
    same(found[i], reference(own, w, x))


def test_one_hot_gates_are_adapters_by_ids_and_ones_are_their_sum():
  adapters = [
    {"w": Lora(draw(i, i + 1, IN), draw(i + 9, i + 1, OUT), jnp.float32(0.5))}
    for i in range(N)
  ]
  bank, w, x = make_bank(adapters), draw(3, IN, OUT), draw(4, 5, IN)
  fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
  ids = jnp.array([2, 0, -1, 1, 2])
  by_ids = adapt_rows(fn)({"w": w}, bank, ids, x)
  one_hot = Gated(bank["w"], jax.nn.one_hot(ids, N), constant)
  same(adapt(fn)(bind({"w": w}, {"w": one_hot}), x), by_ids)
  ones = Gated(bank["w"], jnp.ones(N), constant)
  same(
    adapt(fn)(bind({"w": w}, {"w": ones}), x), fn(apply({"w": w}, adapters), x)
  )


def test_adapters_by_row_go_beside_gates():
  program, w, x = (
    program_of(first_row_gate),
    draw(3, IN, OUT),
    draw(4, 5, 7, IN),
  )
  bank = {"w": bank_of(seed=20)}
  ids = jnp.array([2, -1, 0, 1, 1])
  rows = adapt_rows(lambda p, x: x @ p["w"], strict=True)
  found = rows(bind({"w": w}, {"w": program}), bank, ids, x)
  for i, at in enumerate(ids.tolist()):
    own = jax.tree.map(lambda leaf, at=at: leaf[at], bank)
    own = w if at < 0 else apply({"w": w}, own)["w"]
    same(found[i], reference(program, own, x[i]), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_gate_is_what_its_adapter_writes():
  program, w, x = program_of(constant), draw(3, IN, OUT), draw(4, 5, IN)
  gates, down = draw(5, 5, N), draw(6, 5, OUT)

  def total(gates):
    own = dataclasses.replace(program, params=gates)
    y = adapt(lambda p, x: x @ p["w"])(bind({"w": w}, {"w": own}), x)
    return jnp.sum(y * down)

  bank = program.bank
  each = jnp.einsum("bi,nri,nro,n->bno", x, bank.a, bank.b, bank.scale)
  same(jax.grad(total)(gates), jnp.einsum("bno,bo->bn", each, down))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
  program, w, x = program_of(), draw(3, IN, OUT) / 4, draw(4, 5, IN)
  half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
  own = dataclasses.replace(program, params=half(program.params))
  run = adapt(lambda p, x: x @ p["w"], strict=True)
  found = run(bind(half({"w": w}), {"w": own}), half(x))
  assert found.dtype == dtype
  wanted = reference(program, w, x)
  np.testing.assert_allclose(
    found.astype(jnp.float32), wanted, atol=0.06 * float(np.abs(wanted).max())
  )


def test_a_model_with_constant_gates_is_the_model_with_merged_weights():
  run, params = models.init(CONFIGS["llama, tied"], jax.random.key(0))
  flat = {
    path: leaf for path, leaf in flatten(params).items()
    if leaf.ndim == 2 and "layers/1" in path
  }  # fmt: skip
  banks = {
    path: bank_of(width=leaf.shape[0], out=leaf.shape[1], seed=i)
    for i, (path, leaf) in enumerate(flat.items())
  }
  banks = {p: dataclasses.replace(b, b=0.05 * b.b) for p, b in banks.items()}
  weights = [0.5, -1.0, 2.0]
  programs = {
    path: Gated(bank, jnp.array(weights), constant)
    for path, bank in banks.items()
  }
  adapters = [
    {path: jax.tree.map(lambda leaf, i=i: leaf[i], bank)
     for path, bank in banks.items()}
    for i in range(N)
  ]  # fmt: skip
  fast = jax.jit(run)
  wanted = fast(apply(params, adapters, weights), TOKENS)
  found = jax.jit(adapt(run, strict=True))(bind(params, programs), TOKENS)
  same(found, wanted, rtol=1e-3, atol=1e-4)
  assert np.abs(found - fast(params, TOKENS)).max() > 1e-2


def test_linen_blocks_under_scan_and_remat():
  run, params, x = linen(Stacked(), draw(3, 2, 5, 16))
  path = next(p for p, x in flatten(params).items() if x.shape == (3, 16, 24))
  layers = 3
  program = program_of(lead=(layers,), width=16, out=24)
  bound = bind(params, {path: program})
  found, notes = jax.jit(adapt(run, strict=True, has_notes=True))(bound, x)
  assert found.shape == x.shape
  assert not notes
  ones = dataclasses.replace(
    program, params=jnp.ones((layers, N)), gate=constant
  )
  adapters = [
    {path: jax.tree.map(lambda leaf, i=i: leaf[i], program.bank)}
    for i in range(N)
  ]
  same(
    adapt(run, strict=True)(bind(params, {path: ones}), x),
    run(apply(params, adapters), x),
    rtol=1e-3,
    atol=1e-4,
  )


def test_programs_compose_with_weights_and_dropout():
  program, w, x = program_of(), draw(3, IN, OUT), draw(4, 5, IN)
  lora = Lora(draw(11, 2, IN), draw(12, 2, OUT), jnp.float32(0.3))
  line = Branch(lambda p, x: x @ p, draw(13, IN, OUT))
  sets = [{"w": program}, {"w": lora}, {"w": line}, {"w": program}]
  weights = [2.0, -1.0, 0.5, 1.0]
  run = adapt(lambda p, x: x @ p["w"], strict=True)
  found = run(bind({"w": w}, sets, weights), x)
  wanted = (
    3 * (reference(program, w, x) - x @ w)
    + x @ apply({"w": w}, [{"w": lora}], [-1.0])["w"]
    + 0.5 * x @ line.params
  )
  same(found, wanted, rtol=1e-3, atol=1e-4)

  def one(key):
    return run(bind({"w": w}, {"w": program}, dropout=(0.4, key)), x)

  found = jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))
  error = np.std(found, axis=0) / np.sqrt(len(found))
  exact = reference(program, w, x)
  assert np.all(np.abs(found.mean(0) - exact) < 5 * error + 1e-4)
  assert np.std(found, axis=0).max() > 1e-2


def test_notes_come_out_of_loops_and_remat():
  def telling(params, x):
    return softmax_gate(params, x), x.sum(axis=-1)

  program = program_of(telling, lead=(4,), width=OUT)
  single = program_of(telling, width=OUT)
  w, v, x = draw(3, 4, OUT, OUT) / 4, draw(5, OUT, OUT), draw(4, 5, OUT)

  @jax.checkpoint
  def body(x, w):
    return jnp.tanh(x @ w), x.sum(axis=-1)

  def fn(p, x):
    x = x @ p["v"] + x @ p["v"]
    return lax.scan(body, x, p["w"])

  bound = bind({"v": v, "w": w}, {"v": single, "w": program})
  (y, sums), notes = jax.jit(adapt(fn, has_notes=True))(bound, x)
  same(y, adapt(fn)(bound, x)[0])
  assert {path: len(found) for path, found in notes.items()} == {"v": 2, "w": 1}
  same(notes["w"][0], sums)
  same(notes["v"][1], x.sum(axis=-1))
  total = lambda x: adapt(fn, has_notes=True)(bound, x)[1]["w"][0].sum()  # noqa: E731
  plain = lambda x: adapt(fn)(bound, x)[1].sum()  # noqa: E731
  same(jax.grad(total)(x), jax.grad(plain)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "fn"),
  [
    ("cond", lambda p, x: lax.cond(True, lambda w: x @ w, lambda w: x @ w, p)),
    ("while", lambda p, x: lax.fori_loop(0, x[0, 0].astype(int),
                                         lambda _, y: y + x @ p, x)),
  ],
)  # fmt: skip
def test_notes_that_cannot_leave_are_refused(name, fn):
  gate = lambda params, x: (softmax_gate(params, x), x.sum())  # noqa: E731
  bound = bind({"w": draw(3, IN, IN)}, {"w": program_of(gate, out=IN)})
  with pytest.raises(ValueError, match=f"notes within {name}"):
    adapt(lambda p, x: fn(p["w"], x), has_notes=True)(bound, draw(4, 5, IN))
  assert adapt(lambda p, x: fn(p["w"], x))(bound, draw(4, 5, IN)) is not None


REFUSED = {
  "conv_general_dilated": lambda p, x: lax.conv_general_dilated(
    x[None, None], p["w"][None, None], (1, 1), "SAME"
  ),
  "gather": lambda p, x: p["w"][x[:, 0].astype(int)],
  "ragged_dot_general": lambda p, x: lax.ragged_dot(
    x, p["w"][None], jnp.array([len(x)])
  ),
  "sin": lambda p, x: x @ jnp.sin(p["w"]),
  "mul": lambda p, x: x @ (2 * p["w"]),
  "add": lambda p, x: x + p["w"][:5, :IN],
  "reads 3": lambda p, x: x[:, :3] @ p["w"][:3],
  "its gate needs all": lambda p, x: jnp.pad(x, ((0, 0), (0, 2))) @ p["w"].T,
  "a matmul; give": lambda p, x: p["w"],
  "transpose": lambda p, x: jnp.einsum(
    "tkh,hkd->td", x.reshape(-1, 3, 2),
    jnp.transpose(p["o"]["kernel"], (1, 0, 2)).transpose(1, 0, 2),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_gates_cannot_do_is_an_error_that_names_it(name):
  params = {"w": draw(3, IN, OUT), "o": {"kernel": draw(3, 2, 3, OUT)}}
  path = "o/kernel" if name == "transpose" else "w"
  bound = bind(params, {path: program_of()})
  with pytest.raises(ValueError, match=name) as error:
    adapt(REFUSED[name])(bound, draw(4, 5, IN))
  assert path in str(error.value)


def test_custom_vjp_is_an_error():
  @jax.custom_vjp
  def dot(x, w):
    return x @ w

  dot.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g)
  )
  bound = bind({"w": draw(3, IN, OUT)}, {"w": program_of()})
  run = adapt(lambda p, x: dot(x, p["w"]))
  x = draw(4, 5, IN)
  same(run(bound, x), reference(program_of(), draw(3, IN, OUT), x))
  with pytest.raises(ValueError, match="w has a Gated"):
    jax.grad(lambda x: run(bound, x).sum())(x)


WRONG = {
  "no bank": (Gated(Lora(draw(0, 2, IN), draw(1, 2, OUT), draw(2)), ()), "w"),
  "width": (program_of(width=5), r"3, 2, 5"),
  "vector": (program_of(), "n float32"),
  "malformed": (
    Gated(Lora(draw(0, 3, 2, IN), draw(1, 3, 2, OUT), draw(2, 2)), ()),
    "malformed",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_programs_that_do_not_fit_are_refused(name):
  program, message = WRONG[name]
  params = {"w": jnp.zeros((IN, OUT)), "n": jnp.zeros(8)}
  path = "n" if name == "vector" else "w"
  with pytest.raises(ValueError, match=message):
    bind(params, {path: program})


def test_parameters_of_gates_begin_with_the_layers():
  program = dataclasses.replace(
    program_of(lead=(4,)), params={"rows": draw(0, N, IN)}
  )
  with pytest.raises(ValueError, match=r"w\['rows'\] \(3, 6\) for \(4,\)"):
    bind({"w": draw(0, 4, IN, OUT)}, {"w": program})


def test_gates_of_the_wrong_shape_are_refused():
  program = dataclasses.replace(program_of(constant), params=draw(0, N + 1))
  bound = bind({"w": draw(0, IN, OUT)}, {"w": program})
  with pytest.raises(ValueError, match=r"gave \(4,\).*\(5, 3\)"):
    adapt(lambda p, x: x @ p["w"])(bound, draw(1, 5, IN))


def test_ids_and_dense_sums_are_refused():
  params, program = {"w": draw(0, IN, OUT)}, program_of()
  with pytest.raises(ValueError, match="Gated has no dense form"):
    apply(params, {"w": program})
  with pytest.raises(ValueError, match="do not fit"):
    bind(params, {"w": program}, ids=0)


MESHES = {
  "rows": (lambda x, w: x @ w, (P("rows"), P()), P("rows")),
  "columns": (lambda x, w: x @ w, (P("rows"), P(None, "k")), P("rows", "k")),
  "gathered": (
    lambda x, w: x @ lax.all_gather(w, "k", axis=0, tiled=True),
    (P("rows"), P("k")), P("rows"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
def test_shard_map(name):
  fn, ins, outs = MESHES[name]
  program = program_of(width=16, out=8)
  w, x = draw(3, 16, 8), draw(4, 8, 16)
  own = mapped(fn, ins, outs, check_vma=name != "gathered")

  def run(program, w, x):
    bound = bind({"w": w}, {"w": program})
    return adapt(lambda p, x: own(x, p["w"]), strict=True)(bound, x)

  same(
    with_gradients(run)(program, w, x),
    with_gradients(reference)(program, w, x),
    rtol=1e-3,
    atol=1e-4,
  )


def test_shard_map_of_a_part_of_the_inputs_is_refused():
  own = mapped(
    lambda x, w: lax.psum(x @ w, "k"), (P("rows", "k"), P("k")), P("rows")
  )
  bound = bind({"w": draw(3, 16, 8)}, {"w": program_of(width=16)})
  with pytest.raises(ValueError, match="reads 4"):
    adapt(lambda p, x: own(x, p["w"]))(bound, draw(4, 8, 16))


@pytest.mark.parametrize("spec", [P("k"), P(None, "k"), P()])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_with_shardings(spec, kind):
  if kind == AxisType.Explicit and spec == P("k"):
    return  # a product that sums over cut inputs must say where it goes
  program = program_of(width=16, out=8)
  w, x = draw(3, 16, 8), draw(4, 8, 16)
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
    rows = jax.device_put(x, NamedSharding(mesh, P("rows")))
    run = jax.jit(adapt(lambda p, x: x @ p["w"], strict=True))
    found = run(bind(params, {"w": program}), rows)
  same(found, reference(program, w, x))


def test_equal_gates_share_a_program():
  chex.clear_trace_counter()

  @dataclasses.dataclass(frozen=True)
  class Scaled:
    by: float

    def __call__(self, params, x):
      return self.by * softmax_gate(params, x)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(program, x):
    return adapt(lambda p, x: x @ p["w"])(bind({"w": w}, {"w": program}), x)

  w, x, params = draw(3, IN, OUT), draw(4, 5, IN), program_of().params
  one = run(Gated(bank_of(), params, Scaled(2.0)), x)
  other = run(Gated(bank_of(seed=5), params, Scaled(2.0)), x)
  assert np.abs(one - other).max() > 1e-2


@pytest.fixture
def standard_promotion():
  """Optax counts in int32 and multiplies by floats."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.usefixtures("standard_promotion")
def test_training_moves_the_bank_and_the_gate_but_not_the_scale(tmp_path):
  w, x = draw(3, IN, OUT), draw(4, 64, IN)
  y = jnp.where(x[:, :1] > 0, x @ draw(5, IN, OUT), x @ draw(6, IN, OUT))
  loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)  # noqa: E731
  start = {"w": dataclasses.replace(program_of(r=4), bank=bank_of(r=4))}
  init, update = train(loss, optax.adam(3e-2), dtype=jnp.float32)
  programs, state, step = start, init(start), jax.jit(update)
  assert sorted(trained_part(start)["w"]) == ["bank", "params"]
  losses = []
  for _ in range(150):
    programs, state, value = step(programs, state, {"w": w}, x, y)
    losses.append(float(value))
  assert losses[-1] < 0.2 * losses[0]
  before, after = start["w"], programs["w"]
  assert np.array_equal(before.bank.scale, after.bank.scale)
  for one, other in (
    (before.bank.a, after.bank.a),
    (before.bank.b, after.bank.b),
    (before.params["rows"], after.params["rows"]),
  ):
    assert np.abs(one - other).max() > 1e-2
  # Frozen gates are worse: what is learned there is of use.
  frozen = functools.partial(optax.partition, {
    "a": optax.adam(3e-2), "b": optax.set_to_zero()
  })  # fmt: skip
  labels = {"w": {"bank": "a", "params": "b"}}
  init, update = train(loss, frozen(labels))
  programs, state, step = start, init(start), jax.jit(update)
  for _ in range(150):
    programs, state, value = step(programs, state, {"w": w}, x, y)
  assert float(value) > 1.1 * losses[-1]
  kept = Snapshot({"w": after}, {"n": jnp.int32(1)}, jax.random.key(0), 1)
  save_snapshot(tmp_path, kept)
  like = kept._replace(programs=start)
  chex.assert_trees_all_equal(
    load_snapshot(tmp_path, like).programs, kept.programs
  )
