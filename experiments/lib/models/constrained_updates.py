# SPDX-License-Identifier: Apache-2.0
"""Updates of a base: free, of a low rank, or beside the spaces of adapters.

free            w_t = w_s + D
rank r          w_t = w_s + aᵀ b
spaces alone    w_t = w_s + (1 - P) D (1 - Q)

P and Q project on what the known adapters of a matrix read and write.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib.models.loops import compile_part
from experiments.lib.models.updated_strings import (
  OTHERS,
  TASKS,
  Size,
  make_model,
  merged,
  open_exam,
  start_loras,
  train_base,
  train_skill,
  update_batches,
)
from jlora.loras import Loras
from jlora.paths import flatten, unflatten

#: (seed, size, params) -> what is trained, and what is given to `fold` beside.
Start = Callable[[int, Size, Any], tuple[Any, tuple[Any, ...]]]


class Form(NamedTuple):
  """A form that an update is held to.

  Attributes:
    start: makes what is trained.
    fold: (trained, params, *beside) -> params after the update.
    speed: of the update's learning rate.
  """

  start: Start
  fold: Callable[..., Any]
  speed: float = 1.0


def _everything(seed: int, size: Size, params: Any):
  """Trains all parameters."""
  del seed, size
  return params, ()


def _low_rank(rank: int, seed: int, size: Size, params: Any):
  """Trains factors of a rank; units beyond it are zero and stay so."""
  most = min(16, size.width // 2)
  loras = start_loras(params, jax.random.key(seed + 500), most)
  kept = (jnp.arange(most) < rank).astype(jnp.float32)[:, None]
  factors = {path: (x.a * kept, x.b) for path, x in loras.items()}
  return factors, ()


def _dense(
  choose: Callable[..., tuple[Any, Any]], seed: int, size: Size, params: Any
):
  """Trains whole matrices of the layers, beside what is left alone."""
  adapters = [train_skill(name, seed, size) for name in TASKS]
  changes, reads, writes = {}, {}, {}
  rng = np.random.default_rng([seed, 7])
  for path, first in adapters[0].items():
    rows = [
      np.concatenate([np.asarray(getattr(x[path], side)) for x in adapters])
      for side in ("a", "b")
    ]
    shape = first.a.shape[-1], first.b.shape[-1]
    changes[path] = jnp.zeros(shape)
    reads[path], writes[path] = choose(*rows, rng)
  return changes, (reads, writes)


def spare(rows: np.ndarray) -> np.ndarray:
  """Returns the projector on what is orthogonal to rows.

  Args:
    rows: (r, n), r at most n.

  Returns:
    (n, n) float32.

  Example:
    >>> spare(np.float32([[3, 0]]))
    array([[0., 0.],
           [0., 1.]], dtype=float32)
  """
  basis = np.linalg.qr(np.asarray(rows, np.float64).T)[0]
  return (np.eye(rows.shape[1]) - basis @ basis.T).astype(np.float32)


def _whole(rows: np.ndarray) -> np.ndarray:
  """Returns the projector on everything."""
  return np.eye(rows.shape[1], dtype=np.float32)


def _random(a: np.ndarray, b: np.ndarray, rng: np.random.Generator):
  """Leaves random spaces alone that are as large as the adapters'."""
  one, other = (spare(rng.standard_normal(x.shape)) for x in (a, b))
  return one, other


def _fold_dense(changes, params, reads, writes):
  """Adds (1 - P) D (1 - Q) to every matrix."""
  return _added(
    params,
    {path: reads[path] @ x @ writes[path] for path, x in changes.items()},
  )


def _fold_low(factors, params):
  """Adds aᵀ b to every matrix."""
  return _added(params, {path: a.T @ b for path, (a, b) in factors.items()})


def _fold_all(trained, params):
  """Returns what was trained."""
  del params
  return trained


def _added(params: Any, changes: Mapping[str, jax.Array]) -> Any:
  """Adds changes to the parameters at their paths."""
  leaves = flatten(params)
  leaves = {
    path: x + changes[path] if path in changes else x
    for path, x in leaves.items()
  }
  return unflatten(leaves, params)


