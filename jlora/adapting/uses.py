# SPDX-License-Identifier: Apache-2.0
"""Reads from a traced program how each parameter's axes are used.

A value that is made of a parameter alone carries, for each of its axes, the
parameter's axes that it is made of. Transposes, reshapes, slices, casts and
control flow move them; products, convolutions and look-ups say what they are
for. What depends on the function's inputs is an activation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex


class Atom(NamedTuple):
  """A factor of one axis of a parameter: a whole axis, or a part of one.

  Attributes:
    axis: the parameter's axis.
    size: how many entries the factor has.
  """

  axis: int
  size: int


Dims = tuple[tuple[Atom, ...], ...]


class Source(NamedTuple):
  """A parameter that a value is made of.

  Attributes:
    path: the parameter's name.
    dims: for each axis of the value, factors of the parameter's axes.
    taken: axes of which single entries were taken, by a number or a scan.
    rows: axes of which many entries were taken, or those that inputs chose: a
      table's rows, or matrices of a stack.
    along: axes along which look-ups are repeated, as by vmap.
  """

  path: str
  dims: Dims
  taken: tuple[int, ...] = ()
  rows: tuple[int, ...] = ()
  along: tuple[int, ...] = ()


class Value(NamedTuple):
  """What is known of a value in the program.

  Attributes:
    sources: the parameters it is made of.
    is_activation: whether it depends on the function's inputs otherwise than by
      which matrices of a stack were taken.
  """

  sources: tuple[Source, ...] = ()
  is_activation: bool = False


class Use(NamedTuple):
  """One use of a parameter by a program.

  Attributes:
    how: the operation.
    batch: axes that repeat the operation.
    inputs: axes that are summed over.
    outputs: axes that are written.
    is_split: whether parts of one axis have several of these roles.
  """

  how: str
  batch: tuple[int, ...] = ()
  inputs: tuple[int, ...] = ()
  outputs: tuple[int, ...] = ()
  is_split: bool = False

  @property
  def is_matrix(self) -> bool:
    """Returns whether the parameter is a matrix here, or a stack of them."""
    return bool(self.inputs and self.outputs)


Uses = dict[str, list[Use]]
_NOTHING = Value()
_KEPT = {
  "convert_element_type", "copy", "copy_p", "reduce_precision", "rev",
  "optimization_barrier", "sharding_constraint", "device_put", "slice", "pad",
  "concatenate", "split", "dynamic_update_slice", "all_gather", "pvary",
  "neg", "real", "stop_gradient", "select_n", "clamp", "psum", "mesh_cast",
  "reshard", "all_gather_invariant", "psum_invariant", "pcast",
}  # fmt: skip
# Of these a parameter remains what it was when another one joins it.
_SUMS = {"add", "sub", "add_any", "max", "min", "select_n", "concatenate"}
# What rows of a table are for, when they are not multiplied as matrices are.
_ADDS_ROWS = {*_SUMS, "reduce_sum"}


def read_uses(
  closed: Any, paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Uses:
  """Lists every use of each parameter in a program.

  Args:
    closed: a ClosedJaxpr whose first arguments are the parameters.
    paths: their names, in that order.
    shapes: their shapes.

  Returns:
    {path: uses}; an empty list for a parameter that is not used.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> w, x = jnp.ones((3, 2)), jnp.ones((5, 3))
    >>> read_uses(jax.make_jaxpr(lambda w, x: x @ w)(w, x), ["w"],
    ...           {"w": (3, 2)})
    {'w': [Use(how='dot_general', batch=(), inputs=(0,), outputs=(1,),
    is_split=False)]}
  """
  uses: Uses = {path: [] for path in paths}
  values = [Value((_whole(path, shapes[path]),)) for path in paths]
  rest = len(closed.jaxpr.invars) - len(paths)
  values += [Value(is_activation=True)] * rest
  reader = _Reader(shapes, uses)
  for value in reader.run(closed.jaxpr, values):
    for source in (source for source in value.sources if source.rows):
      reader.note(source, reader.look_up(source))
  return uses


def _whole(path: str, shape: tuple[int, ...]) -> Source:
  """Returns the source of an untouched parameter."""
  dims = tuple((Atom(i, size),) for i, size in enumerate(shape))
  return Source(path, dims)


class _Reader:
  """Walks a program and notes what is done with its parameters."""

  def __init__(self, shapes: Mapping[str, tuple[int, ...]], uses: Uses):
    self.shapes, self.uses = shapes, uses

  def run(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
    """Follows values through a program; returns those of its outputs."""
    env: dict[Any, Value] = {}

    def read(atom):
      is_known = not isinstance(atom, jex.Literal)
      return env.get(atom, _NOTHING) if is_known else _NOTHING

    env.update(zip(jaxpr.invars, values, strict=True))
    for eqn in jaxpr.eqns:
      operands = [read(atom) for atom in eqn.invars]
      found = self._equation(eqn, operands)
      env.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, eqn: Any, operands: list[Value]) -> Sequence[Value]:
    """Returns the results of one equation."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    if name in _CONTROL:
      return _CONTROL[name](self, eqn, operands)
    inner = _inner_of(eqn)
    if inner is not None:
      return self.run(inner, operands)
    is_activation = any(value.is_activation for value in operands)
    if not any(value.sources for value in operands):
      return [Value(is_activation=is_activation)] * count
    if name in _RULES:
      return [_RULES[name](self, eqn, operands)] * count
    if name in _KEPT or _is_by_entry(eqn):
      return [self._by_entry(eqn, operands, name)] * count
    self.end(operands, name)
    # A norm of a parameter is still known before the inputs are.
    return [Value(is_activation=is_activation)] * count

  def _by_entry(self, eqn: Any, operands: list[Value], name: str) -> Value:
    """Follows an operation on entries, or one that keeps the axes' order."""
    if any(value.is_activation for value in operands):
      self.end(operands, name)
      return Value(is_activation=True)
    wide = max(_width(value) for value in operands)
    kept: list[Source] = []
    for value in operands:
      is_kept = name in _SUMS or _width(value) == wide
      for source in value.sources:
        if is_kept and len(source.dims) == len(eqn.outvars[0].aval.shape):
          kept.append(source)
        else:
          self.note(source, Use(name))
    return Value(tuple(kept))

  def taken(self, sources: Sequence[Source], is_activation: bool) -> Value:
    """Notes tables whose rows were taken; follows stacks of matrices."""
    kept = []
    for source in sources:
      shape, use = self.shapes[source.path], self.look_up(source)
      if use.inputs and sum(shape[axis] > 1 for axis in use.outputs) <= 1:
        self.note(source, use)
        is_activation = True
      else:
        kept.append(source)
    return Value(tuple(kept), is_activation)

  def end(self, operands: Sequence[Value], name: str) -> None:
    """Notes an operation that ends in activations, or in what has no axes."""
    for source in (s for value in operands for s in value.sources):
      is_row = source.rows and name in _ADDS_ROWS
      self.note(source, self.look_up(source) if is_row else Use(name))

  def look_up(self, source: Source) -> Use:
    """Returns the use of a table whose rows were taken."""
    rows, shape = {*source.rows}, self.shapes[source.path]
    kept = {atom.axis for atoms in source.dims for atom in atoms}
    writes = kept - rows - {*source.along}
    writes |= {i for i, size in enumerate(shape) if size == 1} - rows
    batch = {*range(len(shape))} - rows - writes
    axes = [tuple(sorted(some)) for some in (batch, rows, writes)]
    return Use("gather", axes[0], axes[1], axes[2])

  def note(self, source: Source, use: Use) -> None:
    """Adds a use, once."""
    if use not in self.uses[source.path]:
      self.uses[source.path].append(use)

  def product(
    self, source: Source, name: str, roles: Mapping[int, str]
  ) -> None:
    """Notes a product; `roles` says what each axis of the value is for."""
    taken = (*source.taken, *source.rows)
    found: dict[int, list[str]] = {axis: ["batch"] for axis in taken}
    for position, atoms in enumerate(source.dims):
      for atom in atoms:
        found.setdefault(atom.axis, []).append(roles[position])
    axes: dict[str, list[int]] = {"batch": [], "inputs": [], "outputs": []}
    is_split = False
    for axis in range(len(self.shapes[source.path])):
      kinds = set(found.get(axis, ["batch"]))
      is_split |= len(kinds) > 1
      kinds -= {"batch"} if len(kinds) > 1 else set()
      axes[min(kinds)].append(axis)
    batch, inputs, outputs = (tuple(axes[role]) for role in axes)
    self.note(source, Use(name, batch, inputs, outputs, is_split))


