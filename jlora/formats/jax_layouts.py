# SPDX-License-Identifier: Apache-2.0
"""How the two factors of a Lora lie in the states of JAX's LoRA libraries.

qwix puts W_lora_a and W_lora_b beside a weight W. Both have axes of W and the
rank, which is last in a and first in b:

    dot          a (in, r)                     b (r, out)
    einsum       a (axes of the operand, r)    b (r, the others), in W's order
    convolution  a (*window, in, r)            b (r, out)
    a stack      the layers' axis is where W has it, in a and in b

A dot makes one axis of several; an einsum keeps them. So which product reads a
weight of three axes has to be known: from its equation, or from its name.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jlora.loras import Lora
from jlora.views import MatrixView

Shape = tuple[int, ...]
Pair = tuple[np.ndarray, np.ndarray]
#: What stands for a product that makes one axis of several.
DOT = "dot"
#: Names whose weights are read by an einsum or a convolution.
KEPT = r"(.*/)?(w|[^/]*einsum[^/]*|[^/]*conv[^/]*/(kernel|w))"


class Form(NamedTuple):
  """Where the axes of a weight go.

  Attributes:
    repeated: batch axes that both factors have.
    in_a: axes of the first factor; contracted ones, and batch axes of which
      the second knows nothing.
    in_b: axes of the second factor.
    is_flat: whether each factor has one axis for all of its own.
  """

  repeated: tuple[int, ...]
  in_a: tuple[int, ...]
  in_b: tuple[int, ...]
  is_flat: bool = False

  @property
  def has_room(self) -> bool:
    """Returns whether both factors have the places of a stack's axes."""
    counts = [1, 1] if self.is_flat else [len(self.in_a), len(self.in_b)]
    return all(
      at <= min(counts) + 1 + count
      for count, at in enumerate(sorted(self.repeated))
    )

  def shapes(self, weight: Shape, rank: int) -> tuple[Shape, Shape]:
    """Returns the shapes of both factors."""
    a, b = (
      (math.prod(own),) if self.is_flat else own
      for own in (
        tuple(weight[at] for at in self.in_a),
        tuple(weight[at] for at in self.in_b),
      )
    )
    return self._with_stack(weight, (*a, rank)), self._with_stack(
      weight, (rank, *b)
    )

  def _with_stack(self, weight: Shape, inner: Shape) -> Shape:
    """Returns a factor's shape with the repeated axes at their places."""
    for at in sorted(self.repeated):
      inner = (*inner[:at], weight[at], *inner[at:])
    return inner


def form_of(path: str, view: MatrixView, equation: str | None) -> Form:
  """Returns where the axes of a weight go.

  Args:
    path: the parameter's name.
    view: its axes' roles.
    equation: of the einsum whose second operand it is; "dot" for any other
      product; None: what its name tells.

  Raises:
    ValueError: the name of a weight with several axes on a side tells nothing,
      or the equation sums over other axes than the view.

  Example:
    >>> form_of("q/w", MatrixView((), (1,), (0, 2)), "BTD,NDH->BTNH")
    Form(repeated=(), in_a=(1,), in_b=(0, 2), is_flat=False)
  """
  if equation is not None and equation != DOT:
    return _form_of_equation(path, view, equation)
  is_plain = len(view.inputs) == len(view.outputs) == 1
  if not (is_plain or equation == DOT or re.fullmatch(KEPT, path)):
    raise ValueError(
      f"{path} has {view.axes} axes, and its name does not tell whether an "
      "einsum or another product reads it, whose LoRAs differ; say it: "
      f"equations={{{path!r}: 'BTD,DNH->BTNH'}}, or 'dot'."
    )
  if equation == DOT and not is_plain:
    form = Form(view.batch, view.inputs, view.outputs, is_flat=True)
  else:
    form = kept_form(view)
  if not form.has_room:
    raise ValueError(
      f"the layers of {path} are stacked along axis {view.batch}, which its "
      "smaller factor does not have; no program of qwix has such a LoRA."
    )
  return form


