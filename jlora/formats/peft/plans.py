# SPDX-License-Identifier: Apache-2.0
"""Plans the tensors of a PEFT file from shapes, then computes them.

`plan_loras`, `plan_biases` and `plan_full` decide what goes where, from shapes
alone. What the format or the consumer cannot hold is added to `left` with the
reason, so that nothing is dropped silently. `spec_of` and `arrays_of` then
describe and yield the tensors.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from jlora.formats.peft.families import Kind
from jlora.formats.peft.layouts import (
  BIAS,
  CONVOLUTION,
  EMBEDDING,
  PREFIX,
  REPLACES,
  Profile,
)
from jlora.formats.peft.parts import (
  HEAD,
  TABLES,
  Base,
  FilePart,
  kind_of,
  module_of,
  parts_of,
  ties_of,
  zero_part,
)
from jlora.formats.peft.tree_names import name_path
from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.numerics.finite import is_finite, not_finite, rounded
from jlora.pairing.buffers import why_no_parameter
from jlora.views import MatrixView


def plan_loras(
  loras: Mapping[str, Lora],
  base: Base,
  profile: Profile,
  dtype: Any,
  left: dict[str, str],
) -> list[FilePart]:
  """Plans the parts of all Loras, in their order; reads each Lora once.

  Args:
    loras: path -> Lora, may be lazy.
    base: the base model.
    profile: the consumer.
    dtype: storage dtype, or None for each Lora's own.
    left: receives path -> reason.

  Returns:
    Parts; none of rank 0.

  Raises:
    ValueError: a Lora is malformed, not for a parameter of the base, not of its
      shape, or of too high a rank; two parts have one name.

  Example:
    >>> import jax.numpy as jnp
    >>> from jlora.formats.peft.parts import describe_base
    >>> from jlora.formats import PEFT
    >>> loras = {"q.weight": Lora(jnp.ones((1, 3)), jnp.ones((1, 2)),
    ...                           jnp.float32(1))}
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> plan_loras(loras, base, PEFT, None, {})[0].module
    'q'
  """
  unknown = [path for path in loras if path not in base.shapes]
  if unknown:
    raise ValueError(
      f"{len(unknown)} of {len(loras)} Loras are for parameters that `like`"
      f" does not have: {name_some(unknown)}."
    )
  parts: list[FilePart] = []
  wrong: list[str] = []
  for path, lora in loras.items():
    check_loras({path: lora})
    shape = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    kind = kind_of(path, base.shapes[path], base, shape)
    view = kind.view
    if kind.why:
      left[path] = kind.why
      continue
    if view is None or view.shape(base.shapes[path]) != shape:
      wrong.append(f"{path}: Lora {shape}, parameter {base.shapes[path]}")
      continue
    new = parts_of(path, lora, view, base, dtype)
    reason = _unnamed(path, lora, base) or _refusal(new[0], view, profile)
    if reason:
      left[path] = reason
    else:
      parts += new
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras do not fit their parameter: {name_some(wrong)}."
      " Needed: (..., in, out) of the parameter's view; is model_type right?"
    )
  _check_parts(parts, profile)
  return parts


def has_own_names(base: Base, profile: Profile) -> bool:
  """Returns whether a consumer says which modules of a base it takes.

  Args:
    base: the base model.
    profile: the consumer.

  Example:
    >>> from jlora.formats import VLLM
    >>> from jlora.formats.peft.parts import describe_base
    >>> has_own_names(describe_base({}, None, None, None), VLLM)
    False
  """
  named = base.family.architectures if base.family else ()
  return bool(named) and profile.refuses_module is not None


def name_parts(
  parts: Sequence[FilePart],
  base: Base,
  profile: Profile,
  left: dict[str, str],
) -> tuple[list[FilePart], Base]:
  """Names parts as a consumer finds them, and leaves out what it does not take.

  Args:
    parts: all parts, named as transformers names their parameters.
    base: the base model, of which `has_own_names` is True.
    profile: the consumer.
    left: receives path -> reason; of a Lora, all parts are left out.

  Returns:
    Parts: each has the name it had, or that on disk if only this is taken. And
    the base, with the modules of those names.

  Example:
    >>> from jlora.formats import VLLM
    >>> from jlora.formats.peft.layouts import LINEAR_FILE
    >>> from jlora.formats.peft.parts import describe_base
    >>> config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    >>> base = describe_base({}, None, None, None, config)
    >>> part = FilePart("p", None, "extra.weight", LINEAR_FILE, (), (), None)
    >>> left = {}
    >>> parts, _ = name_parts([part], base, VLLM, left)
    >>> parts, left
    ([], {'p': 'vLLM 0.33.0 puts no LoRA on extra of LlamaForCausalLM'})
  """
  refuses, family = profile.refuses_module, base.family
  if refuses is None or family is None:
    return list(parts), base
  named, modules = [], set(base.modules)
  for part in parts:
    names = dict.fromkeys([part.name, base.paths.get(part.name, part.name)])
    reasons = {
      name: refuses(
        name.rpartition(".")[0], part.layout.kind, family.architectures
      )
      for name in names
    }
    taken = [name for name, reason in reasons.items() if not reason]
    if taken:
      named.append(part._replace(name=taken[0]))
      modules.discard(part.module)
      modules.add(named[-1].module)
    elif part.path is not None:
      left.setdefault(part.path, reasons[part.name])
  kept = [part for part in named if part.path not in left]
  return kept, base._replace(modules=frozenset(modules))


def plan_biases(
  biases: Mapping[str, Any],
  parts: Sequence[FilePart],
  base: Base,
  profile: Profile,
  left: dict[str, str],
) -> tuple[list[FilePart], dict[str, str]]:
  """Assigns biases to modules, and adds zero Loras to modules without a Lora.

  Args:
    biases: path of a bias -> its change.
    parts: the Loras' parts.
    base: the base model.
    profile: the consumer.
    left: receives path -> reason.

  Returns:
    All parts, and {module: path of its bias}.

  Raises:
    ValueError: a bias of another length than its module's output.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> from jlora.formats import PEFT
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> parts, carried = plan_biases({"q.bias": np.ones(2)}, [], base, PEFT, {})
    >>> parts[0].module, parts[0].rank, carried
    ('q', 1, {'q': 'q.bias'})
  """
  modules = {part.module: part for part in parts}
  dtype = parts[0].dtype if parts else np.dtype(np.float32)
  clash = {
    part.layout.kind
    for part in parts
    if part.layout.wraps_parameter or part.layout is EMBEDDING
  }
  carried: dict[str, str] = {}
  wrong: list[str] = []
  for path, bias in biases.items():
    name = str(base.rename(path))
    module = name.removesuffix(".bias")
    part = modules.get(module) or zero_part(module, 1, dtype, base)
    if "bias" in profile.refused:
      left[path] = profile.refused["bias"]
    elif clash:
      left[path] = f"PEFT refuses lora_bias beside LoRA on {min(clash)}"
    elif module == name or part is None:
      left[path] = (
        "not the bias of a linear layer; give its new value in `full`"
      )
    elif bias.shape != part.b[-1:]:
      wrong.append(f"{path}: {bias.shape}, needed {part.b[-1:]}")
    else:
      modules[module] = part
      carried[module] = path
  if wrong:
    raise ValueError(f"{len(wrong)} biases do not fit: {name_some(wrong)}.")
  if not carried:
    return list(parts), carried
  return list(modules.values()), carried


def plan_full(
  full: Mapping[str, Any],
  parts: Sequence[FilePart],
  base: Base,
  profile: Profile,
  left: dict[str, str],
) -> dict[str, str]:
  """Plans the tensors that are stored whole, as {Hugging Face name: path}.

  PEFT replaces modules, not parameters, and finds them by the ends of names.

  Args:
    full: path -> new value.
    parts: the Loras' parts.
    base: the base model.
    profile: the consumer.
    left: receives path -> reason.

  Returns:
    Names; for a tied embedding also the head's.

  Raises:
    ValueError: a parameter has a Lora as well.

  Example:
    >>> from jlora.formats.peft.parts import describe_base
    >>> from jlora.formats import PEFT
    >>> base = describe_base({"norm.weight": np.ones(3)}, None, None, None)
    >>> plan_full({"norm.weight": np.ones(3)}, [], base, PEFT, {})
    {'norm.weight': 'norm.weight'}
  """
  both = sorted({str(part.path) for part in parts if part.path in full})
  if both:
    raise ValueError(f"Given as a Lora and in full: {name_some(both)}.")
  names = {str(base.rename(path)): path for path in full}
  wrapped = {part.module for part in parts}
  kept: dict[str, str] = {}
  for name, path in names.items():
    reason = profile.refused.get("full") or _obstacle(
      name, path, names, wrapped, base
    )
    if reason:
      left[path] = reason
      continue
    kept[name] = path
  for name in _not_whole(kept, names):
    left[kept.pop(name)] = f"{REPLACES}, and a part is missing"
  for name in list(kept):
    found = _tied(name, names, wrapped, base)
    if isinstance(found, str):
      left[kept.pop(name)] = found
    else:
      kept |= {to: own for to, own in found.items() if to not in kept}
  return kept


def _tied(
  name: str, names: Mapping[str, str], wrapped: Set[str], base: Base
) -> dict[str, str] | str:
  """Returns {parameter: path} of modules tied to one, or why that is no use."""
  found: dict[str, str] = {}
  for other in ties_of(name, base):
    module = module_of(other)
    if module in wrapped:
      return f"{other}, which is tied to it, has a Lora beside it"
    family = base.family
    own = family.ties_in(module, base.names) if family else {other: name}
    missing = [to for to, of in own.items() if of not in names]
    if missing:
      return f"PEFT replaces {other} too; give also {name_some(missing)}"
    found |= {to: names[of] for to, of in own.items()}
  return found


def _not_whole(kept: Mapping[str, str], names: Iterable[str]) -> list[str]:
  """Lists those whose modules have other parameters that are not kept."""
  missing = set(names) - kept.keys()
  holders = {module_of(name) for name in missing}
  return [
    name
    for name in kept
    if module_of(name) in holders
    or any(other.startswith(f"{module_of(name)}.") for other in missing)
  ]


def spec_of(
  parts: Sequence[FilePart],
  carried: Mapping[str, str],
  full: Mapping[str, Any],
  kept: Mapping[str, str],
) -> dict[str, tuple]:
  """Returns key -> (shape, dtype) of every tensor that `arrays_of` yields.

  Args:
    parts: the Loras of the file.
    carried: module -> path of its bias; if any, every part has one.
    full: path -> whole tensor.
    kept: Hugging Face name -> path in `full`.

  Returns:
    The spec that `stream_safetensors` takes.

  Example:
    >>> from jlora.formats.peft.layouts import LINEAR_FILE
    >>> f4 = np.dtype("f4")
    >>> part = FilePart("q", None, "q.weight", LINEAR_FILE, (1, 3), (1, 2), f4)
    >>> [shape for shape, _ in spec_of([part], {}, {}, {}).values()]
    [(1, 3), (2, 1)]
  """
  spec = {}
  for part in parts:
    a = np.broadcast_to(np.empty((), part.dtype), part.a)
    b = np.broadcast_to(np.empty((), part.dtype), part.b)
    for key, array in _stored(part, a, b):
      spec[key] = array.shape, part.dtype
    if carried:
      spec[f"{PREFIX}{part.stem}.{BIAS}"] = part.b[-1:], part.dtype
  leaves = getattr(full, "spec", full)
  for name, path in kept.items():
    leaf = leaves[path]
    spec[PREFIX + name] = leaf.shape, leaf.dtype
  return spec


def arrays_of(
  parts: Sequence[FilePart],
  loras: Mapping[str, Lora],
  biases: Mapping[str, Any],
  carried: Mapping[str, str],
  full: Mapping[str, Any],
  kept: Mapping[str, str],
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (key, array) for every tensor of the file.

  Scales are multiplied into b, in float32, before the one rounding to the
  storage dtype.

  Args:
    parts: the Loras of the file, those of one path next to each other.
    loras: path -> Lora; each is read once, and one is held at a time.
    biases: path -> change of a bias.
    carried: module -> path in `biases`.
    full: path -> whole tensor.
    kept: Hugging Face name -> path in `full`.

  Example:
    >>> from jlora.formats.peft.layouts import LINEAR_FILE
    >>> f4 = np.dtype("f4")
    >>> part = FilePart("q", None, "q.weight", LINEAR_FILE, (1, 3), (1, 2), f4)
    >>> lora = Lora(np.ones((1, 3), f4), np.ones((1, 2), f4), np.float32(2))
    >>> dict(arrays_of([part], {"q": lora}, {}, {}, {}, {}))[
    ...   "base_model.model.q.lora_B.weight"]
    array([[2.],
           [2.]], dtype=float32)
  """
  for path, group in itertools.groupby(parts, lambda part: part.path):
    factors = None if path is None else _folded(loras[path])
    for part in group:
      a, b = _factors(part, factors)
      stored = (
        rounded(f"{side} of {part.name}", x, part.dtype)
        for side, x in (("a", a), ("b, times its scale,", b))
      )
      yield from _stored(part, *stored)
      if not carried:
        continue
      bias = np.zeros(part.b[-1:])
      if part.module in carried:
        bias = np.asarray(biases[carried[part.module]])
      bias = rounded(f"the bias of {part.module}", bias, part.dtype)
      yield f"{PREFIX}{part.stem}.{BIAS}", bias
  for name, path in kept.items():
    array = np.asarray(full[path])
    # Masks may hold infinities, parameters may not.
    if not why_no_parameter(path, array.shape) and not is_finite(array):
      raise not_finite(name, array, array.dtype)
    yield PREFIX + name, array


