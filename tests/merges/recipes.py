# SPDX-License-Identifier: Apache-2.0
"""Recipes over all families, each with its result by `reference`.

`$` stands for the folder of the models o, a and b. A result is told tensor by
tensor: of which tensors it is made, and with what numbers.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.merges import reference

_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|block|layer)\.)(\d+)(\..+)")


class Case(NamedTuple):
  """A recipe for a family, and what its result is.

  Attributes:
    family: of `models.FAMILIES`.
    text: the recipe.
    want: (models, name) -> the tensor in float64.
    close: how far off, over the largest entry of the tensor.
    sample: whether it is tried at every commit.
  """

  family: str
  text: str
  want: Callable
  close: float = 3e-6
  sample: bool = False


def layer_of(name):
  """The number of a tensor's layer; None outside."""
  found = _LAYER.fullmatch(name)
  return int(found[2]) if found else None


def in_layer(name, number):
  """The name of the same tensor in another layer."""
  found = _LAYER.fullmatch(name)
  return f"{found[1]}{number}{found[3]}"


def along(values, name, count):
  """A gradient's value at a tensor, of `count` layers."""
  at = layer_of(name)
  place = 0.0 if at is None else at / (count - 1)
  return float(np.interp(place, np.linspace(0, 1, len(values)), values))


def of(method, names, weights=None, base=None, **settings):
  """Merges tensors of the same name; settings may be functions of the name."""

  def want(models, name):
    stack = np.stack([models[one][name] for one in names])
    given = weights(name) if callable(weights) else weights
    given = np.ones(len(names)) if given is None else np.asarray(given)
    under = None if base is None else models[base][name]
    own = {k: v(name) if callable(v) else v for k, v in settings.items()}
    return method(stack, given, under, **own)

  return want


def from_layers(sources, merge=None):
  """Layers put together: of each new layer (models, their layers).

  Args:
    sources: (name of the one that is copied, its layer) for each new layer.
    merge: (models, name there, new name) -> array, instead of a copy.
  """

  def want(models, name):
    at = layer_of(name)
    model, layer = sources[at if at is not None else 0]
    if at is None and not re.search(r"embed|wte|wpe", name):
      model, layer = sources[-1]
    there = name if at is None else in_layer(name, layer)
    return models[model][there] if merge is None else merge(models, there, name)

  return want


def slices(*ranges):
  """The slices of a recipe that copies layers."""
  lines = [
    f"- sources: [{{model: $/{model}, layer_range: [{start}, {end}]}}]"
    for model, start, end in ranges
  ]
  taken = [(m, at) for m, start, end in ranges for at in range(start, end)]
  text = "merge_method: passthrough\nslices:\n" + "\n".join(lines) + "\n"
  return text, from_layers(taken)


def models_of(method, weights, more="", base=None):
  """A recipe of whole models with a number each."""
  lines = [
    f"- {{model: $/{name}, parameters: {{weight: {weight}}}}}"
    for name, weight in weights.items()
  ]
  head = f"merge_method: {method}\n"
  head += f"base_model: $/{base}\n" if base else ""
  return head + "models:\n" + "\n".join(lines) + "\n" + more


TWO = {"a": 0.7, "b": 0.3}
SHARES = [0.7, 0.3]
BETWEEN = "models: [{model: $/a}, {model: $/b}]\n"
CLASSIC = """
merge_method: slerp
base_model: $/a
slices:
- sources:
  - {model: $/a, layer_range: [0, 4]}
  - {model: $/b, layer_range: [0, 4]}
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
"""


def classic(name):
  """The numbers of that recipe."""
  if "self_attn" in name:
    return along([0, 0.5, 0.3, 0.7, 1], name, 4)
  return along([1, 0.5, 0.7, 0.3, 0], name, 4) if "mlp" in name else 0.5


def ramp(name, count=4):
  """Weights 0 to 1 of a, and 0.5 of b."""
  return [along([0, 1], name, count), 0.5]


def t5_ramp(name):
  """Along the encoder's three layers, and along the decoder's two."""
  return ramp(name, 3 if name.startswith("encoder") else 2)


def bart_ramp(name):
  """Along the encoder's two layers, and along the decoder's three."""
  return ramp(name, 2 if ".encoder." in name else 3)


def gemma3_ramp(name):
  """Along the vision tower's two layers, and along the decoder's four."""
  return ramp(name, 2 if "vision" in name else 4)


SUM = "parameters: {normalize: false}\n"
RAMP = {"a": [0, 1], "b": 0.5}
SLICED_CHANGES = """
merge_method: task_arithmetic
base_model: $/o
slices:
- sources:
  - {model: $/o, layer_range: [0, 3]}
  - {model: $/a, layer_range: [0, 3], parameters: {weight: [0.2, 1.0]}}
- sources:
  - {model: $/o, layer_range: [1, 4]}
  - model: $/a
    layer_range: [1, 4]
    parameters: {weight: [{filter: layers.3., value: 2.0}, {value: 0.5}]}
"""