def _width(value: Value) -> int:
  """Counts the axes of a value that come from a parameter."""
  return max((sum(map(bool, s.dims)) for s in value.sources), default=-1)


def _inner_of(eqn: Any) -> Any:
  """Returns the program that an equation calls on its own operands, or None."""
  for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = eqn.params.get(key)
    inner = getattr(inner, "jaxpr", inner)
    if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _is_by_entry(eqn: Any) -> bool:
  """Returns whether all operands but scalars spread to the result's shape."""
  shape = eqn.outvars[0].aval.shape
  own = [atom.aval.shape for atom in eqn.invars if atom.aval.shape]
  return all(
    len(sizes) == len(shape)
    and all(size in (1, full) for size, full in zip(sizes, shape, strict=True))
    for sizes in own
  )


def _moved(operands: Sequence[Value], change: Callable[[Dims], Dims]) -> Value:
  """Returns the first operand with other axes."""
  value = operands[0]
  sources = (s._replace(dims=change(s.dims)) for s in value.sources)
  return value._replace(sources=tuple(sources))


def _transpose(reader, eqn, operands):
  """Orders the axes anew."""
  order = eqn.params["permutation"]
  return _moved(operands, lambda dims: tuple(dims[i] for i in order))


def _broadcast(reader, eqn, operands):
  """Adds axes that come from no parameter."""
  places = eqn.params["broadcast_dimensions"]
  count = len(eqn.params["shape"])

  def change(dims):
    back = {place: dim for place, dim in zip(places, dims, strict=True)}
    return tuple(back.get(i, ()) for i in range(count))

  return _moved(operands, change)


