# SPDX-License-Identifier: Apache-2.0
"""Runs a traced JAX program whose arrays may be Adapted.

Operations without an Adapted operand run as they are. Those with one run by the
rules. Control flow is rebuilt, with its bodies run in the same way.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.adapting.adapted import (
  Adapted,
  Change,
  dense_sum,
  is_adapted,
  is_gated,
  is_matrix,
)
from jlora.adapting.axis_rules import (
  AXIS_RULES,
  OF_W_ALONE,
  SEEN_BY_GATES,
  SEEN_THROUGH,
)
from jlora.adapting.gates import read_gates
from jlora.adapting.lookup_rules import LOOKUP_RULES, takes_rows
from jlora.adapting.notes import Said
from jlora.adapting.product_rules import PRODUCT_RULES
from jlora.adapting.roles import Roles, counts_of_scan

_RULES = {**AXIS_RULES, **PRODUCT_RULES, **LOOKUP_RULES}
_WITH_BRANCHES = (*SEEN_THROUGH, "dot_general")
_WITH_GATES = (*SEEN_BY_GATES, "dot_general")
# Entry by entry, or side by side, with an activation: an activation again.
_JOINS = frozenset({
  "add", "add_any", "concatenate", "div", "max", "min", "mul", "pow",
  "select_n", "stack", "sub",
})  # fmt: skip


def evaluate(
  jaxpr: Any,
  consts: Sequence[Any],
  args: Sequence[Any],
  said: Said,
  roles: Roles | None = None,
) -> list[Any]:
  """Runs a jaxpr on arrays and Adapted values.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr`.
    consts: its constants.
    args: its arguments; an Adapted stands for an array of its shape and dtype.
    said: who is told of missing rules and of the notes of gates.
    roles: which of its values are activations; None is that all are made of
      parameters.

  Returns:
    A list of outputs, of which some may be Adapted.

  Example:
    >>> closed = jax.make_jaxpr(jnp.transpose)(jnp.ones((2, 3)))
    >>> evaluate(closed.jaxpr, closed.consts, [Adapted(jnp.ones((2, 3)))],
    ...          Said(print))[0].shape
    (3, 2)
  """
  if roles is None:
    none = [False] * len(jaxpr.invars), [False] * len(jaxpr.outvars)
    roles = Roles(jaxpr, *none)
  env = dict(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  special = {v for v, x in env.items() if is_adapted(x)}
  last = _last_uses(jaxpr)
  start = 0
  for at, eqn in enumerate(jaxpr.eqns):
    if not special or special.isdisjoint(_variables(eqn)):
      continue
    _run_plain(jaxpr.eqns[start:at], env, last, at)
    start = at + 1
    operands = [_read(env, atom) for atom in eqn.invars]
    results = _adapted(eqn, operands, said, roles)
    env.update(zip(eqn.outvars, results, strict=True))
    special.update(
      v for v, x in zip(eqn.outvars, results, strict=True) if is_adapted(x)
    )
  _run_plain(jaxpr.eqns[start:], env, last, len(jaxpr.eqns))
  return [_read(env, atom) for atom in jaxpr.outvars]


def _read(env, atom):
  """Returns the value of a literal or variable."""
  return atom.val if isinstance(atom, jex.Literal) else env[atom]


def _variables(eqn) -> list[Any]:
  """Returns the operands of an equation that are no literals."""
  return [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]


def _last_uses(jaxpr) -> dict[Any, int]:
  """Returns the number of the last equation that reads each variable."""
  last = {}
  for at, eqn in enumerate(jaxpr.eqns):
    last.update(dict.fromkeys(_variables(eqn), at))
  results = [v for v in jaxpr.outvars if not isinstance(v, jex.Literal)]
  return {**last, **dict.fromkeys(results, len(jaxpr.eqns))}


def _run_plain(eqns, env, last, end) -> None:
  """Runs equations on arrays as one program; keeps what is read from `end` on.

  A program of its own keeps names and places of the model's source.
  """
  if not eqns:
    return
  made = {v for eqn in eqns for v in eqn.outvars}
  reads = dict.fromkeys(v for eqn in eqns for v in _variables(eqn))
  given = [v for v in reads if v not in made]
  kept = [
    v
    for eqn in eqns
    for v in eqn.outvars
    if not isinstance(v, jex.DropVar) and last.get(v, -1) >= end
  ]
  names = ("",) * len(given), ("",) * len(kept)
  about = jex.DebugInfo("adapt", "adapt", *names)
  part = jex.Jaxpr([], given, kept, [*eqns], jex.no_effects, about)
  run = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, []))
  env.update(zip(kept, run(*[env[v] for v in given]), strict=True))


def _adapted(eqn, operands, said, roles: Roles) -> Sequence[Any]:
  """Runs an equation with Adapted operands, by a rule if there is one."""
  name = eqn.primitive.name
  if name in _CONTROL:
    return _CONTROL[name](eqn, operands, said, roles)
  if name in OF_W_ALONE:
    value = operands[0]
    return [dataclasses.replace(value, w=_bind(eqn, [value.w])[0])]
  if name in _JOINS and _joins_activation(eqn, operands, roles):
    _check_kept(name, operands)
    return _bind(eqn, map(_dense, operands))
  if name == "dot_general":
    operands, notes = read_gates(operands, eqn.params)
    said.add({x.path: notes for x in operands if is_adapted(x) and notes})
  rule = _RULES.get(name)
  has_branch = any(is_adapted(x) and x.branches for x in operands)
  has_gate = any(map(is_gated, operands))
  if (
    rule is not None
    and (not has_branch or name in _WITH_BRANCHES)
    and (not has_gate or name in _WITH_GATES)
  ):
    found = rule(operands, eqn.params)
    if found is not None:
      found = found if eqn.primitive.multiple_results else [found]
      if name == "gather" and _takes_rows(eqn, operands, roles):
        return list(map(_dense, found))
      return [_unless_rows(x, operands[0]) for x in found]
  return _bind(eqn, _densely(name, operands, said))


def _joins_activation(eqn, operands, roles: Roles) -> bool:
  """Returns whether a result depends on inputs and is no weight."""
  return not roles.is_weight(eqn.outvars[0]) and any(
    roles.depends(atom) and not is_adapted(x)
    for atom, x in zip(eqn.invars, operands, strict=True)
  )


def _takes_rows(eqn, operands, roles: Roles) -> bool:
  """Returns whether a look-up takes rows that are not used as a weight."""
  value = operands[0]
  return (
    is_adapted(value)
    and takes_rows(value, eqn.params)
    and not roles.is_weight(eqn.outvars[0])
  )


def _unless_rows(found, before):
  """Returns the dense sum where single rows are left of a matrix."""
  is_rows = (
    is_adapted(found)
    and is_adapted(before)
    and not found.branches
    and is_matrix(before)
    and not is_matrix(found)
  )
  return dense_sum(found) if is_rows else found


def _dense(x):
  """Returns an array as it is, and the dense sum of an Adapted."""
  return dense_sum(x) if is_adapted(x) else x


def _check_kept(name, operands) -> None:
  """Raises ValueError where further rows or the work of gates would be lost."""
  for x in operands:
    if is_gated(x):
      raise ValueError(
        f"{x.path} has a Gated, whose gate reads the input of a matmul; its "
        f"parameter {x.shape} goes into {name}, which has none for it. Give a "
        "plain Lora to this parameter."
      )
    if is_adapted(x) and x.rows is not None:
      raise ValueError(
        f"{x.path} has {len(x.rows)} further rows, which {name} does not read: "
        "Rows are for tables whose rows the model looks up by their numbers."
      )


def _densely(name, operands, said):
  """Replaces Adapted operands by their dense sums, reporting each."""
  _check_kept(name, operands)
  for x in operands:
    if is_adapted(x):
      said.missing(name, x)
  return list(map(_dense, operands))


def _bind(eqn, operands) -> Sequence[Any]:
  """Runs one equation on arrays."""
  env: dict[Any, Any] = {
    atom: x
    for atom, x in zip(eqn.invars, operands, strict=True)
    if not isinstance(atom, jex.Literal)
  }
  kept = dict.fromkeys(eqn.outvars, 1)
  _run_plain([eqn], env, kept, 1)
  return [env.get(v) for v in eqn.outvars]


def _within(closed, operands, said, inputs, weights=None):
  """Runs a nested program on operands of which some depend on inputs."""
  jaxpr, consts = (
    getattr(closed, "jaxpr", closed),
    getattr(closed, "consts", ()),
  )
  weights = weights or [False] * len(jaxpr.outvars)
  roles = Roles(jaxpr, inputs, weights)
  return evaluate(jaxpr, consts, operands, said, roles)


def _flags(atoms, roles: Roles) -> list[bool]:
  """Returns which operands depend on inputs."""
  return [roles.depends(atom) for atom in atoms]


def _weights(eqn, roles: Roles) -> list[bool]:
  """Returns which results are used as weights alone."""
  return [roles.is_weight(v) for v in eqn.outvars]


def _inline(eqn, operands, said, roles):
  """Runs a nested jit or call in place."""
  inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
  inputs, weights = _flags(eqn.invars, roles), _weights(eqn, roles)
  found = _within(inner, operands, said, inputs, weights)
  places = eqn.params.get("out_shardings", (None,) * len(found))
  return [
    lax.with_sharding_constraint(x, place)
    if isinstance(place, NamedSharding) and not is_adapted(x)
    else x
    for x, place in zip(found, places, strict=True)
  ]


def _remat(eqn, operands, said, roles):
  """Rebuilds a `jax.checkpoint`."""
  params = eqn.params
  inputs, weights = _flags(eqn.invars, roles), _weights(eqn, roles)

  @functools.partial(
    jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"]
  )
  def run(*args):
    """Runs the checkpointed program; returns its notes as well."""
    own = said.within()
    return _within(params["jaxpr"], args, own, inputs, weights), own.notes

  found, notes = run(*operands)
  said.add(notes)
  return found


def _custom_vjp(eqn, operands, said, roles):
  """Rebuilds a function with its own derivatives, which run by the rules too.

  Its forward and backward passes are traced on arrays and run on Adapted
  values. What comes back for a weight is spread over the weight's parts as the
  derivative of the dense sum is, which itself is not needed.
  """
  inputs, inner = _flags(eqn.invars, roles), eqn.params["call_jaxpr"]
  count = eqn.params.get("num_consts", 0)
  consts, given = operands[:count], operands[count:]
  said = said.within()

  @jax.custom_vjp
  def run(*args):
    """Runs the function."""
    found = _within(inner, [*consts, *args], said, inputs)
    said.refuse("custom_vjp")
    return list(map(_dense, found))

  def forward(*args):
    """Runs the function's own forward pass."""
    both, shape = jax.make_jaxpr(
      lambda consts, own: jax.vjp(lambda *x: _bind(eqn, [*consts, *x]), *own),
      return_shape=True,
    )(_bases(consts), _bases(args))
    found = _within(both, [*consts, *args], said, inputs)
    outs, kept = found[: len(shape[0])], found[len(shape[0]) :]
    pull = functools.partial(_pulled, jax.tree.structure(shape[1]), said)
    return list(map(_dense, outs)), jax.tree_util.Partial(pull, kept, args)

  run.defvjp(forward, lambda pull, changes: pull(changes))
  return run(*given)


def _pulled(tree, said, kept, args, changes):
  """Runs a function's own backward pass on what its forward pass kept."""
  is_real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in args]

  def back(kept, changes):
    """Returns the derivatives by the operands that have some."""
    found = jax.tree.unflatten(tree, kept)(changes)
    return [x for x, is_in in zip(found, is_real, strict=True) if is_in]

  closed = jax.make_jaxpr(back)(_bases(kept), changes)
  inputs = [True] * (len(kept) + len(changes))
  found = map(_dense, _within(closed, [*kept, *changes], said, inputs))
  own = [next(found) if is_in else None for is_in in is_real]
  return tuple(
    jax.vjp(dense_sum, x)[1](change)[0] if is_adapted(x) else change
    for x, change in zip(args, own, strict=True)
  )


def _bases(values) -> list[Any]:
  """Returns the parameters of Adapted values, and arrays as they are."""
  return [x.w if is_adapted(x) else x for x in values]


def _scan(eqn, operands, said, roles):
  """Rebuilds a `lax.scan`."""
  params = eqn.params
  closed, (count, carried) = params["jaxpr"], counts_of_scan(params)
  inputs = _flags(eqn.invars, roles)
  inputs[count:carried] = [True] * (carried - count)
  consts, carry = operands[:count], operands[count:carried]
  fixed = _fixed(closed.jaxpr, count, carry)
  carry = _moving(carry, fixed, "the carry of scan", said)
  stacked = [
    _slices_first(x, params["length"]) if is_adapted(x) else x
    for x in operands[carried:]
  ]

  def body(carry, parts):
    """Runs one step of the scan; returns its notes as well."""
    own, heard = _with_fixed(carry, fixed), said.within()
    found = _within(closed, [*consts, *own, *parts], heard, inputs)
    found = _moving(found, fixed, "the result of scan", said)
    return found[: len(carry)], (found[len(carry) :], heard.notes)

  carry, (stacks, notes) = lax.scan(
    body,
    carry,
    stacked,
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  said.add(notes)
  return [*_with_fixed(carry, fixed), *stacks]


def _fixed(jaxpr, first, carry) -> dict[int, Adapted]:
  """Returns the Adapted parts of a loop's carry that its body hands on."""
  return {
    i: x
    for i, x in enumerate(carry)
    if is_adapted(x) and jaxpr.outvars[i] is jaxpr.invars[first + i]
  }


def _moving(carry, fixed, name, said) -> list[Any]:
  """Returns a loop's carry as arrays, of its fixed parts the parameter."""
  return [
    x.w if i in fixed and is_adapted(x) else _densely(name, [x], said)[0]
    for i, x in enumerate(carry)
  ]


def _with_fixed(carry, fixed) -> list[Any]:
  """Puts a loop's fixed parts into its carry."""
  return [fixed.get(i, x) for i, x in enumerate(carry)]


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
    own["router"] = jax.tree.map(
      lambda leaf: first(leaf.ndim - value.ndim, leaf), change.router
    )
    return dataclasses.replace(change, **own)

  return dataclasses.replace(
    value, changes=tuple(map(lay, value.changes)), rows=None
  )


def _while(eqn, operands, said, roles):
  """Rebuilds a `lax.while_loop`."""
  params = eqn.params
  split = params["cond_nconsts"]
  start = split + params["body_nconsts"]
  for_test, for_body = operands[:split], operands[split:start]
  test, body = params["cond_jaxpr"], params["body_jaxpr"]
  inputs, carry = _flags(eqn.invars, roles), operands[start:]
  moves = [True] * len(carry)
  fixed = _fixed(body.jaxpr, len(for_body), carry)
  name, said = "the carry of while", said.within()

  def go_on(carry):
    """Runs the loop's condition."""
    given = [*for_test, *_with_fixed(carry, fixed)]
    return _within(test, given, said, [*inputs[:split], *moves])[0]

  def step(carry):
    """Runs the loop's body once."""
    given = [*for_body, *_with_fixed(carry, fixed)]
    found = _within(body, given, said, [*inputs[split:start], *moves])
    said.refuse("while")
    return _moving(found, fixed, name, said)

  found = lax.while_loop(go_on, step, _moving(carry, fixed, name, said))
  return _with_fixed(found, fixed)


def _cond(eqn, operands, said, roles):
  """Rebuilds a `lax.cond` or `lax.switch`."""
  index, *given = operands
  inputs, said = _flags(eqn.invars[1:], roles), said.within()

  def branch(closed, *args):
    """Runs one branch."""
    found = _within(closed, args, said, inputs)
    said.refuse("cond")
    return _densely("the result of cond", found, said)

  branches = eqn.params["branches"]
  run = [functools.partial(branch, closed) for closed in branches]
  return lax.switch(index, run, *given)


def _shard_map(eqn, operands, said, roles):
  """Rebuilds a `jax.shard_map`."""
  params = eqn.params
  inputs, said = _flags(eqn.invars, roles), said.within()

  def run(*args):
    """Runs the program on one shard."""
    found = _within(params["jaxpr"], args, said, inputs)
    said.refuse("shard_map")
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
    """Returns the spec of a part, unsharded where it does not vary."""
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
      router=jax.tree.map(
        lambda leaf: own(leaf.ndim - value.ndim, leaf), change.router
      ),
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
  "custom_vjp_call": _custom_vjp,
  "shard_map": _shard_map,
}
