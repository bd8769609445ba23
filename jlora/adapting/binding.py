# SPDX-License-Identifier: Apache-2.0
"""Puts programs on the parameters that they belong to."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapting.adapted import Adapted, Change, change_of, is_adapted
from jlora.adapting.banks import as_ids
from jlora.adapting.gates import check_leads, gated_change
from jlora.adapting.programs import Branch, Gated, Rows, Shift
from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.paths import flatten, key_for, unflatten
from jlora.selection import is_floating
from jlora.tree_views import table_for
from jlora.views import MatrixView, ViewRule, views_of

# Traced once for all parameters of one shape.
_laid = jax.jit(change_of, static_argnums=(1, 2))

Program = Lora | Rows | Shift | Branch | Gated
Programs = Mapping[str, Program]


class BoundPrograms(NamedTuple):
  """A model's parameters, and the programs that `attach` found for them.

  Attributes:
    flat: path -> leaf, of all parameters.
    programs: path -> its programs, each with its weight.
    views: path -> MatrixView, of the parameters with a Lora or a Gated.
  """

  flat: dict[str, Any]
  programs: dict[str, list[tuple[Program, Any]]]
  views: dict[str, MatrixView]


def bind(
  params: Any,
  programs: Programs | Sequence[Programs],
  weights: Any = None,
  *,
  ids: Any = None,
  batch: int = 1,
  dropout: tuple[float, jax.Array] | None = None,
  views: Iterable[ViewRule] | None = None,
) -> Any:
  """Puts programs on parameters, for a function wrapped by `adapt`.

      w  →  Adapted: w, Σ_i weight_i scale_i a_iᵀ b_i, branches, rows, gates

  Args:
    params: a pytree of arrays, or one returned by `bind`.
    programs: path -> Lora, Rows, Shift, Branch or Gated, with paths as
      `flatten` returns them; or several such mappings, whose programs on one
      parameter add up.
    weights: one number per mapping; None is 1 for each. With `ids`, (s,).
    ids: None; or, with one bank of Loras from `make_bank`, a scalar or (s,)
      integers: the bank's adapters that are added, -1 for none. `adapt_rows`
      gives every row of a batch its own ids.
    batch: under vmap over ids, the number of rows that choose at once; affects
      the way of computing, not the result.
    dropout: (rate, key) of dropout on the input of the Loras, x / (1 - rate) or
      0, for training; each parameter gets its own key. Gates read all of it.
    views: rules for reading a parameter as a matrix; by default those for the
      names found.

  Returns:
    The pytree, in which a parameter with a program is an Adapted. A Shift alone
    is added right away; nothing else is summed. Pure. The factors of several
    adapters are concatenated.

  Raises:
    ValueError: a path without a parameter, a program that does not fit its
      parameter or would fit it in several ways, a gate's parameters without the
      axes of layers, or not one weight per mapping; names up to three.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> bind({"w": jnp.zeros((3, 2))}, {"w": lora})["w"].changes[0].gate.shape
    (1, 1, 1)
  """
  is_bank = ids is not None
  if is_bank and not isinstance(programs, Mapping):
    raise ValueError(
      f"ids choose from one bank, got {len(programs)} sets of programs; make "
      "one of them with make_bank."
    )
  flat, found, how = attach(
    params, programs, None if is_bank else weights, views, is_bank=is_bank
  )
  for path, own in found.items():
    leaf = flat[path]
    value = leaf if is_adapted(leaf) else Adapted(leaf, path=path)
    for program, weight in own:
      if type(program) in _ADD:
        value = _ADD[type(program)](value, program, weight)
    changes = [
      gated_change(program, how[path], value.shape, weight)
      for program, weight in own
      if isinstance(program, Gated)
    ]
    loras = [(p, weight) for p, weight in own if isinstance(p, Lora)]
    if loras:
      change = _change(loras, how[path], value.shape, ids, weights)
      changes.append(dataclasses.replace(change, batch=batch))
    if dropout is not None:
      changes = [_with_dropout(change, path, *dropout) for change in changes]
    value = dataclasses.replace(value, changes=(*value.changes, *changes))
    is_bare = not (value.changes or value.branches) and value.rows is None
    flat[path] = value.w if is_bare else value
  return unflatten(flat, params, is_adapted)


def attach(
  params: Any,
  programs: Programs | Sequence[Programs],
  weights: Any = None,
  views: Iterable[ViewRule] | None = None,
  *,
  is_bank: bool = False,
) -> BoundPrograms:
  """Finds the parameter of every program, and checks that they fit.

  Args:
    params: as for `bind`.
    programs: as for `bind`.
    weights: one for each of several sets of programs.
    views: as for `bind`.
    is_bank: the first axis of every Lora counts adapters.

  Raises:
    ValueError: as `bind`.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> list(attach({"w": jnp.zeros((3, 2))}, {"w": lora}).programs)
    ['w']
  """
  sets = [programs] if isinstance(programs, Mapping) else list(programs)
  each = [1.0] * len(sets) if weights is None else list(weights)
  if len(each) != len(sets):
    raise ValueError(
      f"{len(each)} weights for {len(sets)} adapters; give one for each."
    )
  flat = flatten(params, is_adapted)
  found: dict[str, list[tuple[Program, Any]]] = {}
  for own, weight in zip(sets, each, strict=True):
    check_loras({p: x for p, x in own.items() if isinstance(x, Lora)})
    check_loras({p: x.bank for p, x in own.items() if isinstance(x, Gated)})
    for path, program in own.items():
      found.setdefault(path, []).append((program, weight))
  missing = sorted(set(found) - set(flat))
  if missing:
    raise ValueError(
      f"{len(missing)} programs have no parameter: {name_some(missing)}; "
      f"there are {name_some(flat)}."
    )
  table = table_for(flat, tree=params) if views is None else tuple(views)
  given = {p: _matrix_of(own, is_bank) for p, own in found.items()}
  known = {path: matrix for path, matrix in given.items() if matrix}
  how = {
    **dict.fromkeys(found),
    **views_of({path: flat[path].shape for path in known}, table, known),
  }
  wrong = [
    f"{path} {flat[path].dtype} {flat[path].shape} for {_said(program)}"
    for path, own in found.items()
    for program, _ in own
    if not _fits(program, flat[path], how[path], is_bank)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} programs do not fit: {name_some(wrong)}. A Lora needs a "
      "floating matrix (..., in, out) for its a (..., r, in), b (..., r, out); "
      "Rows a table of as many columns; a Shift the same shape; a Branch a "
      "matrix; a Gated, to which no ids are given, a matrix as a Lora, for its "
      "a (n, ..., r, in), b (n, ..., r, out)."
    )
  check_leads(
    {
      path: (program, how[path].shape(flat[path].shape)[:-2])
      for path, own in found.items()
      for program, _ in own
      if isinstance(program, Gated)
    }
  )
  seen = {path: view for path, view in how.items() if view is not None}
  return BoundPrograms(flat, found, seen)


def _matrix_of(
  programs: Iterable[tuple[Program, Any]], is_bank: bool
) -> tuple[int, ...] | None:
  """Returns the (..., in, out) that a parameter's first Lora is for."""
  for program, _ in programs:
    lora, lead = _lora_of(program, is_bank)
    if lora is not None:
      return (*lora.a.shape[lead:-2], lora.a.shape[-1], lora.b.shape[-1])
  return None