def sliced_changes(models, there, name):
  """The merge of that recipe; `there` is the name in the models."""
  at = layer_of(name)
  if at is None:
    weight = 0.2 if "embed" in name else 0.5
  elif at < 3:
    weight = 0.2 + 0.4 * at
  else:
    weight = 2.0 if layer_of(there) == 3 else 0.5
  base = models["o"][there]
  return base + weight * (models["a"][there] - base)


def of_experts(name):
  """Weights of a filter on experts."""
  return [2.0 if "experts" in name else 0.5, 1.0]


FILTERED = """
merge_method: ties
base_model: $/o
models:
- model: $/a
  parameters:
    weight: [{filter: experts, value: 2.0}, {value: 0.5}]
    density: 0.6
- {model: $/b, parameters: {weight: 1, density: 0.6}}
"""
ADD, TRIM = reference.added, reference.ties

CASES = {
  "linear": Case(
    "llama", models_of("linear", TWO), of(reference.linear, "ab", SHARES)
  ),
  "linear, sum by layer": Case(
    "llama",
    models_of("linear", RAMP, SUM),
    of(reference.linear, "ab", ramp, normalize=False),
  ),
  "slerp, classic": Case(
    "llama", CLASSIC, of(reference.slerp, "ab", t=classic), sample=True
  ),
  "ties": Case(
    "llama",
    models_of("ties", TWO, "parameters: {density: 0.5}\n", "o"),
    of(TRIM, "ab", SHARES, "o", density=0.5),
  ),
  "karcher": Case(
    "llama",
    "merge_method: karcher\n" + BETWEEN,
    of(reference.karcher, "ab"),
    1e-5,  # a step of which it stops
  ),
  "karcher with its base": Case(
    "llama",
    "merge_method: karcher\nbase_model: $/o\n" + BETWEEN,
    of(reference.karcher, "abo"),
    1e-5,
  ),
  "sce": Case(
    "llama",
    "merge_method: sce\nbase_model: $/o\nparameters: {select_topk: 0.4}\n"
    + BETWEEN,
    of(reference.sce, "ab", None, "o", density=0.4),
  ),
  "arcee_fusion": Case(
    "llama",
    "merge_method: arcee_fusion\nbase_model: $/o\nmodels: [{model: $/a}]\n",
    of(reference.arcee_fusion, "a", None, "o"),
    sample=True,
  ),
  "ram": Case(
    "llama",
    "merge_method: ram\nbase_model: $/o\n" + BETWEEN,
    of(reference.ram, "ab", None, "o"),
  ),
  "frankenmerge": Case("llama", *slices(("a", 0, 3), ("b", 1, 4))),
  "linear, tied": Case(
    "llama-tied", models_of("linear", TWO), of(reference.linear, "ab", SHARES)
  ),
  "task_arithmetic, lambda": Case(
    "llama-tied",
    models_of("task_arithmetic", TWO, "parameters: {lambda: 0.8}\n", "o"),
    of(ADD, "ab", SHARES, "o", scale=0.8),
  ),
  "model_stock": Case(
    "llama-tied",
    "merge_method: model_stock\nbase_model: $/o\n" + BETWEEN,
    of(reference.model_stock, "ab", None, "o"),
  ),
  "breadcrumbs": Case(
    "llama-tied",
    models_of(
      "breadcrumbs", TWO, "parameters: {density: 0.8, gamma: 0.01}\n", "o"
    ),
    of(reference.breadcrumbs, "ab", SHARES, "o", density=0.8, gamma=0.01),
    sample=True,
  ),
  "ties, sum": Case(
    "qwen2-windows",
    models_of(
      "ties", TWO, "parameters: {density: 0.3, normalize: false}\n", "o"
    ),
    of(TRIM, "ab", SHARES, "o", density=0.3, normalize=False),
  ),
  "layers by windows": Case(
    "qwen2-windows", *slices(("a", 0, 3), ("a", 1, 4)), sample=True
  ),
  "sliced changes": Case(
    "qwen2-windows",
    SLICED_CHANGES,
    from_layers([("a", at) for at in (0, 1, 2, 1, 2, 3)], merge=sliced_changes),
    sample=True,
  ),
  "linear, sharded": Case(
    "mistral-sharded",
    models_of("linear", TWO),
    of(reference.linear, "ab", SHARES),
  ),
  "ties, sharded": Case(
    "mistral-sharded",
    models_of("ties", TWO, "parameters: {density: 0.5}\n", "o"),
    of(TRIM, "ab", SHARES, "o", density=0.5),
  ),
  "scaled layers": Case(
    "mistral-sharded",
    "merge_method: passthrough\nmodels:\n- model: $/a\n  parameters:\n"
    "    scale: [{filter: down_proj, value: 0.5}, {value: 1}]\n",
    of(
      reference.passthrough,
      "a",
      lambda name: [0.5 if "down_proj" in name else 1],
    ),
  ),
  "frankenmerge, alternating windows": Case(
    "gemma2-tied", *slices(("a", 0, 3), ("b", 2, 4))
  ),
  "multislerp": Case(
    "gemma2-tied",
    models_of("multislerp", TWO),
    of(reference.multislerp, "ab", SHARES),
  ),
  "multislerp of changes": Case(
    "gemma2-tied",
    models_of("multislerp", TWO, "", "o"),
    of(reference.multislerp, "ab", SHARES, "o"),
  ),
  "task_arithmetic, one subtracted": Case(
    "phi3-fused",
    models_of(
      "task_arithmetic",
      {"a": 1, "b": -0.5},
      "parameters: {normalize: true}\n",
      "o",
    ),
    of(ADD, "ab", [1, -0.5], "o", normalize=True),
  ),
  "slerp, fused": Case(
    "phi3-fused",
    "merge_method: slerp\nbase_model: $/a\nparameters: {t: 0.3}\n" + BETWEEN,
    of(reference.slerp, "ab", t=0.3),
  ),
  "linear, GPT-2": Case(
    "gpt2-fused", models_of("linear", TWO), of(reference.linear, "ab", SHARES)
  ),
  "nuslerp": Case(
    "gpt2-fused",
    models_of("nuslerp", TWO),
    of(reference.nuslerp, "ab", SHARES),
  ),
  "dare_linear, all kept": Case(
    "gpt2-fused",
    models_of("dare_linear", TWO, "parameters: {density: 1.0}\n", "o"),
    of(ADD, "ab", SHARES, "o"),
  ),
  "frankenmerge, GPT-2": Case("gpt2-fused", *slices(("a", 0, 2), ("b", 1, 4))),
  "nuslerp of columns": Case(
    "gpt-neox-biased",
    models_of(
      "nuslerp",
      TWO,
      "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
      "o",
    ),
    of(reference.nuslerp, "ab", SHARES, "o", axis=0),
  ),
  "della, all kept": Case(
    "gpt-neox-biased",
    models_of("della", TWO, "parameters: {density: 1.0}\n", "o"),
    of(ADD, "ab", SHARES, "o", elects=True, normalize=True),
  ),
  "linear, two stacks": Case(
    "t5",
    models_of("linear", RAMP, SUM),
    of(reference.linear, "ab", t5_ramp, normalize=False),
    sample=True,
  ),
  "ties, two stacks": Case(
    "t5",
    models_of("ties", TWO, "parameters: {density: 0.4, lambda: 1.2}\n", "o"),
    of(TRIM, "ab", SHARES, "o", density=0.4, scale=1.2),
  ),
  "linear, two stacks of BART": Case(
    "bart",
    models_of("linear", RAMP, SUM),
    of(reference.linear, "ab", bart_ramp, normalize=False),
  ),
  "breadcrumbs_ties": Case(
    "bart",
    models_of(
      "breadcrumbs_ties", TWO, "parameters: {density: 0.9, gamma: 0.3}\n", "o"
    ),
    of(
      reference.breadcrumbs,
      "ab",
      SHARES,
      "o",
      density=0.9,
      gamma=0.3,
      elects=True,
    ),
  ),
  "model_stock, BERT": Case(
    "bert",
    "merge_method: model_stock\nbase_model: $/o\n" + BETWEEN,
    of(reference.model_stock, "ab", None, "o"),
  ),
  "nearswap": Case(
    "bert",
    "merge_method: nearswap\nbase_model: $/o\nmodels: [{model: $/a}]\n"
    "parameters: {t: 0.03}\n",
    of(reference.nearswap, "a", None, "o", t=0.03),
  ),
  "linear, experts": Case(
    "mixtral", models_of("linear", TWO), of(reference.linear, "ab", SHARES)
  ),
  "ties, experts by a filter": Case(
    "mixtral", FILTERED, of(TRIM, "ab", of_experts, "o", density=0.6)
  ),
  "frankenmerge, experts": Case("mixtral", *slices(("a", 0, 3), ("b", 1, 4))),
  "layers without experts": Case(
    "qwen3-moe", *slices(("a", 0, 3), ("b", 1, 4)), sample=True
  ),
  "ramplus_tl": Case(
    "qwen3-moe",
    "merge_method: ramplus_tl\nbase_model: $/o\n" + BETWEEN,
    of(reference.ram, "ab", None, "o", strength=0.1),
  ),
  "dense layers first": Case(
    "deepseek-v3", *slices(("a", 0, 1), ("a", 0, 3), ("b", 2, 4))
  ),
  "linear, images": Case(
    "gemma3-images",
    models_of("linear", RAMP, SUM),
    of(reference.linear, "ab", gemma3_ramp, normalize=False),
  ),
  "dare_ties, images": Case(
    "gemma3-images",
    models_of("dare_ties", TWO, "parameters: {density: 1.0}\n", "o"),
    of(ADD, "ab", SHARES, "o", elects=True),
  ),
}