def _squeeze(reader, eqn, operands):
  """Drops axes of one entry."""
  gone = eqn.params["dimensions"]
  return _moved(
    operands, lambda dims: tuple(d for i, d in enumerate(dims) if i not in gone)
  )


def _reshape(reader, eqn, operands):
  """Splits and joins axes; where the factors do not fit, it is an end."""
  shape = eqn.outvars[0].aval.shape
  old = eqn.invars[0].aval.shape
  kept = []
  for source in operands[0].sources:
    dims = regroup(source.dims, old, shape)
    if dims is None:
      reader.note(source, Use("reshape"))
    else:
      kept.append(source._replace(dims=dims))
  return Value(tuple(kept), operands[0].is_activation)


def regroup(
  dims: Dims, old: tuple[int, ...], new: tuple[int, ...]
) -> Dims | None:
  """Returns the factors of each axis after a reshape, None if they are cut.

  Args:
    dims: factors of each axis before.
    old: the shape before.
    new: the shape after.

  Example:
    >>> regroup(((Atom(0, 12),),), (12,), (3, 4))
    ((Atom(axis=0, size=3),), (Atom(axis=0, size=4),))
  """
  rest: list[tuple[Atom | None, int]] = []
  for atoms, size in zip(dims, old, strict=True):
    # Of slices and shards the sizes are no longer the parameter's.
    known = math.prod(atom.size for atom in atoms) == size
    if known:
      rest += [(atom, atom.size) for atom in atoms if atom.size > 1]
    elif len(atoms) == 1:
      rest.append((atoms[0], size))
    elif size > 1:
      rest.append((None, size))
  rest.reverse()
  found = []
  for size in new:
    group: list[Atom] = []
    while size > 1 and rest:
      atom, length = rest.pop()
      part = math.gcd(size, length)
      if part == 1 or (part < length and size // part > 1):
        return None
      if part < length:
        rest.append((atom, length // part))
      size //= part
      group += [Atom(atom.axis, part)] if atom else []
    found.append(tuple(group))
  return tuple(found)


def _dynamic_slice(reader, eqn, operands):
  """Takes a piece; where it is one entry of many, the axis is taken."""
  sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
  single = [i for i, size in enumerate(sizes) if size == 1 < shape[i]]
  is_chosen = any(value.is_activation for value in operands[1:])
  found = []
  for source in operands[0].sources:
    axes = sorted({a.axis for i in single for a in source.dims[i]})
    dims = tuple(
      () if i in single else atoms for i, atoms in enumerate(source.dims)
    )
    found.append(_with_taken(source._replace(dims=dims), axes, is_chosen))
  return reader.taken(found, operands[0].is_activation)


def _with_taken(source: Source, axes: Sequence[int], are_rows: bool) -> Source:
  """Returns a source of which entries were taken along some axes."""
  name = "rows" if are_rows else "taken"
  return source._replace(**{name: (*getattr(source, name), *axes)})


def _gather(reader, eqn, operands):
  """Takes rows by number: the axis they lie along is taken."""
  about, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  shape, count = eqn.invars[0].aval.shape, len(eqn.outvars[0].aval.shape)
  gone = {*about.collapsed_slice_dims, *about.operand_batching_dims}
  kept = [i for i in range(len(shape)) if i not in gone]
  indexed = {i for i in about.start_index_map if sizes[i] < shape[i]}
  place = dict(zip(about.offset_dims, kept, strict=True))
  # Axes of the indices, in order, lie where no offsets do.
  by_index = [i for i in range(count) if i not in place]
  along = {
    by_index[at]: axis
    for at, axis in zip(
      about.start_indices_batching_dims, about.operand_batching_dims,
      strict=True,
    )
  }  # fmt: skip
  are_rows = operands[1].is_activation or count > len(place) + len(along)
  found = []
  for source in operands[0].sources:
    axes = sorted({a.axis for i in indexed for a in source.dims[i]})
    dims = [
      source.dims[at] if at is not None and at not in indexed else ()
      for at in ({**place, **along}.get(i) for i in range(count))
    ]
    repeated = {a.axis for i in along.values() for a in source.dims[i]}
    source = source._replace(
      dims=tuple(dims), along=(*source.along, *sorted(repeated))
    )
    found.append(_with_taken(source, axes, are_rows))
  return reader.taken(found, operands[0].is_activation)


def _dot(reader, eqn, operands):
  """Says of a product's axes which are summed over and which repeat it."""
  contract, batch = eqn.params["dimension_numbers"]
  for side in (0, 1):
    for source in operands[side].sources:
      roles = dict.fromkeys(range(len(source.dims)), "outputs")
      roles |= dict.fromkeys(contract[side], "inputs")
      roles |= dict.fromkeys(batch[side], "batch")
      reader.product(source, "dot_general", roles)
  return Value(is_activation=True)


def _ragged_dot(reader, eqn, operands):
  """Says of experts (experts, in, out) which axis a product sums over."""
  roles = {0: "batch", 1: "inputs", 2: "outputs"}
  for source in operands[1].sources:
    reader.product(source, "ragged_dot", roles)
  return Value(is_activation=True)


def _convolution(reader, eqn, operands):
  """Says of a kernel which axes are summed over, in groups within each."""
  about = eqn.params["dimension_numbers"].rhs_spec
  for source in operands[0].sources:
    reader.note(source, Use("conv_general_dilated as image"))
  roles = dict.fromkeys(about[1:], "inputs") | {about[0]: "outputs"}
  for source in operands[1].sources:
    if eqn.params["batch_group_count"] > 1:
      reader.note(source, Use("conv_general_dilated in groups of the batch"))
    else:
      reader.product(source, "conv_general_dilated", roles)
  return Value(is_activation=True)


def _scan(reader, eqn, operands):
  """Reads the body with the first axis taken of what is scanned over."""
  params, jaxpr = eqn.params, eqn.params["jaxpr"].jaxpr
  if "ft_in" in params:  # jax 0.11
    groups = [len(list(group)) for group in params["ft_in"].unpack()]
  else:
    groups = [params["num_consts"], params["num_carry"]]
  start, end = groups[0], groups[0] + groups[1]
  slices = [_first_taken(value) for value in operands[end:]]
  carry = operands[start:end]
  found = _until_settled(
    lambda carry: reader.run(jaxpr, [*operands[:start], *carry, *slices]), carry
  )
  stacked = [
    _moved([value], lambda dims: ((), *dims)) for value in found[end - start :]
  ]
  return [*found[: end - start], *stacked]


def _first_taken(value: Value) -> Value:
  """Returns a value without its first axis, along which it is scanned."""
  return value._replace(
    sources=tuple(
      source._replace(
        dims=source.dims[1:],
        taken=(*source.taken, *(atom.axis for atom in source.dims[0])),
      )
      for source in value.sources
      if source.dims
    )
  )


def _while(reader, eqn, operands):
  """Reads test and body."""
  params = eqn.params
  split = params["cond_nconsts"]
  start = split + params["body_nconsts"]
  carry = operands[start:]
  test, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr

  def turn(carry):
    reader.run(test, [*operands[:split], *carry])
    return reader.run(body, [*operands[split:start], *carry])

  found = _until_settled(turn, carry)
  return [_either(a, b) for a, b in zip(carry, found, strict=True)]


def _until_settled(
  turn: Callable[[Sequence[Value]], list[Value]], carry: Sequence[Value]
) -> list[Value]:
  """Repeats a loop's body until its carry can be nothing more.

  What comes back at one place may go on to another in the next turn, so there
  are at most as many turns as places, and one.
  """
  found: list[Value] = []
  for _ in range(len(carry) + 1):
    found = turn(carry)
    more = [_either(a, b) for a, b in zip(carry, found, strict=False)]
    if more == [*carry]:
      break
    carry = more
  return found


def _cond(reader, eqn, operands):
  """Reads every branch."""
  results = [
    reader.run(branch.jaxpr, operands[1:]) for branch in eqn.params["branches"]
  ]
  found = list(results[0])
  for other in results[1:]:
    found = [_either(a, b) for a, b in zip(found, other, strict=True)]
  return found


def _either(one: Value, other: Value) -> Value:
  """Returns what a value can be that is one of two."""
  sources = dict.fromkeys((*one.sources, *other.sources))
  return Value(tuple(sources), one.is_activation or other.is_activation)


_RULES: dict[str, Callable[..., Value]] = {
  "transpose": _transpose,
  "broadcast_in_dim": _broadcast,
  "squeeze": _squeeze,
  "reshape": _reshape,
  "dynamic_slice": _dynamic_slice,
  "gather": _gather,
  "dot_general": _dot,
  "ragged_dot": _ragged_dot,
  "ragged_dot_general": _ragged_dot,
  "conv_general_dilated": _convolution,
}
_CONTROL: dict[str, Callable[..., Sequence[Value]]] = {
  "scan": _scan,
  "while": _while,
  "cond": _cond,
}
