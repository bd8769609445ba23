# SPDX-License-Identifier: Apache-2.0
"""One foreign model through jlora, and how far each result is from its control.

| column   | what                                  | control              |
|----------|---------------------------------------|----------------------|
| full     | extract at full rank, then apply      | the finetune         |
| rank 4   | error of extract at rank 4            | NumPy's SVD          |
| value    | adapted model                         | merged weights       |
| gradient | of every factor and parameter         | merged weights       |
| bfloat16 | error of value and gradients          | that of merged       |
| rows     | each row of a batch its own adapter   | rows one by one      |
| training | five steps beside the weights         | five steps, merged   |
"""

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora.adapting import (
  adapt,
  adapt_rows,
  apply,
  bind,
  make_bank,
  views_from,
)
from jlora.loras import Lora, dense
from jlora.paths import flatten, unflatten
from jlora.training import beside, summed, train
from jlora.views import as_matrix, view_of
from tests.foreign.models import Model

RANK, STEPS = 4, 5
# |got - control| / |control|, but for bfloat16: |got - float32| over the same
# of merged weights, and for rank 4: error over the least possible.
LIMITS: dict[str, float] = {
  "full": 1e-5,
  "rank 4": 1.0001,
  "value": 1e-5,
  "gradient": 1e-4,
  "bfloat16": 2.0,
  "rows": 1e-5,
  "training": 1e-3,
}


def examine(model: Model) -> dict[str, Any]:
  """Everything that is known of a model, one value for each column.

  Args:
    model: in float32.

  Returns:
    The columns, and `matrices` (how many), `left` (parameters of two axes or
    more that are no matrices), `dense` (operations that formed a dense sum) and
    `said` (warnings of `views_from`).
  """
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    views = views_from(model.fn, model.params, model.inputs)
  said = [str(w.message) for w in caught]
  flat = flatten(model.params)
  matrices = {
    path: view
    for path, leaf in flat.items()
    if (view := view_of(path, leaf.shape, views)) is not None
  }
  wide = [path for path, leaf in flat.items() if leaf.ndim > 1]
  finetuned = changed(model.params, matrices, 1)
  adapters = [
    jlora.extract(
      model.params, changed(model.params, matrices, seed), rank=RANK,
      views=views,
    )
    for seed in (1, 2)
  ]  # fmt: skip
  row = {
    "matrices": len(matrices),
    "left": [path for path in wide if path not in matrices],
    "said": said,
    "full": at_full_rank(model.params, finetuned, views),
    "rank 4": over_least(flat, flatten(finetuned), matrices, adapters[0]),
  }
  row |= beside_merged(model, adapters[0], views)
  if model.is_of_any_dtype:
    row["bfloat16"] = in_half(model, adapters[0], views)
  row["rows"] = by_rows(model, adapters, views)
  row["training"] = by_training(model, adapters[0], views)
  return row


def faults(row: Mapping[str, Any]) -> list[str]:
  """What of a row breaks the promise."""
  found = [
    f"{name}: {row[name]:.2g} over {limit:.2g}"
    for name, limit in LIMITS.items()
    if name in row and not row[name] <= limit
  ]
  return found + [f"dense sum: {text}" for text in row["dense"]]


def changed(params: Any, matrices: Mapping[str, Any], seed: int) -> Any:
  """The parameters with noise on every matrix."""
  draw = np.random.default_rng(seed)
  flat = flatten(params)
  new = {
    path: leaf + 0.1 * jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype)
    for path, leaf in flat.items()
    if path in matrices
  }
  return unflatten({**flat, **new}, params)


def at_full_rank(base: Any, finetuned: Any, views: Any) -> float:
  """The worst leaf of a finetune that was taken apart and put together."""
  loras = jlora.extract(base, finetuned, rank=10**6, views=views)
  back = flatten(apply(base, loras, views=views))
  old, want = flatten(base), flatten(finetuned)
  return max(
    _ratio(back[path] - want[path], want[path] - old[path]) for path in loras
  )


def over_least(base, finetuned, matrices, loras: Mapping[str, Lora]) -> float:
  """The worst error over that of NumPy's SVD at the same rank."""
  worst = 1.0
  for path, view in matrices.items():
    change = np.float64(finetuned[path]) - np.float64(base[path])
    change = np.asarray(as_matrix(change, view))
    rest = change - np.float64(dense(loras[path]))
    values = np.linalg.svd(change, compute_uv=False)[..., RANK:]
    least = np.sqrt(np.square(values).sum())
    error = np.linalg.norm(rest)
    whole = np.linalg.norm(change)
    if error > 1e-6 * whole:
      worst = max(worst, float(error / max(least, 1e-6 * whole)))
  return worst


