# SPDX-License-Identifier: Apache-2.0
"""Layouts: sizes are told by the axes; what cannot be matched is refused."""

import numpy as np
import pytest

from jlora.alignment.layouts import lay_out_units
from jlora.alignment.symmetries import Row, Symmetry, chain, decoder
from jlora.paths import flatten
from tests.helpers.unit_orders import network


def shapes(**given):
  return {path: np.empty(shape) for path, shape in given.items()}


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("mlp", {"unit.0": 12, "unit.1": 13}),
    ("convolutions", {"unit.0": 6, "unit.1": 7, "unit.2": 8}),
    ("llama", {"stream": 24, "kv.0": 2, "group.1": 2, "value.1": 6,
               "unit.0": 20}),
    ("one key head", {"kv.0": 1, "group.0": 4, "value.0": 6}),
    ("mixtral", {"expert.0": 3, "inner.0": 20}),
    ("gpt2", {"head.0": 3, "key.0": 8, "value.0": 8, "unit.0": 96}),
  ],
)  # fmt: skip
def test_sizes_are_those_of_the_axes(name, expected):
  _, params, _, symmetry = network(name, 0)
  layout = lay_out_units(symmetry, flatten(params))
  assert expected.items() <= layout.sizes.items()
  families = layout.families()
  assert set(families) == set(layout.sizes) - set(layout.outer)


def test_a_parameter_without_a_row_is_named():
  with pytest.raises(ValueError, match=r"1 parameters have no row.*v \(2, 3\)"):
    lay_out_units(chain(["w"]), shapes(v=(2, 3), **{"w/kernel": (1, 1)}))


@pytest.mark.parametrize(
  ("axes", "shape"),
  [("u, u", (3, 3)), ("u u, -", (9, 2)), ("u, u + u", (2, 4))],
)
def test_no_permutation_sits_twice_on_an_array(axes, shape):
  symmetry = Symmetry((Row("w", axes),), {}, {"u": shape[0]})
  with pytest.raises(ValueError, match="act twice on one array: u in w"):
    lay_out_units(symmetry, shapes(w=shape))


def test_sizes_that_differ_are_named_with_both():
  with pytest.raises(ValueError, match="b/kernel: unit.0 is 4, the axis has 5"):
    lay_out_units(
      chain(["a", "b"]), shapes(**{"a/kernel": (3, 4), "b/kernel": (5, 2)})
    )
  _, params, _, _ = network("llama", 0)
  with pytest.raises(ValueError, match="sizes do not agree"):
    lay_out_units(decoder(3), flatten(params))
  with pytest.raises(ValueError, match="not told: u.*Give sizes"):
    lay_out_units(Symmetry((Row("w", "u v"),)), shapes(w=(6,)))


def test_what_is_inside_needs_the_other_there():
  rows = Row("w", "head, value"), Row("v", "head value")
  with pytest.raises(ValueError, match="does not act on the same axis: value"):
    lay_out_units(
      Symmetry(rows, {"value": "head"}, {"head": 2}), shapes(w=(2, 3), v=(6,))
    )
  with pytest.raises(ValueError, match="one level is all there is"):
    lay_out_units(
      Symmetry(rows, {"value": "head", "head": "x"}), shapes(w=(2, 3))
    )


def test_stacks_are_whole():
  rows = (Row(r"e/(\d+)", "-", "expert"),)
  found = lay_out_units(Symmetry(rows), shapes(**{"e/0": (2,), "e/1": (2,)}))
  assert found.sizes == {"expert": 2}
  with pytest.raises(
    ValueError, match=r"1 stacks lack arrays: e/\* \(\[0, 2\]"
  ):
    lay_out_units(Symmetry(rows), shapes(**{"e/0": (2,), "e/2": (2,)}))


def test_heads_and_layers_must_be_there():
  with pytest.raises(ValueError, match="3 key heads do not divide 4"):
    decoder(4, 3)
  with pytest.raises(ValueError, match="no such layers: c"):
    chain(["a", "b"], flattened=["c"])