def kept_form(view: MatrixView) -> Form:
  """Returns the form that keeps all axes, in the weight's order.

  Args:
    view: the axes' roles.
  """
  return Form(view.batch, _sorted(view.inputs), _sorted(view.outputs))


def _form_of_equation(path: str, view: MatrixView, equation: str) -> Form:
  """Returns where an einsum puts the axes of its second operand."""
  found = re.fullmatch(
    r"(?:\.\.\.)?(\w+),(\w+)->(?:\.\.\.)?\w+", equation.replace(" ", "")
  )
  if not found or len(found[2]) > view.axes:
    raise ValueError(
      f"{equation!r} is no einsum of two operands, the second with the "
      f"{view.axes} axes of {path}, such as 'BTD,DNH->BTNH'."
    )
  repeated = view.batch[: view.axes - len(found[2])]
  axes = [at for at in range(view.axes) if at not in repeated]
  letters = dict(zip(axes, found[2], strict=False))
  in_a = tuple(at for at, letter in letters.items() if letter in found[1])
  in_b = tuple(at for at in letters if at not in in_a)
  if len(axes) != len(found[2]) or not (
    set(view.inputs) <= set(in_a) and set(view.outputs) <= set(in_b)
  ):
    raise ValueError(
      f"{equation!r} sums over or repeats the axes {in_a} of {path}, its view "
      f"sums over {view.inputs}, writes {view.outputs} and repeats "
      f"{view.batch}; one of them is wrong."
    )
  return Form(repeated, in_a, in_b)


def forms_of(view: MatrixView) -> Iterator[Form]:
  """Yields the ways in which the factors of a weight can lie.

  Args:
    view: its axes' roles.
  """
  inputs, outputs = _sorted(view.inputs), _sorted(view.outputs)
  found = [
    kept_form(view),
    Form(view.batch, view.inputs, view.outputs, is_flat=True),
  ]
  for count in range(len(view.batch)):
    repeated, spread = view.batch[:count], view.batch[count:]
    found.append(Form(repeated, inputs, _sorted((*outputs, *spread))))
    found.append(Form(repeated, _sorted((*inputs, *spread)), outputs))
  yield from (form for form in found if form.has_room)


def ways_to_read(
  pair: tuple[Shape, Shape], readings: Iterable[MatrixView], weight: Shape
) -> list[tuple[MatrixView, Form]]:
  """Returns the views of a weight beside which two factors' shapes are right.

  Args:
    pair: shapes of both factors.
    readings: how the weight's name says that it can be read.
    weight: its shape.

  Returns:
    [(view, form)] of the readings; where none is right, of all the views
    without batch axes that are. Of those that give the same tensor one is
    there.

  Example:
    >>> ways_to_read(((12, 3), (3, 2, 4)), [MatrixView((), (0,), (1, 2))],
    ...              (2, 12, 4))
    [(MatrixView(batch=(), inputs=(1,), outputs=(0, 2)),
      Form(repeated=(), in_a=(1,), in_b=(0, 2), is_flat=False))]
  """
  for views in (readings, _splits(len(weight))):
    found: dict[tuple, tuple[MatrixView, Form]] = {}
    for view in views:
      for form in forms_of(view) if view.inputs and view.outputs else ():
        if fits(pair, form, weight):
          same = form.repeated, _sorted(form.in_a), _sorted(form.in_b)
          found.setdefault(same, (view, form))
    if found:
      return [*found.values()]
  return []


def _splits(count: int) -> Iterator[MatrixView]:
  """Yields all views of so many axes without batch axes."""
  for chosen in itertools.product((True, False), repeat=count):
    inputs = tuple(at for at in range(count) if chosen[at])
    outputs = tuple(at for at in range(count) if not chosen[at])
    yield MatrixView((), inputs, outputs)


