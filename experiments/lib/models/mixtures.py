# SPDX-License-Identifier: Apache-2.0
"""Mixes two finetunes' MLPs; measures where the routers send tokens."""

import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora
from experiments.lib.models import finetunes
from experiments.lib.models.skills import TITLES, Skills
from jlora import models
from jlora.paths import flatten

_MLP = re.compile(r"layers/(\d+)/mlp/.*")
_READ = "layers/{}/mlp/gate/kernel"  # has the same input as a router


class Mixture(NamedTuple):
  """A row of the table: how a mixture is made.

  Attributes:
    setting: in words.
    averaged: whether attention, norms and embedding are the finetunes' mean;
      else they are the base's.
    route: (base's model, the rest's parameters, found) -> {layer: (2, d)}.
    chosen: MLPs that a token goes through.
  """

  setting: str
  averaged: bool
  route: Callable[[Any, Any, Skills], dict[int, np.ndarray]]
  chosen: int


def by_states(apply: Any, params: Any, found: Skills) -> dict[int, np.ndarray]:
  """Makes routers along the mean hidden states of the training texts.

  Args:
    apply: the model that the mixture's rest is of.
    params: its parameters.
    found: has the texts, one for each expert.

  Returns:
    layer -> (experts, d).
  """
  paths = [_READ.format(i) for i in range(_depth(found))]
  states = [
    jlora.factoring.dense_inputs(apply, params, tokens[:, :-1], paths)
    for tokens in found.train.values()
  ]
  return {
    i: jlora.routing.router_rows([_as_rows(one[path]) for one in states])
    for i, path in enumerate(paths)
  }


def at_random(_: Any, params: Any, found: Skills) -> dict[int, np.ndarray]:
  """Makes routers of random directions, others in each layer."""
  d = flatten(params)[_READ.format(0)].shape[0]
  keys = jax.random.split(jax.random.key(0), _depth(found))
  count = len(found.finetuned)
  return {
    i: jlora.routing.random_rows(key, count, d) for i, key in enumerate(keys)
  }


def of_equal_shares(_: Any, params: Any, found: Skills) -> dict[int, Any]:
  """Makes routers of zeros: every expert has the same gate."""
  d = flatten(params)[_READ.format(0)].shape[0]
  zeros = np.zeros((len(found.finetuned), d), np.float32)
  return dict.fromkeys(range(_depth(found)), zeros)


#: With the base's attention, norms and embedding, or the finetunes' mean ones.
MIXTURES = (
  Mixture("MLPs alone, by states, top 1", False, by_states, 1),
  Mixture("MLPs alone, by states, both", False, by_states, 2),
  Mixture("MLPs alone, at random, top 1", False, at_random, 1),
  Mixture("MLPs alone, at random, both", False, at_random, 2),
  Mixture("MLPs alone, equal shares", False, of_equal_shares, 2),
  Mixture("rest averaged, by states, top 1", True, by_states, 1),
  Mixture("rest averaged, by states, both", True, by_states, 2),
  Mixture("rest averaged, equal shares", True, of_equal_shares, 2),
)


def mixtures_of(found: Skills) -> Iterator[tuple[str, Callable[[], Any]]]:
  """Yields the rows: (setting, function that makes it)."""
  for one in MIXTURES:
    yield one.setting, lambda x=one: mix(x, found)


def mix(one: Mixture, found: Skills) -> tuple[models.Model, Any]:
  """Makes a mixture's model and parameters, through the folder users write.

  Args:
    one: which.
    found: base and finetunes, in their folders too.

  Returns:
    `apply(params, tokens) -> logits` and params, as `models.load` gives them.
  """
  apply = models.load(found.folders["base"])[0]
  rest = found.base
  experts = [jlora.open_checkpoint(found.folders[name]) for name in TITLES]
  with tempfile.TemporaryDirectory() as work:
    folder = found.folders["base"]
    if one.averaged:
      rest = jlora.merge(
        list(found.finetuned.values()), method=jlora.merging.linear
      )
      folder = models.save(f"{work}/rest", rest, found.config)
    jlora.routing.save_mixture(
      f"{work}/mixture",
      jlora.open_checkpoint(folder),
      experts,
      one.route(apply, rest, found),
      chosen=one.chosen,
    )
    return models.load(pathlib.Path(work, "mixture"))


def routed(
  apply: finetunes.Apply, params: Any, held_out: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Measures how much of each text its own expert has the larger score for.

  Args:
    apply: a mixture.
    params: its parameters.
    held_out: text -> (rows, time + 1) int32, in the order of the two experts.

  Returns:
    text -> share of tokens, the mean over layers; a tie counts half.
  """
  flat = flatten(params)
  paths = [path for path in flat if path.endswith("moe/router/kernel")]
  found = {}
  for i, (name, tokens) in enumerate(held_out.items()):
    states = jlora.factoring.dense_inputs(apply, params, tokens[:, :-1], paths)
    scores = [states[path] @ flat[path] for path in paths]
    ahead = [x[..., i] - x[..., 1 - i] for x in scores]
    found[name] = float(np.mean(np.heaviside(ahead, 0.5)))
  return found


def with_mlps_of(base: Any, tree: Any) -> Any:
  """Gives the base another model's MLPs: what a perfect router would choose.

  Args:
    base: parameters.
    tree: of the same paths.

  Returns:
    A tree like the base's.

  Example:
    >>> base = {"layers": {"0": {"mlp": {"up": 1}, "attn": 2}}}
    >>> with_mlps_of(base, {"layers": {"0": {"mlp": {"up": 3}, "attn": 4}}})
    {'layers': {'0': {'attn': 2, 'mlp': {'up': 3}}}}
  """
  taken = flatten(tree)
  return jax.tree_util.tree_map_with_path(
    lambda keys, leaf: (
      taken[path]
      if _MLP.fullmatch(path := "/".join(key.key for key in keys))
      else leaf
    ),
    base,
  )


def _depth(found: Skills) -> int:
  """Returns the number of layers."""
  return int(found.config["num_hidden_layers"])


def _as_rows(x: Any) -> np.ndarray:
  """Flattens all but the last axis."""
  return np.asarray(x).reshape(-1, x.shape[-1])