def _unnamed(path: str, lora: Lora, base: Base) -> str | None:
  """Returns why a stack of a tree of JAX needs names, or None."""
  if base.rename is not name_path or "/" not in path or lora.a.ndim < 3:
    return None
  count = math.prod(lora.a.shape[:-2])
  return (
    f"{count} layers or experts in one array, and one name for them; rename="
    f" has to give {count} names, or that of a module which holds them all"
  )


def _refusal(part: FilePart, view: MatrixView, profile: Profile) -> str | None:
  """Returns why a part cannot be stored, or None."""
  if part.rank == 0:
    return "rank 0: nothing to write"
  if part.layout.kind in profile.refused:
    return profile.refused[part.layout.kind]
  if part.layout is CONVOLUTION and view.outputs != (0,):
    return "a kernel not in PyTorch's layout; transpose it first"
  if not part.layout.wraps_parameter and not part.name.endswith(".weight"):
    return f"PEFT wraps modules with a `weight`, not {part.name}"
  return None


def _check_parts(parts: Sequence[FilePart], profile: Profile) -> None:
  """Raises unless all ranks are allowed and all names differ."""
  limit = math.inf if profile.max_rank is None else profile.max_rank
  high = [f"{part.name} ({part.rank})" for part in parts if part.rank > limit]
  if high:
    raise ValueError(
      f"{len(high)} modules have a rank over {limit}, the most that"
      f" {profile.name} takes: {name_some(high)}. Truncate them."
    )
  counts = collections.Counter(part.name for part in parts)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    raise ValueError(f"Names given to several Loras: {name_some(twice)}.")