def stored(lora: Lora, view: MatrixView, form: Form, weight: Shape) -> Pair:
  """Lays the factors of a Lora as a library keeps them, the scale in b.

  A batch axis that one factor alone has makes the rank larger: that factor
  gets a block for each of its indices, and the other all of them.

  Args:
    lora: a (*batch, r, in), b (*batch, r, out).
    view: the weight's axes' roles.
    form: where they go.
    weight: its shape.

  Returns:
    Two float32 arrays of `form.shapes(weight, rank)`.

  Example:
    >>> ones = np.ones(2, np.float32)
    >>> lora = Lora(np.ones((2, 1, 3)), np.ones((2, 1, 4)), ones)
    >>> view = MatrixView((0,), (1,), (2,))
    >>> for form in forms_of(view):
    ...   print(*(x.shape for x in stored(lora, view, form, (2, 3, 4))))
    (2, 3, 1) (2, 1, 4)
    (2, 3, 1) (2, 1, 4)
    (3, 2) (2, 2, 4)
    (2, 3, 2) (2, 4)
  """
  a, b, scale = (
    np.asarray(x, np.float32) for x in (lora.a, lora.b, lora.scale)
  )
  b = scale[..., None, None] * b
  sizes = [weight[at] for at in view.batch]
  a = a.reshape(*sizes, -1, *(weight[at] for at in view.inputs))
  b = b.reshape(*sizes, -1, *(weight[at] for at in view.outputs))
  r = -1  # stands for the rank among the axes
  one, two = [*view.batch, r, *view.inputs], [*view.batch, r, *view.outputs]
  spread = [at for at in view.batch if at not in form.repeated]
  for at in spread:
    a, one = _spread(a, one, at, at in form.in_a)
    b, two = _spread(b, two, at, at in form.in_b)
  repeated = _sorted(form.repeated)
  a = a.transpose([one.index(x) for x in (*repeated, *form.in_a, r)])
  b = b.transpose([two.index(x) for x in (*repeated, r, *form.in_b)])
  stack = [weight[at] for at in repeated]
  if form.is_flat:
    a = a.reshape(*stack, -1, a.shape[-1])
    b = b.reshape(*stack, b.shape[len(stack)], -1)
  return _placed(a, repeated), _placed(b, repeated)


def _spread(
  x: np.ndarray, axes: list[int], at: int, is_own: bool
) -> tuple[np.ndarray, list[int]]:
  """Makes a batch axis a part of the rank; a factor that has it gets blocks."""
  place = axes.index(at)
  x = np.moveaxis(x, place, 0)
  rest = [axis for axis in axes if axis != at]
  r = rest.index(-1)
  if is_own:
    blocks = np.zeros((len(x), *x.shape), x.dtype)
    blocks[np.arange(len(x)), np.arange(len(x))] = x
    x = np.moveaxis(blocks, 0, r + 1)  # (own, ..., blocks, r, ...)
    shape = (*x.shape[: r + 1], -1, *x.shape[r + 3 :])
    return x.reshape(shape), [at, *rest]
  x = np.moveaxis(x, 0, r)
  return x.reshape(*x.shape[:r], -1, *x.shape[r + 2 :]), rest


def _placed(x: np.ndarray, repeated: Iterable[int]) -> np.ndarray:
  """Moves the leading axes of a stack to where the weight has them."""
  repeated = list(repeated)
  for count in range(len(repeated) - 1, -1, -1):
    # The outer axes stay in front until it is their turn.
    x = np.moveaxis(x, count, repeated[count])
  return np.ascontiguousarray(x)


def read(pair: Pair, view: MatrixView, form: Form, weight: Shape) -> Pair:
  """Reverts `stored`: the factors of a Lora, without a scale.

  Args:
    pair: both stored factors.
    view: the weight's axes' roles.
    form: where they lie.
    weight: its shape.

  Returns:
    a (*batch, r, in) and b (*batch, r, out), in their dtype. A batch axis that
    one factor alone has is repeated in the other.

  Example:
    >>> view, weight = MatrixView((0,), (1,), (2,)), (2, 3, 4)
    >>> form = [*forms_of(view)][2]
    >>> a, b = read((np.ones((3, 2)), np.ones((2, 2, 4))), view, form, weight)
    >>> a.shape, b.shape
    ((2, 2, 3), (2, 2, 4))
  """
  repeated = _sorted(form.repeated)
  found = []
  for x, own, wanted, is_a in (
    (pair[0], form.in_a, view.inputs, True),
    (pair[1], form.in_b, view.outputs, False),
  ):
    for count, at in enumerate(repeated):
      x = np.moveaxis(x, at, count)
    lead = len(repeated)
    rank = x.shape[-1] if is_a else x.shape[lead]
    x = np.moveaxis(x, -1, lead) if is_a else x
    sizes = [weight[at] for at in own]
    x = x.reshape(*x.shape[:lead], rank, *sizes)
    axes = [*repeated, -1, *own]
    for at in view.batch:
      if at not in axes:
        x, axes = np.broadcast_to(x, (weight[at], *x.shape)), [at, *axes]
    x = x.transpose([axes.index(at) for at in (*view.batch, -1, *wanted)])
    batch = [weight[at] for at in view.batch]
    found.append(np.ascontiguousarray(x).reshape(*batch, rank, -1))
  return found[0], found[1]


