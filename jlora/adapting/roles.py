# SPDX-License-Identifier: Apache-2.0
"""Which values of a program are activations, and which are used as weights.

Two facts of a traced program, both read without computing anything: a value
depends on the program's inputs, or on its parameters alone; and all that is
made of a value may be products in which it is the weight.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

# In these the second operand multiplies the first, or is multiplied by it.
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
# What these make of a weight is a weight, if it is used as one.
_FOLLOWED = frozenset({
  "add", "add_any", "all_gather", "all_gather_invariant", "broadcast_in_dim",
  "concatenate", "convert_element_type", "copy", "copy_p", "div",
  "dynamic_slice", "gather", "mul", "neg", "optimization_barrier", "pad",
  "pcast", "pvary", "reduce_precision", "reshape", "reshard", "rev",
  "select_n", "sharding_constraint", "slice", "split", "squeeze", "stack",
  "stop_gradient", "sub", "tile", "transpose",
})  # fmt: skip


class Roles:
  """The roles of the values of one program, worked out when they are asked.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr`.
    inputs: for each of its arguments, whether it depends on inputs.
    weights: for each of its results, whether it is used as a weight alone.
    consts: whether its constants count as inputs.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> fn = lambda w, x: x @ (2 * w) + (w + x)
    >>> jaxpr = jax.make_jaxpr(fn)(jnp.ones((2, 2)), jnp.ones((2, 2))).jaxpr
    >>> roles = Roles(jaxpr, [False, True], [False])
    >>> {eqn.primitive.name: (roles.depends(eqn.outvars[0]),
    ...                       roles.is_weight(eqn.outvars[0]))
    ...  for eqn in jaxpr.eqns[:3]}
    {'mul': (False, True), 'dot_general': (True, False), 'add': (True, False)}
  """

  def __init__(
    self,
    jaxpr: Any,
    inputs: Sequence[bool],
    weights: Sequence[bool],
    consts: bool = False,
  ):
    self._jaxpr, self._inputs, self._weights = jaxpr, inputs, weights
    self._consts = consts

  def depends(self, atom: Any) -> bool:
    """Returns whether a value depends on inputs."""
    return not isinstance(atom, jex.Literal) and atom in self._dependent

  def is_weight(self, atom: Any) -> bool:
    """Returns whether all uses of a value are as the weight of a product."""
    return self._uses.get(atom, False)

  @functools.cached_property
  def _dependent(self) -> set[Any]:
    """The variables that depend on inputs."""
    given = [self._consts] * len(self._jaxpr.constvars)
    return _dependent(self._jaxpr, self._inputs, given)

  @functools.cached_property
  def _uses(self) -> dict[Any, bool]:
    """Whether each variable that is used is a weight in all its uses."""
    return _uses(self._jaxpr, self)


def outputs_that_depend(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
  """Returns which results of a program depend on some of its arguments.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr`.
    inputs: for each argument, whether it counts.

  Example:
    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x, i: (x + i, i + 1))(1.0, 2.0).jaxpr
    >>> outputs_that_depend(jaxpr, [True, False])
    [True, False]
  """
  found = _dependent(jaxpr, inputs)
  return [_is_in(atom, found) for atom in jaxpr.outvars]


def _is_in(atom: Any, found: Any) -> bool:
  """Returns whether an atom is a variable of a collection."""
  return not isinstance(atom, jex.Literal) and atom in found


def _dependent(jaxpr, inputs, consts=()) -> set[Any]:
  """Returns the variables of a program that depend on marked arguments."""
  found = {v for v, is_in in zip(jaxpr.invars, inputs, strict=True) if is_in}
  found |= {v for v, is_in in zip(jaxpr.constvars, consts, strict=False)
            if is_in}  # fmt: skip
  for eqn in jaxpr.eqns:
    own = [_is_in(atom, found) for atom in eqn.invars]
    if any(own):
      follow = _FOLLOW.get(eqn.primitive.name, _through)
      outs = [True] * len(eqn.outvars) if all(own) else follow(eqn, own)
      found |= {v for v, is_in in zip(eqn.outvars, outs, strict=True) if is_in}
  return found


def _through(eqn, own) -> list[bool]:
  """Follows marks through a call; all results of other equations get one."""
  inner = inner_of(eqn)
  if inner is None:
    return [True] * len(eqn.outvars)
  return outputs_that_depend(inner, own)


def inner_of(eqn: Any) -> Any:
  """Returns the program that an equation runs once on its operands, or None.

  Example:
    >>> import jax
    >>> eqn = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0).eqns[0]
    >>> len(inner_of(eqn).eqns)
    1
  """
  for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = eqn.params.get(key)
    inner = getattr(inner, "jaxpr", inner)
    if (
      hasattr(inner, "eqns")
      and len(inner.invars) == len(eqn.invars)
      and len(inner.outvars) == len(eqn.outvars)
    ):
      return inner
  return None


def counts_of_scan(params: Any) -> tuple[int, int]:
  """Returns how many operands are constants, and constants or carry.

  Example:
    >>> counts_of_scan({"num_consts": 1, "num_carry": 2})
    (1, 3)
  """
  if "ft_in" in params:  # JAX from 0.11 on has a tree of (consts, carry, xs)
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts.vals), len(consts.vals) + len(carry.vals)
  return params["num_consts"], params["num_consts"] + params["num_carry"]


def _of_scan(eqn, own) -> list[bool]:
  """Follows marks through a scan until its carry gets no more."""
  count, carried = counts_of_scan(eqn.params)
  body = eqn.params["jaxpr"].jaxpr
  return _of_loop(
    lambda carry: outputs_that_depend(
      body, [*own[:count], *carry, *own[carried:]]
    ),
    own[count:carried],
  )


def _of_while(eqn, own) -> list[bool]:
  """Follows marks through a while loop; its condition marks the whole carry."""
  params = eqn.params
  split = params["cond_nconsts"]
  start = split + params["body_nconsts"]
  test, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
  carry = _of_loop(
    lambda carry: outputs_that_depend(body, [*own[split:start], *carry]),
    own[start:],
  )
  goes_on = outputs_that_depend(test, [*own[:split], *carry])
  return [True] * len(carry) if any(goes_on) else carry


def _of_loop(step, carry) -> list[bool]:
  """Repeats a loop's body until no more of its carry is marked."""
  while True:
    found = step(carry)
    more = [a or b for a, b in zip(carry, found, strict=False)]
    if more == [*carry]:
      return found
    carry = more


