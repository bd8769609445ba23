# SPDX-License-Identifier: Apache-2.0
"""A basis of Loras mixed by attention from an example's query (LoRWeB).

y = x w + (α/r) Σ_n c_n (x a_nᵀ) b_n,   c = softmax(q Kᵀ / √d_k)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapting.binding import Program, bind
from jlora.adapting.programs import Gated
from jlora.adapting.transforms import adapt
from jlora.loras import Lora, Loras
from jlora.messages import name_some
from jlora.paths import key_for
from jlora.routing.choices import given
from jlora.selection import Select, is_linear
from jlora.training.inits import Init, kaiming, matrices_of
from jlora.views import ViewRule


class Basis(NamedTuple):
  """Loras of every adapted matrix, and what chooses among them.

  Attributes:
    loras: path -> Lora, a (n, ..., r, in), b (n, ..., r, out), scale (n, ...).
    keys: path -> (..., n, d_key).
    query: path -> W_q (..., d_query, d_key), which reads an example's query.
  """

  loras: dict[str, Lora]
  keys: dict[str, jax.Array]
  query: dict[str, jax.Array]


# (basis, query (B, d_query)) -> {path: (B, ..., n)}.
Mix = Callable[[Basis, jax.Array], dict[str, jax.Array]]


def kaiming_of_stack(key: jax.Array, shape: tuple[int, ...], rank: int):
  """Draws a uniform a by the inputs times the rank, and sets b to zero.

      a ~ U(-1/√(in r), 1/√(in r)),   b = 0

  Args:
    key: PRNG key.
    shape: (..., in, out) of the parameter read as a matrix.
    rank: number of units.

  Returns:
    a (..., rank, in), b (..., rank, out), float32.

  Example:
    >>> a, _ = kaiming_of_stack(jax.random.key(0), (4, 3), 4)
    >>> bool((jnp.abs(a) <= 0.25).all())
    True

  References:
    The initial bound of the authors' stacked factors, as described.
  """
  a, b = kaiming(key, shape, rank)
  return a / math.sqrt(rank), b


def init_basis(
  params: Any,
  key: jax.Array | None = None,
  *,
  n: int,
  rank: int,
  d_query: int,
  d_key: int = 128,
  alpha: float | None = None,
  paths: Select = is_linear,
  init: Init = kaiming,
  views: Iterable[ViewRule] | None = None,
) -> Basis:
  """Makes a new basis for training, which changes nothing yet.

      a_n, b_n = init,   K ~ N(0, 1),   W_q ~ N(0, 1/d_query),   scale = α/r

  Args:
    params: a pytree of arrays, or of anything with a shape and a dtype.
    key: PRNG key; None is `key(0)`. Each module uses `key_for(key, path)`.
    n: Loras in each module.
    rank: of each.
    d_query: size of an example's query.
    d_key: of keys.
    alpha: numerator of the scale; None is the rank, for a scale of 1. A mix of
      n Loras with weights of 1/n starts n times weaker than one of them.
    paths: `(path, leaf) -> bool`, which parameters have a basis.
    init: as for `init_lora`: `kaiming`, `kaiming_of_stack`, ...
    views: as for `init_lora`.

  Returns:
    Basis in float32.

  Raises:
    ValueError: sizes below 1, nothing selected, or a parameter that can be read
      as different matrices.

  Example:
    >>> basis = init_basis({"w": jnp.ones((3, 5))}, n=4, rank=2, d_query=6)
    >>> basis.loras["w"].b.shape, basis.keys["w"].shape, basis.query["w"].shape
    ((4, 2, 5), (4, 128), (6, 128))

  References:
    LoRWeB, arXiv 2602.15727.

  Approximation: the paper's text does not say how W_q starts.
  """
  sizes = {"n": n, "rank": rank, "d_query": d_query, "d_key": d_key}
  low = [f"{name}={size}" for name, size in sizes.items() if size < 1]
  if low:
    raise ValueError(f"Sizes must be at least 1, got {name_some(low)}.")
  modules = matrices_of(params, paths, views)
  if not modules:
    raise ValueError("No parameter is selected; give other paths=.")
  found = Basis({}, {}, {})
  for path, (leaf, view) in modules.items():
    shape = view.shape(leaf.shape)
    lead = shape[:-2]
    ours, theirs, reads = jax.random.split(key_for(key, path), 3)
    each = [init(own, shape, rank) for own in jax.random.split(ours, n)]
    scale = (rank if alpha is None else alpha) / rank
    found.loras[path] = Lora(
      jnp.stack([a for a, _ in each]),
      jnp.stack([b for _, b in each]),
      jnp.full((n, *lead), scale, jnp.float32),
    )
    found.keys[path] = jax.random.normal(theirs, (*lead, n, d_key))
    drawn = jax.random.normal(reads, (*lead, d_query, d_key))
    found.query[path] = drawn / math.sqrt(d_query)
  return found


def coefficients(
  basis: Basis,
  query: jax.Array,
  *,
  heads: int = 1,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
) -> dict[str, jax.Array]:
  """Computes the weights with which examples mix a basis, in every module.

      c = mean over heads of activation(q_h K_hᵀ / √(d_key / heads)),
      q = query W_q

  Args:
    basis: of any modules.
    query: (B, d_query), one for each example: an embedding of a prompt or of
      images, joined.
    heads: into which keys are cut; each has its own weights.
    activation: of scores (..., n), such as `jax.nn.softmax` or `jnp.tanh`.

  Returns:
    {path: (B, ..., n)} float32, where ... are the module's layers. A softmax
    sums to 1. Differentiable; a query of zeros gives equal weights.

  Raises:
    ValueError: queries of another size, or heads that do not divide d_key;
      names up to three modules.

  Example:
    >>> basis = Basis({}, {"w": jnp.array([[1.0, 0], [0, 1], [1, 1]])},
    ...               {"w": jnp.eye(2)})
    >>> c = coefficients(basis, jnp.array([[2.0, 0.0]]))["w"]
    >>> [round(float(weight), 4) for weight in c[0]]
    [0.4458, 0.1084, 0.4458]

  References:
    LoRWeB, arXiv 2602.15727.
  """
  wrong = [
    f"{path} {reads.shape}"
    for path, reads in basis.query.items()
    if query.ndim != 2 or query.shape[-1] != reads.shape[-2]
  ]
  if wrong:
    raise ValueError(
      f"Queries are {query.shape}; {len(wrong)} modules read others: "
      f"{name_some(wrong)}. Needed is (B, d_query) with all parts of a query; "
      "a part that is missing has no default."
    )
  return {
    path: _weights(keys, basis.query[path], query, heads, activation, path)
    for path, keys in basis.keys.items()
  }


def _weights(keys, reads, query, heads, activation, path):
  """Computes the weights (B, ..., n) of one module."""
  size = keys.shape[-1]
  if heads < 1 or size % heads:
    raise ValueError(f"{path}: {heads} heads do not divide keys of {size}.")
  times = lambda spec, *x: jnp.einsum(  # noqa: E731
    spec, *(y.astype(jnp.float32) for y in x), precision=lax.Precision.HIGHEST
  )
  cut = lambda x: x.reshape(*x.shape[:-1], heads, size // heads)  # noqa: E731
  asked = cut(times("bq,...qk->b...k", query, reads))
  scores = times("b...hk,...nhk->b...hn", asked, cut(keys))
  return activation(scores / math.sqrt(size // heads)).mean(axis=-2)


def _needs_query(params, x):
  """Raises ValueError: the gate of a program that is bound without a query."""
  del params, x
  raise ValueError(
    "A basis is mixed by an example's query, which nothing gives here: call "
    "the model through adapt_basis, or train with through=mixed."
  )


def adapt_basis(
  fn: Callable[..., Any],
  *,
  mix: Mix = coefficients,
  strict: bool = False,
  views: Iterable[ViewRule] | None = None,
) -> Callable[..., Any]:
  """Wraps a function so that every example mixes the basis in its own way.

      y_i = fn(params + scale Σ_n c_in a_nᵀ b_n, x_i)

  Args:
    fn: `(params, *batched) -> results`, each row of which is computed
      independently; rows are the first axis of all arguments and results.
    mix: (basis, query) -> {path: (B, ..., n)}; `coefficients`, or a partial of
      it with other heads or activation.
    strict: as for `adapt`.
    views: as for `bind`.

  Returns:
    `(params, basis, query, *batched) -> results`, query (B, d_query). The basis
    is read once for all rows: what differs is a gate on n r units. Pure;
    differentiable in all parts.

  Raises:
    ValueError: from the returned function, arguments without a row for each
      query; names up to three. As `coefficients`, `bind` and `adapt`.

  Example:
    >>> basis = init_basis({"w": jnp.ones((3, 2))}, n=4, rank=2, d_query=6)
    >>> run = adapt_basis(lambda params, x: x @ params["w"])
    >>> run({"w": jnp.ones((3, 2))}, basis, jnp.ones((5, 6)), jnp.ones((5, 3))
    ...     ).shape
    (5, 2)
  """
  adapted = adapt(fn, strict=strict)

  def run(params, basis, query, *batched):
    """Runs fn on a batch, each row with its own mix."""
    weights = mix(basis, query)
    _check_rows(batched, len(query))

    def row(weights, parts):
      """Runs fn on a batch of one row."""
      bound = bind(params, _programs(basis, weights), views=views)
      one = jax.tree.map(lambda x: x[None], parts)
      return jax.tree.map(lambda y: y[0], adapted(bound, *one))

    return jax.vmap(row)(weights, batched)

  return run


def _programs(basis: Basis, weights: Mapping[str, jax.Array]) -> dict:
  """Returns a basis as programs whose gates are given."""
  return {
    path: Gated(lora, weights[path], given)
    for path, lora in basis.loras.items()
  }


def _check_rows(batched: Any, count: int) -> None:
  """Raises ValueError unless all arguments have a row for each query."""
  wrong = [
    f"args{jax.tree_util.keystr(keys)} {jnp.shape(x)}"
    for keys, x in jax.tree_util.tree_leaves_with_path(batched)
    if jnp.shape(x)[:1] != (count,)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} arguments have no row for each of {count} queries: "
      f"{name_some(wrong)}."
    )


def fold(basis: Basis, query: jax.Array, *, mix: Mix = coefficients) -> Loras:
  """Writes one example's mix as an adapter of rank n r, to be kept or exported.

      a = (a_1, ..., a_n),   b = (c_1 scale_1 b_1, ..., c_n scale_n b_n)

  Args:
    basis: of any modules.
    query: (d_query,).
    mix: as for `adapt_basis`.

  Returns:
    Loras with a (..., n r, in), b (..., n r, out) in the basis' dtypes and
    scale 1.

  Raises:
    ValueError: as `coefficients`.

  Example:
    >>> basis = init_basis({"w": jnp.ones((3, 2))}, n=4, rank=2, d_query=6)
    >>> fold(basis, jnp.ones(6))["w"].rank
    8
  """
  if query.ndim != 1:
    raise ValueError(
      f"The query is {query.shape}; fold makes one example's adapter, from "
      "(d_query,)."
    )
  weights = mix(basis, query[None])
  return {
    path: _folded(lora, weights[path][0]) for path, lora in basis.loras.items()
  }


def _folded(lora: Lora, weights: jax.Array) -> Lora:
  """Concatenates the Loras of one module, b with its weights (..., n)."""
  each = jnp.moveaxis(lora.scale, 0, -1).astype(jnp.float32) * weights
  last = lambda x: jnp.moveaxis(x, 0, -3)  # noqa: E731
  b = last(lora.b).astype(jnp.float32) * each[..., None, None]
  joined = lambda x: x.reshape(*x.shape[:-3], -1, x.shape[-1])  # noqa: E731
  scale = jnp.ones(lora.a.shape[1:-2], jnp.float32)
  return Lora(joined(last(lora.a)), joined(b).astype(lora.b.dtype), scale)


def as_programs(basis: Basis) -> dict[str, Gated]:
  """Writes a basis as programs, for `train` with `through=mixed`.

  Args:
    basis: of any modules.

  Returns:
    {path: Gated}, whose bank, keys and query are trained. Bound without a
    query they are an error.

  Example:
    >>> basis = init_basis({"w": jnp.ones((3, 2))}, n=4, rank=2, d_query=6)
    >>> as_basis(as_programs(basis)).keys["w"].shape
    (4, 128)
  """
  return {
    path: Gated(
      lora,
      {"keys": basis.keys[path], "query": basis.query[path]},
      _needs_query,
    )
    for path, lora in basis.loras.items()
  }


def as_basis(programs: Mapping[str, Program]) -> Basis:
  """Undoes `as_programs`.

  Args:
    programs: path -> Gated, as `as_programs` or a trainer returns them.

  Returns:
    Basis.

  Raises:
    ValueError: other programs; names up to three.

  Example:
    >>> as_basis({})
    Basis(loras={}, keys={}, query={})
  """
  others = [
    path
    for path, program in programs.items()
    if not isinstance(program, Gated) or program.gate is not _needs_query
  ]
  if others:
    raise ValueError(
      f"{len(others)} programs are of no basis: {name_some(others)}; give what "
      "as_programs returned."
    )
  gated: Mapping[str, Any] = programs
  return Basis(
    {path: program.bank for path, program in gated.items()},
    {path: program.params["keys"] for path, program in gated.items()},
    {path: program.params["query"] for path, program in gated.items()},
  )


def mixed(
  loss: Callable[..., Any],
  params: Any,
  programs: Mapping[str, Program],
  batch: tuple[Any, ...],
  dropout: Any = None,
  *,
  mix: Mix = coefficients,
  views: Iterable[ViewRule] | None = None,
) -> Any:
  """Computes the mean of a loss over examples that each mix the basis.

      mean_i loss(params + scale Σ_n c_in a_nᵀ b_n, x_i)

  Args:
    loss: `(params, *batch) -> ()`, or with anything beside its value, a mean
      over examples; it is called with one at a time, under vmap.
    params: its parameters.
    programs: as from `as_programs`.
    batch: the queries (B, d_query), and the loss's other arguments.
    dropout: as for `bind`, each example with its own key.
    mix: as for `adapt_basis`.
    views: as for `bind`.

  Returns:
    What the loss returns, averaged over examples.

  Raises:
    ValueError: as `adapt_basis`.

  Example:
    >>> import optax
    >>> from jlora.training import train
    >>> basis = init_basis({"w": jnp.ones((3, 2))}, n=4, rank=2, d_query=6)
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> init, update = train(loss, optax.sgd(0.1), through=mixed)
    >>> programs, params = as_programs(basis), {"w": jnp.ones((3, 2))}
    >>> *_, value = update(programs, init(programs), params, jnp.ones((5, 6)),
    ...                    jnp.ones((5, 3)))
    >>> float(value)
    9.0
  """
  query, *batched = batch
  basis = as_basis(programs)
  _check_rows(batched, len(query))
  rate, key = dropout or (0.0, None)
  keys = None if key is None else jax.random.split(key, len(query))

  def row(weights, key, parts):
    """Computes the loss of one example."""
    drop = None if key is None else (rate, key)
    own = _programs(basis, weights)
    bound = bind(params, own, dropout=drop, views=views)
    return adapt(loss)(bound, *jax.tree.map(lambda x: x[None], parts))

  found = jax.vmap(row)(mix(basis, query), keys, batched)
  return jax.tree.map(lambda x: x.mean(axis=0), found)