def _beside(choose: Callable[..., tuple[Any, Any]]) -> Form:
  """Makes the form that trains whole matrices beside some spaces."""
  return Form(functools.partial(_dense, choose), _fold_dense)


FREE = "all matrices of the layers"
#: Every form.
FORMS = {
  "all parameters": Form(_everything, _fold_all),
  FREE: _beside(lambda a, b, _: (_whole(a), _whole(b))),
  "a third of the rate": _beside(
    lambda a, b, _: (_whole(a), _whole(b))
  )._replace(speed=1 / 3),
  "rank 1": Form(functools.partial(_low_rank, 1), _fold_low, 3.0),
  "rank 4": Form(functools.partial(_low_rank, 4), _fold_low, 3.0),
  "rank 16": Form(functools.partial(_low_rank, 16), _fold_low, 3.0),
  "reads left alone": _beside(lambda a, b, _: (spare(a), _whole(b))),
  "writes left alone": _beside(lambda a, b, _: (_whole(a), spare(b))),
  "both left alone": _beside(lambda a, b, _: (spare(a), spare(b))),
  "random spaces left alone": _beside(_random),
}


def snapshots(
  name: str, seed: int, size: Size, marks: Sequence[int]
) -> Iterator[tuple[int, Any]]:
  """Updates the base of a seed in one form.

  Args:
    name: of FORMS.
    seed: of the base and of the batches, which all forms share.
    size: how much is computed.
    marks: steps, rising.

  Yields:
    Steps taken, and the parameters after them.
  """
  form, params = FORMS[name], train_base(seed, size)
  trained, beside = form.start(seed, size, params)
  init, part = _run_of(form.fold, form.speed, size)
  state, frozen = init(trained), (params, *beside)
  batches = update_batches(seed, size)
  step = int(np.gcd.reduce((*size.marks, *size.looks)))
  for at in range(0, marks[-1], step):
    some = tuple(x[at : at + step] for x in batches)
    trained, state, _ = part(trained, state, (frozen,), some)
    if at + step in marks:
      yield at + step, _folded(form.fold)(trained, *frozen)


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Measures an update of a form at all its marks.

  Args:
    name: of FORMS.
    seed: of the base.
    size: how much is computed.

  Returns:
    "points", with (right, nats) of each text: steps; "update", the new
    operations; "known" to the base before; each skill, known to the form or
    not, with its adapter added as it is; and "drift". The first point is
    the base before.
  """
  exam, params = open_exam(seed, size), train_base(seed, size)
  skills = {x: train_skill(x, seed, size) for x in (*TASKS, *OTHERS)}

  def look(steps, there):
    """Examines all texts."""
    found = {x: exam.examined(there, x) for x in ("update", "known")}
    for task, loras in skills.items():
      found[task] = exam.examined(merged(there, loras), task)
    drift = _drift(params, there, skills[TASKS[0]])
    return {"steps": steps, "drift": drift, **found}

  points = [look(0, params)]
  points += [look(*found) for found in snapshots(name, seed, size, size.looks)]
  return {"points": points}


def _drift(params: Any, there: Any, loras: Loras) -> float:
  """Returns the mean |w_t - w_s| / |w_s| of an adapter's matrices."""
  before, after = flatten(params), flatten(there)
  return float(
    np.mean(
      [
        np.linalg.norm(after[path] - before[path])
        / np.linalg.norm(before[path])
        for path in loras
      ]
    )
  )


@functools.cache
def all_snapshots(seed: int, size: Size) -> dict[int, Any]:
  """Returns {steps: params} of the update that trains all parameters."""
  return dict(snapshots("all parameters", seed, size, size.marks))


@functools.cache
def _run_of(fold: Callable[..., Any], speed: float, size: Size):
  """Compiles a part of an update, once for all forms of one kind."""
  loss, optimiser = make_model(size).loss, optax.adam(speed * size.drift)

  def update(trained, state, frozen, *batch):
    """Takes one step."""
    value, gradient = jax.value_and_grad(
      lambda trained: loss(fold(trained, *frozen), *batch)
    )(trained)
    change, state = optimiser.update(gradient, state, trained)
    return optax.apply_updates(trained, change), state, value

  return optimiser.init, compile_part(update)


_folded = functools.cache(jax.jit)