def _lora_of(program: Program, is_bank: bool) -> tuple[Lora | None, int]:
  """Returns a program's Lora, if it has one, and its number of bank axes."""
  if isinstance(program, Gated):
    return program.bank, 1
  return (program if isinstance(program, Lora) else None), int(is_bank)


def _said(program: Program) -> str:
  """Formats a program and its shapes, for an error."""
  if isinstance(program, Lora):
    return f"a {program.a.shape}, b {program.b.shape}"
  shapes = [jnp.shape(x) for x in jax.tree.leaves(program)]
  return f"{type(program).__name__} {name_some(shapes)}"


def _fits(program, leaf, view, is_bank) -> bool:
  """Returns whether a program fits a parameter."""
  if not is_floating(leaf.dtype):
    return False
  if is_bank and not isinstance(program, Lora):
    return False
  lora, lead = _lora_of(program, is_bank)
  if lora is not None:
    given = (*lora.a.shape[lead:-2], lora.a.shape[-1], lora.b.shape[-1])
    has_lead = lora.a.ndim >= 2 + lead
    return view is not None and has_lead and view.shape(leaf.shape) == given
  if isinstance(program, Shift):
    return program.delta.shape == leaf.shape and not is_adapted(leaf)
  if isinstance(program, Rows):
    rows = program.rows
    return len(leaf.shape) == rows.ndim == 2 and rows.shape[1] == leaf.shape[1]
  return isinstance(program, Branch) and len(leaf.shape) >= 2