def _obstacle(name, path, names, wrapped, base: Base) -> str | None:
  """Returns why PEFT cannot replace the module of a tensor, or None."""
  module = module_of(name)
  shape = base.shapes.get(path, ())
  kind = kind_of(path, shape, base)
  if why_no_parameter(path, shape):  # no table has it, and PEFT looks for it
    kind = Kind()
  if not kind.in_model:
    return kind.why
  missing = [
    other
    for other in sorted(base.names)
    if other.startswith(f"{module}.") and other not in names
  ]
  because = f" ({kind.why})" if kind.why else ""
  reason = _unreplaceable(name, path, missing, wrapped, base)
  return reason and reason + because


def _unreplaceable(name, path, missing, wrapped, base: Base) -> str | None:
  """Returns why a module cannot be replaced, or None."""
  module = module_of(name)
  if not module:
    return "a parameter of no module, which PEFT cannot replace"
  if module not in base.modules and name != HEAD:
    return "the base has no such module"
  if module in wrapped:
    return "its module has a Lora; give its change in `biases`"
  around = [w for w in wrapped if module.startswith(f"{w}.")]
  if around:
    return f"PEFT wraps a parameter of {around[0]}, and saves nothing inside"
  if missing:
    return f"{REPLACES}; give also {name_some(missing)}"
  if (
    "/" in path
    and len(base.shapes.get(path, ())) > 1
    and not re.fullmatch(TABLES, name)
  ):
    return "kept whole only in PyTorch's layout; transpose and rename it first"
  return None


