# SPDX-License-Identifier: Apache-2.0
"""Runs a traced JAX program whose arrays may be Adapted.

Operations without an Adapted operand run as they are. Those with one run by the
rules. Control flow is rebuilt, with its bodies run in the same way.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.adapting.adapted import Adapted, Change, dense_sum, is_adapted
from jlora.adapting.axis_rules import AXIS_RULES, OF_W_ALONE, SEEN_THROUGH
from jlora.adapting.lookup_rules import LOOKUP_RULES
from jlora.adapting.product_rules import CONVOLUTION_RULES, PRODUCT_RULES

Said = Callable[[str, Adapted], None]

_RULES = {
  **AXIS_RULES,
  **PRODUCT_RULES,
  **CONVOLUTION_RULES,
  **LOOKUP_RULES,
}
_WITH_BRANCHES = (*SEEN_THROUGH, "dot_general")


def evaluate(
  jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], said: Said
) -> list[Any]:
  """Runs a jaxpr on arrays and Adapted values.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr`.
    consts: its constants.
    args: its arguments; an Adapted stands for an array of its shape and dtype.
    said: called with the name of a primitive and an Adapted operand when a rule
      is missing, before the dense sum is formed; may raise.

  Returns:
    A list of outputs, of which some may be Adapted.

  Example:
    >>> closed = jax.make_jaxpr(jnp.transpose)(jnp.ones((2, 3)))
    >>> evaluate(closed.jaxpr, closed.consts, [Adapted(jnp.ones((2, 3)))],
    ...          print)[0].shape
    (3, 2)
  """
  env: dict[Any, Any] = {}

  def read(atom):
    """Returns the value of a literal or variable."""
    return atom.val if isinstance(atom, jex.Literal) else env[atom]

  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    if any(map(is_adapted, operands)):
      results = _adapted(eqn, operands, said)
    else:
      results = _bind(eqn, operands)
    env.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _adapted(eqn, operands, said) -> Sequence[Any]:
  """Runs an equation with Adapted operands, by a rule if there is one."""
  name = eqn.primitive.name
  if name in _CONTROL:
    return _CONTROL[name](eqn, operands, said)
  if name in OF_W_ALONE:
    value = operands[0]
    return [dataclasses.replace(value, w=_bind(eqn, [value.w])[0])]
  rule = _RULES.get(name)
  has_branch = any(is_adapted(x) and x.branches for x in operands)
  if rule is not None and (not has_branch or name in _WITH_BRANCHES):
    found = rule(operands, eqn.params)
    if found is not None:
      return found if eqn.primitive.multiple_results else [found]
  return _bind(eqn, _densely(name, operands, said))


def _densely(name, operands, said):
  """Replaces Adapted operands by their dense sums, reporting each."""
  dense = []
  for x in operands:
    if is_adapted(x):
      said(name, x)
      x = dense_sum(x)
    dense.append(x)
  return dense


def _bind(eqn, operands) -> Sequence[Any]:
  """Runs one equation on arrays, through JAX's public interface."""
  variables, given = [], []
  for atom, value in zip(eqn.invars, operands, strict=True):
    if not isinstance(atom, jex.Literal) and atom not in variables:
      variables.append(atom)
      given.append(value)
  used = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
  names = ("",) * len(variables), ("",) * len(used)
  about = jex.DebugInfo("adapt", eqn.primitive.name, *names)
  one = jex.Jaxpr([], variables, used, [eqn], eqn.effects, about)
  found = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(one, []))(*given))
  return [
    None if isinstance(v, jex.DropVar) else next(found) for v in eqn.outvars
  ]


def _inline(eqn, operands, said):
  """Runs a nested jit or call in place."""
  inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
  found = evaluate(inner.jaxpr, inner.consts, operands, said)
  places = eqn.params.get("out_shardings", (None,) * len(found))
  return [
    lax.with_sharding_constraint(x, place)
    if isinstance(place, NamedSharding) and not is_adapted(x)
    else x
    for x, place in zip(found, places, strict=True)
  ]


def _remat(eqn, operands, said):
  """Rebuilds a `jax.checkpoint`."""
  params = eqn.params

  @functools.partial(
    jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"]
  )
  def run(*args):
    """Runs the checkpointed program."""
    return evaluate(params["jaxpr"], (), args, said)

  return run(*operands)


def _scan(eqn, operands, said):
  """Rebuilds a `lax.scan`."""
  params = eqn.params
  closed, (count, carried) = params["jaxpr"], _counts_of_scan(params)
  consts, carry = operands[:count], operands[count:carried]
  carry = _densely("the carry of scan", carry, said)
  stacked = [
    _slices_first(x, params["length"]) if is_adapted(x) else x
    for x in operands[carried:]
  ]

  def body(carry, parts):
    """Runs one step of the scan."""
    given = [*consts, *carry, *parts]
    found = evaluate(closed.jaxpr, closed.consts, given, said)
    found = _densely("the result of scan", found, said)
    return found[: len(carry)], found[len(carry) :]

  carry, stacks = lax.scan(
    body,
    carry,
    stacked,
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry, *stacks]


def _counts_of_scan(params) -> tuple[int, int]:
  """Returns how many operands are constants, and constants or carry."""
  if "ft_in" in params:  # JAX from 0.11 on has a tree of (consts, carry, xs)
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts.vals), len(consts.vals) + len(carry.vals)
  return params["num_consts"], params["num_consts"] + params["num_carry"]


def _slices_first(value: Adapted, length: int) -> Adapted:
  """Moves an Adapted's rank and bank axes behind its scanned axis."""
  if value.branches:
    raise ValueError(
      f"{value.path} is scanned over and has a branch; a branch needs a layer "
      "of its own."
    )

  def first(lead, x):
    """Moves an array's scanned axis first."""
    wide = [*x.shape]
    wide[lead] = length
    return jnp.moveaxis(jnp.broadcast_to(x, wide), lead, 0)

  def lay(change: Change) -> Change:
    """Moves a change's scanned axis first."""
    own = {
      name: first(change.lead, getattr(change, name))
      for name in ("a", "b", "gate")
    }
    for name in ("ids", "weights"):
      each = getattr(change, name)
      if each is not None:
        own[name] = jnp.broadcast_to(each, (length, *each.shape))
    if change.key is not None:
      own["key"] = jax.random.split(change.key, length)
    return dataclasses.replace(change, **own)

  return dataclasses.replace(
    value, changes=tuple(map(lay, value.changes)), rows=None
  )


def _while(eqn, operands, said):
  """Rebuilds a `lax.while_loop`."""
  params = eqn.params
  split = params["cond_nconsts"]
  start = split + params["body_nconsts"]
  for_test, for_body = operands[:split], operands[split:start]
  test, body = params["cond_jaxpr"], params["body_jaxpr"]

  def go_on(carry):
    """Runs the loop's condition."""
    given = [*for_test, *carry]
    return evaluate(test.jaxpr, test.consts, given, said)[0]

  def step(carry):
    """Runs the loop's body once."""
    found = evaluate(body.jaxpr, body.consts, [*for_body, *carry], said)
    return _densely("the carry of while", found, said)

  carry = _densely("the carry of while", operands[start:], said)
  return lax.while_loop(go_on, step, carry)


def _cond(eqn, operands, said):
  """Rebuilds a `lax.cond` or `lax.switch`."""
  index, *given = operands

  def branch(closed, *args):
    """Runs one branch."""
    found = evaluate(closed.jaxpr, closed.consts, args, said)
    return _densely("the result of cond", found, said)

  branches = eqn.params["branches"]
  run = [functools.partial(branch, closed) for closed in branches]
  return lax.switch(index, run, *given)


def _shard_map(eqn, operands, said):
  """Rebuilds a `jax.shard_map`."""
  params = eqn.params

  def run(*args):
    """Runs the program on one shard."""
    found = evaluate(params["jaxpr"], (), args, said)
    return tuple(_densely("the result of shard_map", found, said))

  specs = tuple(
    _spec(x, spec) if is_adapted(x) else spec
    for x, spec in zip(operands, params["in_specs"], strict=True)
  )
  mapped = jax.shard_map(
    run,
    mesh=params["mesh"],
    in_specs=specs,
    out_specs=tuple(params["out_specs"]),
    axis_names=set(params["newly_manual_axes"]),
    check_vma=params["check_vma"],
  )
  return mapped(*operands)


def _spec(value: Adapted, spec: P) -> Adapted:
  """Returns the PartitionSpecs of an Adapted's parts, given the parameter's."""
  if value.branches:
    raise ValueError(
      f"{value.path} goes into shard_map and has a branch, of which nothing "
      "says where it lies."
    )
  axes = [*spec, *[None] * (value.ndim - len(spec))]

  def own(lead, x):
    """Returns the spec of a factor, unsharded where it does not vary."""
    sizes = zip(axes, x.shape[lead:], strict=True)
    return P(*[None] * lead, *(a if n > 1 else None for a, n in sizes))

  def lay(change: Change) -> Change:
    """Returns the specs of a change."""
    lead = change.lead
    return dataclasses.replace(
      change,
      a=own(lead, change.a),
      b=own(lead, change.b),
      gate=own(lead, change.gate),
      **{
        name: None if getattr(change, name) is None else P()
        for name in ("ids", "weights", "key")
      },
    )

  rows = None if value.rows is None else P()
  return dataclasses.replace(
    value, w=P(*axes), changes=tuple(map(lay, value.changes)), rows=rows
  )


# Control flow primitives by name, in older and newer versions of JAX.
_CONTROL = {
  "jit": _inline,
  "pjit": _inline,
  "closed_call": _inline,
  "core_call": _inline,
  "remat2": _remat,
  "checkpoint": _remat,
  "scan": _scan,
  "while": _while,
  "cond": _cond,
  "shard_map": _shard_map,
}