def _of_cond(eqn, own) -> list[bool]:
  """Follows marks through every branch; the index marks all results."""
  if own[0]:
    return [True] * len(eqn.outvars)
  each = [
    outputs_that_depend(branch.jaxpr, own[1:])
    for branch in eqn.params["branches"]
  ]
  return [any(marks) for marks in zip(*each, strict=True)]


_FOLLOW = {"scan": _of_scan, "while": _of_while, "cond": _of_cond}


def _uses(jaxpr: Any, roles: Roles) -> dict[Any, bool]:
  """Returns for every variable that is used whether it is always a weight."""
  found: dict[Any, bool] = {}

  def note(atom, is_weight):
    """Notes one use."""
    if not isinstance(atom, jex.Literal):
      found[atom] = found.get(atom, True) and is_weight

  for atom, is_weight in zip(jaxpr.outvars, roles._weights, strict=True):
    note(atom, is_weight)
  for eqn in reversed(jaxpr.eqns):
    outs = [found[v] for v in eqn.outvars if v in found]
    if not outs:  # of what is not used nothing is asked
      continue
    for atom, is_weight in zip(
      eqn.invars, _roles_in(eqn, roles, all(outs), found), strict=True
    ):
      note(atom, is_weight)
  return found


def _roles_in(eqn, roles: Roles, is_weight: bool, found) -> list[bool]:
  """Returns whether each operand of an equation is a weight there."""
  name, atoms = eqn.primitive.name, eqn.invars
  if name in PRODUCTS:
    first, second = atoms[:2]
    pair = [roles.depends(second), roles.depends(first)]
    same = first is second
    return [p and not same for p in pair] + [False] * (len(atoms) - 2)
  if name in _FOLLOWED:
    return [is_weight] * len(atoms)
  own = [roles.depends(atom) for atom in atoms]
  if name == "scan":
    count, carried = counts_of_scan(eqn.params)
    inner = eqn.params["jaxpr"].jaxpr
    marks = [*own[:count], *[True] * (carried - count), *own[carried:]]
    outs = [False] * len(inner.outvars)
    within = _uses(inner, Roles(inner, marks, outs))
    kept = [within.get(v, True) for v in inner.invars]
    return [*kept[:count], *[False] * (carried - count), *kept[carried:]]
  inner = inner_of(eqn)
  if inner is None:
    return [False] * len(atoms)
  outs = [found.get(v, True) for v in eqn.outvars]
  within = _uses(inner, Roles(inner, own, outs))
  return [within.get(v, True) for v in inner.invars]