def _stored(part: FilePart, a, b) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the two tensors of a part with their keys."""
  a, b = part.layout.store(a, b, part.kernel)
  yield f"{PREFIX}{part.stem}.{part.layout.a}", a
  yield f"{PREFIX}{part.stem}.{part.layout.b}", b


def _folded(lora: Lora) -> tuple[np.ndarray, np.ndarray]:
  """Returns the factors, with the scale multiplied into the second."""
  scale = np.asarray(lora.scale, np.float32)[..., None, None]
  b = np.asarray(lora.b)
  if (scale != 1).any():
    with np.errstate(over="ignore", invalid="ignore"):  # told when rounded
      b = b.astype(np.float32) * scale
  return np.asarray(lora.a), b


def _factors(part: FilePart, factors) -> tuple[np.ndarray, np.ndarray]:
  """Selects, swaps and pads a Lora's factors as a part needs them."""
  if factors is None:
    return np.zeros(part.a, part.dtype), np.zeros(part.b, part.dtype)
  a, b = factors[::-1] if part.swapped else factors
  if part.index is not None:
    a = a.reshape(-1, *a.shape[-2:])[part.index]
    b = b.reshape(-1, *b.shape[-2:])[part.index]
  return _padded(a, part.rank), _padded(b, part.rank)


def _padded(factor: np.ndarray, rank: int) -> np.ndarray:
  """Pads a factor (..., r, n) with zeros up to a rank."""
  missing = rank - factor.shape[-2]
  if not missing:
    return factor
  around = [(0, 0)] * (factor.ndim - 2)
  return np.pad(factor, [*around, (0, missing), (0, 0)])