def read_alone(path: str, a: Shape, b: Shape) -> tuple[MatrixView, Form, Shape]:
  """Returns how two factors are read without their weight.

  Args:
    path: the parameter's name.
    a: shape of the first factor.
    b: of the second.

  Returns:
    A view, a form, and the shape of a weight of the axes that both factors
    have; it may have them in another order than the model's own.

  Raises:
    ValueError: no rank in common, or a stack and an einsum can both be meant.

  Example:
    >>> read_alone("o/w", (2, 4, 3), (3, 8))[2]
    (2, 4, 8)
  """
  rank, n_a, n_b = a[-1] if a else 0, len(a) - 1, len(b) - 1
  is_plain = min(n_a, n_b) >= 1 and b[0] == rank
  is_stack = min(n_a, n_b) >= 2 and a[0] == b[0] and b[1] == rank
  if is_plain and not (n_a >= 2 and n_b >= 2):
    inputs = tuple(range(n_a))
    outputs = tuple(range(n_a, n_a + n_b))
    return (
      MatrixView((), inputs, outputs), Form((), inputs, outputs),
      (*a[:-1], *b[1:]),
    )  # fmt: skip
  if is_stack and not is_plain:
    inputs = tuple(range(1, n_a))
    outputs = tuple(range(n_a, n_a + n_b - 1))
    view = MatrixView((0,), inputs, outputs)
    return view, Form((0,), inputs, outputs), (*a[:-1], *b[2:])
  if is_plain:
    raise ValueError(
      f"the factors of {path}, {a} and {b}, can be those of a stack of layers "
      "or of one einsum; give the base, whose shapes tell."
    )
  raise ValueError(
    f"the factors of {path} have different ranks: a {a}, b {b}; the file is "
    "damaged."
  )


def equation_for(path: str, equations: Mapping[str, str] | None) -> str | None:
  """Returns the equation of the first pattern that is a path's.

  Args:
    path: the parameter's name.
    equations: regex of whole names -> equation or "dot".
  """
  for pattern, equation in (equations or {}).items():
    if re.fullmatch(pattern, path):
      return equation
  return None


def plain_name(path: str) -> str:
  """Returns a parameter's name without what containers add.

  Args:
    path: of a leaf of an orbax checkpoint of linen or NNX.

  Example:
    >>> plain_name("params/params/decoder/q/kernel")
    'decoder/q/kernel'
    >>> plain_name("layers/0/q/kernel/value")
    'layers/0/q/kernel'
  """
  return re.sub(r"^(params/)+", "", path).removesuffix("/value")


def _sorted(axes: Iterable[int]) -> tuple[int, ...]:
  """Returns axes in the weight's order."""
  return tuple(sorted(axes))


def fits(pair: tuple[Shape, Shape], form: Form, weight: Shape) -> bool:
  """Returns whether two factors' shapes are those of a form.

  Args:
    pair: shapes of both factors.
    form: where a weight's axes go.
    weight: its shape.

  Example:
    >>> form = Form((), (0, 1), (2,))
    >>> fits(((2, 4, 3), (3, 8)), form, (2, 4, 8))
    True
  """
  rank = math.prod(pair[0]) // max(1, math.prod(form.shapes(weight, 1)[0]))
  return form.shapes(weight, rank) == pair
