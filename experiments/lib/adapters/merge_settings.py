# SPDX-License-Identifier: Apache-2.0
"""Lists the merges that `merge_skills` measures, and their settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jlora
from jlora.merging import by_mass


class Merge(NamedTuple):
  """A row of the table of merges: a method and its settings.

  Attributes:
    method: its name.
    setting: the settings in words.
    call: a method of `jlora.merging`.
    weights: of the Bible's finetune and of pydoc's.
    options: further arguments of the call.
  """

  method: str
  setting: str
  call: Callable[..., Any]
  weights: Sequence[float] = (1.0, 1.0)
  options: Mapping[str, Any] = {}


_HALF = {"scale": 0.5}
_MASS = {"elect": by_mass, "normalize": True}
#: Merges of whole checkpoints, given the base.
WHOLE = (
  Merge("linear", "plain average", jlora.merging.linear),
  Merge("linear", "1 : 3", jlora.merging.linear, (1, 3)),
  Merge("task_arithmetic", "λ 0.7", jlora.merging.task_arithmetic,
        options={"scale": 0.7}),
  Merge("task_arithmetic", "λ 1", jlora.merging.task_arithmetic),
  Merge("slerp", "t 0.5, of models", jlora.merging.slerp),
  Merge("nuslerp", "1 : 1, of changes", jlora.merging.nuslerp),
  Merge("multislerp", "1 : 1, of changes", jlora.merging.multislerp),
  Merge("karcher", "1 : 1, of changes", jlora.merging.karcher),
  Merge("ties", "density 0.2", jlora.merging.ties),
  Merge("ties", "density 1", jlora.merging.ties, options={"density": 1.0}),
  Merge("dare", "density 0.5, λ 0.5", jlora.merging.dare,
        options={"density": 0.5, **_HALF}),
  Merge("dare_ties", "density 0.5", jlora.merging.dare,
        options={"density": 0.5, **_MASS}),
  Merge("della", "density 0.8", jlora.merging.della, options={"density": 0.8}),
  Merge("breadcrumbs", "density 0.9, λ 0.5", jlora.merging.breadcrumbs,
        options={"density": 0.9, **_HALF}),
  Merge("sce", "density 1", jlora.merging.sce),
  Merge("model_stock", "", jlora.merging.model_stock),
)  # fmt: skip
#: One finetune alone, its change scaled down.
SHRUNK = (
  Merge(
    "shrunk",
    "the Bible's alone, λ 0.5",
    jlora.merging.task_arithmetic,
    (0.5, 0),
  ),
  Merge(
    "shrunk",
    "the Bible's alone, λ 0.3",
    jlora.merging.task_arithmetic,
    (0.3, 0),
  ),
  Merge(
    "shrunk", "pydoc's alone, λ 0.7", jlora.merging.task_arithmetic, (0, 0.7)
  ),
  Merge(
    "shrunk", "pydoc's alone, λ 0.5", jlora.merging.task_arithmetic, (0, 0.5)
  ),
)
#: pydoc's finetune moved towards the Bible's, each entry by about t at most.
NEAR = tuple(
  Merge("nearswap", f"t {t:g}", jlora.merging.nearswap, (1,), {"t": t})
  for t in (1e-3, 3e-4)
)
#: Merges of adapters.
LOW_RANK = (
  Merge("concat", "the Bible's alone", jlora.merging.concat, (1, 0)),
  Merge("concat", "pydoc's alone", jlora.merging.concat, (0, 1)),
  Merge("concat", "λ 0.5", jlora.merging.concat, (0.5, 0.5)),
  Merge("concat", "λ 1", jlora.merging.concat),
  Merge("svd_merge", "rank 64, λ 0.5", jlora.merging.svd_merge, (0.5, 0.5),
        {"rank": 64}),
  Merge("core_space(ties)", "density 0.5", jlora.merging.core_space,
        options={"method": jlora.merging.ties, "density": 0.5}),
  Merge("core_space(tsv)", "λ 0.7", jlora.merging.core_space,
        options={"method": jlora.merging.tsv, "scale": 0.7}),
  Merge("core_space(iso_c)", "λ 0.5", jlora.merging.core_space,
        options={"method": jlora.merging.iso_c, **_HALF}),
  Merge("knots", "ties, density 0.5", jlora.merging.knots,
        options={"density": 0.5}),
)  # fmt: skip
#: Merges of random adapters in place of both.
RANDOM = (
  Merge("random", "as the Bible's alone", jlora.merging.concat, (1, 0)),
  Merge("random", "as pydoc's alone", jlora.merging.concat, (0, 1)),
  Merge("random", "both, λ 1", jlora.merging.concat),
)
