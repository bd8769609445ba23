# SPDX-License-Identifier: Apache-2.0
"""Changes kept as LoRA, Tucker, LoHa, LoKr or DoRA, each as a pair of factors.

Tools keep a change `W' - W` of a weight (out, in, *kernel) as products of small
tensors. All but DoRA are exactly a LoRA of a rank that the shapes tell. Every
function here takes the stored tensors by their role and returns A (r, in·k) and
B (out, r), whose product B A is the change before it is scaled.

References:
  KohakuBlueleaf/LyCORIS, `lycoris/modules/{loha,lokr,locon}.py`;
  Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.factoring.factorisers import recompress

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Pair = tuple[np.ndarray, np.ndarray]

#: Roles of DoRA's magnitudes: PEFT's, and LyCORIS' and kohya's.
MAGNITUDES = ("magnitude", "dora_scale")


class Form(NamedTuple):
  """One way of keeping a change.

  Attributes:
    name: what users call it.
    roles: alternatives for each part: a set of roles of which one must be there
      whole.
    optional: further roles.
    rank: the role and axis whose length divides alpha; of several the first
      that is stored. None stored: alpha has no effect.
    shape: shapes by role -> the shape of the weight (out, in, *kernel).
    pair: tensors by role -> A and B.
  """

  name: str
  roles: tuple[tuple[tuple[str, ...], ...], ...]
  optional: frozenset[str]
  rank: tuple[tuple[str, int], ...]
  shape: Callable[[Shapes], tuple[int, ...]]
  pair: Callable[[Tensors], Pair]

  @property
  def every(self) -> frozenset[str]:
    """Returns all roles that the form knows."""
    needed = {role for part in self.roles for way in part for role in way}
    return frozenset(needed) | self.optional


def plain_pair(tensors: Tensors) -> Pair:
  """Returns A and B of a LoRA; Tucker's middle factor goes into A.

      up · mid · down  =  up · (Σ_s mid[:, s] down[s])

  Args:
    tensors: `down` (r, in, *k), `up` (out, r, *1); with `mid` (r, r, *k) `down`
      is (r, in, *1).

  Returns:
    A (r, in·k), B (out, r).
  """
  down, up = tensors["down"], tensors["up"]
  if "mid" in tensors:
    down = _through(tensors["mid"], flat(down))
  return flat(down), flat(up)


def loha_pair(tensors: Tensors) -> Pair:
  """Returns A and B of LoHa, of rank r².

      (w1a w1b) ∘ (w2a w2b) = B A,
      A[(p, q)] = w1b[p] ∘ w2b[q],   B[:, (p, q)] = w1a[:, p] ∘ w2a[:, q]

  Args:
    tensors: `hada_w1_a` (out, r), `hada_w1_b` (r, in·k), and of 2; or with
      `hada_t1` (r, r, *k): `hada_w1_a` (r, out), `hada_w1_b` (r, in).

  Returns:
    A (r², in·k), B (out, r²).
  """
  (a1, b1), (a2, b2) = (_hadamard_side(tensors, side) for side in "12")
  a = np.einsum("pi,qi->pqi", a1, a2).reshape(-1, a1.shape[1])
  b = np.einsum("op,oq->opq", b1, b2).reshape(len(b1), -1)
  return a, b


def _hadamard_side(tensors: Tensors, side: str) -> Pair:
  """Returns one of LoHa's two products as A and B."""
  b, a = tensors[f"hada_w{side}_a"], tensors[f"hada_w{side}_b"]
  core = tensors.get(f"hada_t{side}")
  return (a, b) if core is None else (flat(_through(core, a)), b.T)


def lokr_pair(tensors: Tensors) -> Pair:
  """Returns A and B of LoKr, of rank rank(w1) · rank(w2).

      w1 ⊗ w2 = B A,   w1 = u σ vᵀ,   A = vᵀ ⊗ A2,   B = u σ ⊗ B2

  Args:
    tensors: `lokr_w1`, or its factors `lokr_w1_a` (out1, r), `lokr_w1_b`; and
      `lokr_w2` (out2, in2, *k), or its factors, or with `lokr_t2` (r, r, *k)
      `lokr_w2_a` (r, out2), `lokr_w2_b` (r, in2).

  Returns:
    A (rank, in1·in2·k), B (out1·out2, rank).
  """
  w1, most = _kronecker_left(tensors)
  u, s, vt = np.linalg.svd(w1, full_matrices=False)
  u, s, vt = u[:, :most], s[:most], vt[:most]
  a2, b2 = _kronecker_right(tensors)
  return np.kron(vt, a2), np.kron(u * s, b2)