def _change(loras, view, shape, ids, weights) -> Change:
  """Makes one Change of several Loras, or of a bank and ids."""
  if ids is not None:
    bank = loras[0][0]
    change = jax.vmap(lambda lora: change_of(lora, view, shape))(bank)
    chosen = jnp.atleast_1d(as_ids(ids, len(bank.a)))
    if weights is not None:
      weights = jnp.atleast_1d(jnp.asarray(weights, jnp.float32))
      weights = jnp.broadcast_to(weights, chosen.shape)
    return dataclasses.replace(change, ids=chosen, weights=weights)
  changes = [
    _laid(lora, view, shape)
    if isinstance(weight, float) and weight == 1
    else _laid(lora, view, shape, weight)
    for lora, weight in loras
  ]
  if len(changes) == 1:
    return changes[0]
  dtype = jnp.result_type(*(x for c in changes for x in (c.a, c.b)))
  return Change(
    jnp.concatenate([c.a.astype(dtype) for c in changes]),
    jnp.concatenate([c.b.astype(dtype) for c in changes]),
    jnp.concatenate([c.gate for c in changes]),
  )


def _with_dropout(change: Change, path: str, rate, key) -> Change:
  """Gives a change the dropout of its parameter."""
  return dataclasses.replace(change, rate=rate, key=key_for(key, path))


def _add_rows(value: Adapted, program: Rows, weight) -> Adapted:
  """Appends further rows to an Adapted."""
  rows = program.rows * jnp.asarray(weight, program.rows.dtype)
  if value.rows is not None:
    rows = jnp.concatenate([value.rows, rows.astype(value.rows.dtype)])
  return dataclasses.replace(value, rows=rows)


def _add_shift(value: Adapted, program: Shift, weight) -> Adapted:
  """Adds a Shift to an Adapted's parameter."""
  return dataclasses.replace(value, w=shifted(value.w, program, weight))


def _add_branch(value: Adapted, program: Branch, weight) -> Adapted:
  """Appends a branch to an Adapted."""
  own = dataclasses.replace(program, weight=program.weight * weight)
  return dataclasses.replace(value, branches=(*value.branches, own))


def shifted(leaf: jax.Array, program: Shift, weight: Any = 1.0) -> jax.Array:
  """Adds a Shift to a parameter in float32; rounds once to its dtype.

  Example:
    >>> shifted(jnp.ones(2), Shift(jnp.ones(2)), 0.5)
    Array([1.5, 1.5], dtype=float32)
  """
  delta = program.delta.astype(jnp.float32) * jnp.asarray(weight, jnp.float32)
  return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)


_ADD = {Rows: _add_rows, Shift: _add_shift, Branch: _add_branch}