def _losses(model: Model, views: Any) -> Iterator[Any]:
  """`(params, loras) -> ()` with loras beside the weights, and merged."""
  shape = jax.eval_shape(model.fn, model.params, model.inputs).shape
  weight = jax.random.normal(jax.random.key(3), shape)

  def loss(outputs):
    return jnp.sum(outputs.astype(jnp.float32) * weight)

  for through in (_adapted, _merged):

    def run(params, loras, through=through):
      outputs = through(model.fn, params, loras, model.inputs, views)
      return loss(outputs), outputs

    yield run


def _adapted(fn, params, loras, inputs, views):
  return adapt(fn)(bind(params, loras, views=views), inputs)


def _merged(fn, params, loras, inputs, views):
  return fn(apply(params, loras, views=views), inputs)


def _gradients(loss, params, loras):
  """Outputs and all gradients, compiled."""
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, outputs), (of_params, of_loras) = step(params, loras)
  found = flatten(of_params) | {
    f"{path} {name}": getattr(lora, name)
    for path, lora in of_loras.items()
    for name in ("a", "b", "scale")
  }
  return outputs, found


def beside_merged(model: Model, loras, views) -> dict[str, Any]:
  """Value and gradients, and the dense sums that were formed."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    (got, mine), (want, control) = (
      _gradients(loss, model.params, loras) for loss in _losses(model, views)
    )
  said = [str(w.message) for w in caught if "dense sum" in str(w.message)]
  return {
    "value": _ratio(got - want, want),
    "gradient": _worst(mine, control),
    "dense": list(dict.fromkeys(said)),
  }


def in_half(model: Model, loras, views) -> float:
  """Errors in bfloat16 over those of merged weights in bfloat16."""
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  inputs = model.inputs
  if jnp.issubdtype(inputs.dtype, jnp.floating):
    inputs = inputs.astype(jnp.bfloat16)
  half = model._replace(params=low, inputs=inputs)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    beside_, merged = (_gradients(f, low, loras) for f in _losses(half, views))
    *_, last = _losses(model, views)
    want = _gradients(last, exact, loras)
  ratios = []
  for mine, control, truth in zip(
    map(_flat, beside_), map(_flat, merged), map(_flat, want), strict=True
  ):
    own = float(np.linalg.norm(control - truth))
    floor = 2.0**-8 * float(np.linalg.norm(truth))  # bfloat16's own step
    ratios.append(float(np.linalg.norm(mine - truth)) / max(own, floor))
  return max(ratios)


def by_rows(model: Model, adapters, views) -> float:
  """Rows of a batch with adapters of their own, against one by one."""
  ids = [0, 1, -1, 0]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    run = jax.jit(adapt_rows(model.fn, views=views))
    got = run(model.params, make_bank(adapters), jnp.array(ids), model.inputs)
  one = jax.jit(model.fn)
  want = jnp.concatenate(
    [
      one(
        apply(model.params, adapters[i], views=views)
        if i >= 0
        else model.params,
        model.inputs[at : at + 1],
      )
      for at, i in enumerate(ids)
    ]
  )
  return _ratio(got - want, want)


def by_training(model: Model, loras, views) -> float:
  """How far factors are apart after some steps, by how far they moved."""
  goal = jax.eval_shape(model.fn, model.params, model.inputs)
  goal = jax.random.normal(jax.random.key(4), goal.shape)

  def loss(params, inputs):
    return jnp.mean(jnp.square(model.fn(params, inputs) - goal))

  ends = []
  for through in (beside, summed):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      init, update = train(
        loss, optax.sgd(0.05), through=functools.partial(through, views=views)
      )
      step, programs, state = jax.jit(update), loras, init(loras)
      for _ in range(STEPS):
        programs, state, _ = step(programs, state, model.params, model.inputs)
    ends.append(_flat(programs))
  return _ratio(ends[0] - ends[1], ends[1] - _flat(loras))


def _flat(tree: Any) -> np.ndarray:
  """All numbers of a tree as one float64 vector."""
  return np.concatenate(
    [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
  )


def _worst(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
  """The worst ratio of gradients; tiny ones count by the largest."""
  norms = {path: float(jnp.linalg.norm(want[path].ravel())) for path in want}
  floor = 1e-3 * max(norms.values())
  return max(
    float(jnp.linalg.norm((got[path] - want[path]).ravel()))
    / max(norms[path], floor)
    for path in want
  )


def _ratio(error: Any, scale: Any) -> float:
  """|error| / |scale|."""
  off, whole = (float(np.linalg.norm(np.float64(x))) for x in (error, scale))
  return off / whole if whole else float(off > 0)