def _kronecker_left(tensors: Tensors) -> tuple[np.ndarray, int]:
  """Returns w1 and the largest rank it can have."""
  if "lokr_w1" in tensors:
    w1 = flat(tensors["lokr_w1"])
    return w1, min(w1.shape)
  a, b = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
  return a @ b, min(len(b), len(a), b.shape[1])


def _kronecker_right(tensors: Tensors) -> Pair:
  """Returns w2 as A and B."""
  if "lokr_w2" in tensors:
    w2 = flat(tensors["lokr_w2"])
    if w2.shape[0] <= w2.shape[1]:
      return w2, np.eye(len(w2), dtype=w2.dtype)
    return np.eye(w2.shape[1], dtype=w2.dtype), w2
  b, a = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
  if "lokr_t2" in tensors:
    return flat(_through(tensors["lokr_t2"], a)), b.T
  return flat(a), flat(b)


def _through(core: np.ndarray, down: np.ndarray) -> np.ndarray:
  """Contracts a Tucker core (r, s, *k) with (s, in): (r, in, *k)."""
  return np.einsum("rs...,si->ri...", core, down)


def flat(x: np.ndarray) -> np.ndarray:
  """Returns an array with all axes but the first as one."""
  return x.reshape(len(x), -1)


def dora_change(
  weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray, axis: int
) -> np.ndarray:
  """Computes what DoRA adds to a weight.

      m · (W + s B A) / ‖W + s B A‖ - W

  Args:
    weight: W (out, in, *k).
    change: s B A, of the same shape.
    magnitude: m, an entry for each output or input.
    axis: of the weight, along which the magnitudes lie.

  Returns:
    (out, in, *k) float64.
  """
  turned = weight.astype(np.float64) + change
  others = tuple(i for i in range(weight.ndim) if i != axis)
  norms = np.sqrt(np.sum(turned**2, axis=others, keepdims=True))
  m = magnitude.astype(np.float64).reshape(norms.shape)
  tiny = np.finfo(np.float64).tiny  # a row of zeros stays one
  return m * turned / np.maximum(norms, tiny) - weight


def magnitude_axis(
  role: str, stored: tuple[int, ...], weight: tuple[int, ...]
) -> int:
  """Returns the axis of a weight along which DoRA's magnitudes lie.

  Args:
    role: `magnitude` as PEFT has it, (out,) or (1, out, *1); `dora_scale` as
      LyCORIS and kohya have it, (out, 1, *1), in older files (1, in, *1).
    stored: shape of the magnitudes.
    weight: shape of the weight (out, in, *k).

  Raises:
    ValueError: they fit neither the outputs nor the inputs.
  """
  n_out, n_in = weight[:2]
  ones = (1,) * (len(weight) - 2)
  known = {
    "magnitude": {(n_out,): 0, (1, n_out, *ones): 0},
    "dora_scale": {(1, n_in, *ones): 1, (n_out,): 0, (n_out, 1, *ones): 0},
  }[role]
  if stored not in known:
    raise ValueError(
      f"DoRA's magnitudes {stored} fit neither the outputs nor the inputs of a "
      f"weight {weight}."
    )
  return known[stored]


def within(pair: Pair, most: int) -> Pair:
  """Reduces a pair to the rank that its product can have at most.

  Args:
    pair: A (k, in), B (out, k).
    most: a rank; the product's is no larger, or the best of that rank is taken.

  Returns:
    A (r, in), B (out, r), balanced, if k is larger than `most`; else as given.
  """
  a, b = pair
  if len(a) <= most:
    return a, b
  kept = recompress(a, b.T, most)
  root = np.sqrt(np.asarray(kept.s))[:, None]
  left, right = np.asarray(kept.u), np.asarray(kept.vt)
  return root * left.T, (root * right).T


def _plain_shape(shapes: Shapes) -> tuple[int, ...]:
  """Returns (out, in, *k) of a LoRA."""
  kernel = shapes.get("mid", shapes["down"])[2:]
  return (shapes["up"][0], shapes["down"][1], *kernel)


def _loha_shape(shapes: Shapes) -> tuple[int, ...]:
  """Returns (out, in, *k) of LoHa; without a core the kernel is in `in`."""
  if "hada_t1" in shapes:
    core = shapes["hada_t1"]
    return (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *core[2:])
  return (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])


def _lokr_shape(shapes: Shapes) -> tuple[int, ...]:
  """Returns (out, in, *k) of LoKr."""
  if "lokr_w1" in shapes:
    left = shapes["lokr_w1"][:2]
  else:
    left = (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
  if "lokr_w2" in shapes:
    right = shapes["lokr_w2"]
  elif "lokr_t2" in shapes:
    core = shapes["lokr_t2"]
    right = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *core[2:])
  else:
    right = (shapes["lokr_w2_a"][0], math.prod(shapes["lokr_w2_b"][1:]))
  return (left[0] * right[0], left[1] * right[1], *right[2:])


class Inner(NamedTuple):
  """Two axes that a product sums over, or that a change has from both.

  Attributes:
    first: role and axis.
    second: role and axis.
    core: of the form, a tensor with a kernel between the factors.
    has_core: whether this holds where that is stored, or where it is not.
  """

  first: tuple[str, int]
  second: tuple[str, int]
  core: str = ""
  has_core: bool = False


#: What must be equal, of the roles that are stored.
INNER = (
  Inner(("down", 0), ("up", 1), "mid"),
  Inner(("up", 1), ("mid", 0), "mid", True),
  Inner(("down", 0), ("mid", 1), "mid", True),
  *(
    row
    for i in "12"
    for row in (
      Inner((f"hada_w{i}_a", 1), (f"hada_w{i}_b", 0), f"hada_t{i}"),
      Inner((f"hada_w{i}_a", 0), (f"hada_t{i}", 0), f"hada_t{i}", True),
      Inner((f"hada_w{i}_b", 0), (f"hada_t{i}", 1), f"hada_t{i}", True),
      Inner((f"lokr_w{i}_a", 1), (f"lokr_w{i}_b", 0), f"lokr_t{i}"),
      Inner((f"lokr_w{i}_a", 0), (f"lokr_t{i}", 0), f"lokr_t{i}", True),
      Inner((f"lokr_w{i}_b", 0), (f"lokr_t{i}", 1), f"lokr_t{i}", True),
    )
  ),
  Inner(("hada_w1_a", 0), ("hada_w2_a", 0), "hada_t1"),
  Inner(("hada_w1_a", 1), ("hada_w2_a", 1), "hada_t1", True),
  Inner(("hada_w1_b", 1), ("hada_w2_b", 1)),
)


def differing_axes(shapes: Shapes) -> list[str]:
  """Lists the axes of a module's factors that should be equal and are not.

  Args:
    shapes: by role.

  Returns:
    Such as "up (8, 2), down (3, 8)".

  Raises:
    IndexError: a tensor with too few axes.
  """
  return [
    f"{row.first[0]} {shapes[row.first[0]]}, "
    f"{row.second[0]} {shapes[row.second[0]]}"
    for row in INNER
    if row.first[0] in shapes and row.second[0] in shapes
    if (row.core in shapes) == row.has_core
    if shapes[row.first[0]][row.first[1]]
    != shapes[row.second[0]][row.second[1]]
  ]


LORA = Form(
  "LoRA",
  ((("down",),), (("up",),)),
  frozenset({"mid", "alpha", "bias", *MAGNITUDES}),
  (("down", 0),),
  _plain_shape,
  plain_pair,
)
LOHA = Form(
  "LoHa",
  tuple(((f"hada_w{i}_{j}",),) for i in "12" for j in "ab"),
  frozenset({"hada_t1", "hada_t2", "alpha", *MAGNITUDES}),
  (("hada_w1_b", 0),),
  _loha_shape,
  loha_pair,
)
LOKR = Form(
  "LoKr",
  tuple(((f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")) for i in "12"),
  frozenset({"lokr_t2", "alpha", *MAGNITUDES}),
  (("lokr_w1_b", 0), ("lokr_w2_b", 0)),
  _lokr_shape,
  lokr_pair,
)
FORMS = (LORA, LOHA, LOKR)


def form_of(roles: Any) -> Form | None:
  """Returns the form that some roles belong to; None if they have none.

  Args:
    roles: names of the stored tensors of one module.
  """
  found = set(roles)
  for form in FORMS:
    if found & (form.every - {"alpha", *MAGNITUDES}):
      return form
  return None


def missing_roles(form: Form, roles: Any) -> list[str]:
  """Lists the roles that a form needs and a module lacks.

  Args:
    form: the module's.
    roles: names of its stored tensors.
  """
  return [
    " or ".join("+".join(way) for way in part)
    for part in form.roles
    if not any(set(way) <= set(roles) for way in part)
  ]
