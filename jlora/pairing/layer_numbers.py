# SPDX-License-Identifier: Apache-2.0
"""The config.json of a model whose layers were put together anew.

Configurations say of layers by number which are dense, windowed or of another
kind. Where layers get other numbers, that follows them; where it cannot be
said of the new order, or nobody knows what a key means, it is an error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.checkpoints.documents import (
  LIST,
  NULL,
  Kind,
  check_fields,
  count_to,
  either,
)
from jlora.messages import name_some

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST = 2**16  # layers of a model

#: What configurations leave out because a model type has it by default.
IMPLIED: Mapping[str, Mapping[str, Any]] = {
  "afmoe": {"global_attn_every_n_layers": 4, "num_dense_layers": 1},
  "cohere2": {"sliding_window_pattern": 4},
  "deepseek_v3": {"first_k_dense_replace": 3},
  "exaone4": {"sliding_window_pattern": 4},
  "gemma2": {"sliding_window_pattern": 2},
  "gemma3": {"sliding_window_pattern": 6},
  "gemma3_text": {"sliding_window_pattern": 6},
  "gpt_oss": {"sliding_window_pattern": 2},
  "llama4_text": {"no_rope_layer_interval": 4},
  "qwen3_next": {"full_attention_interval": 4},
  "smollm3": {"no_rope_layer_interval": 4},
}
#: List with an entry for each layer -> rules that say the same where it is not
#: there: key -> (value, number of the layer) -> entry.
LISTED: Mapping[str, Mapping[str, Callable[[int, int], Any]]] = {
  "layer_types": {
    "sliding_window_pattern": lambda n, at: _kind((at + 1) % n),
    "_sliding_window_pattern": lambda n, at: _kind((at + 1) % n),
    "global_attn_every_n_layers": lambda n, at: _kind((at + 1) % n),
    "max_window_layers": lambda n, at: _kind(at >= n),
    "full_attention_interval": lambda n, at: _kind(
      (at + 1) % n, "linear_attention"
    ),
  },
  "no_rope_layers": {
    "no_rope_layer_interval": lambda n, at: int((at + 1) % n != 0),
  },
}
#: Lists of numbers of layers.
INDICES = (
  "mlp_only_layers",
  "moe_layers",
  "full_attn_idxs",
  "cross_attention_layers",
  "hybrid_layer_ids",
  "attn_layer_indices",
  "local_layer_ids",
  "rope_scaling_layers",
  "ple_layer_ids",
)
#: How many layers at the beginning are of one kind.
LEADING = (
  "first_k_dense_replace",
  "num_dense_layers",
  "max_window_layers",
  "moe_layer_start_index",
)
#: Every so many layers, one is of another kind.
PERIODS = (
  "sliding_window_pattern",
  "_sliding_window_pattern",
  "global_attn_every_n_layers",
  "full_attention_interval",
  "no_rope_layer_interval",
  "interleave_moe_layer_step",
  "decoder_sparse_step",
  "moe_layer_interval",
  "moe_layer_freq",
  "attn_layer_period",
  "expert_layer_period",
  "cross_layer_interval",
)
#: Layers that refer to each other, are counted from the last, or take turns in
#: a way that no list says.
FIXED = (
  "num_kv_shared_layers",
  "kv_source_layers",
  "moe_layer_end_index",
  "block_types",
  "prefix_dense_sliding_window_pattern",
  "layer_group_size",
  "loop_layer_index_start",
  "loop_layer_index_end",
  "n_input_layers",
  "n_output_layers",
  "n_recurrent_layers",
  "stage_names",
  "rescale_every",
)
#: List by layer -> model types for which transformers makes it up, by numbers
#: of layers, where config.json lacks it.
MADE_UP: Mapping[str, tuple[str, ...]] = {
  "layer_rope_theta": (
    "muse_glimmer_text",
    "muse_spark_text",
  ),
  "layer_types": (
    "beam",
    "cwm",
    "deepseek_v4",
    "diffusion_gemma_text",
    "dots1",
    "dots3_note_text",
    "embedding_gemma2_text",
    "flint",
    "gemma4_text",
    "gemma4_unified_text",
    "granite_swa",
    "granitemoe_swa",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "kolibri1",
    "lara_mini",
    "lfm3",
    "lfm3_vl_vision",
    "mimo_v2_flash",
    "minimax",
    "modernbert",
    "modernbert-decoder",
    "muse_glimmer_text",
    "muse_glimmer_vision",
    "muse_spark_text",
    "muse_spark_vision",
    "neomme",
    "olmo3",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen4_exp_text",
    "t5_gemma_module",
    "t5gemma2_decoder",
    "t5gemma2_text",
    "ultrabert",
    "vaultgemma",
    "zamba2",
  ),
  "layers_block_type": ("zamba2",),
  "mlp_layer_types": (
    "axk1",
    "axk2",
    "beam",
    "deepseek_v4",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe_text",
    "glm4_moe_lite",
    "hy_v3",
    "hy_v4",
    "hy_v4_vl_text",
    "kimi_linear",
    "laguna",
    "mimo_v2_flash",
    "step3p5",
    "unlimited_ocr_text",
  ),
}


def _is_kinds(value: Any) -> bool:
  """Returns whether a value is a list of [kinds, how often]."""
  is_kinds = isinstance(value, list) and all(
    isinstance(one, list)
    and len(one) == 2
    and isinstance(one[0], list)
    and count_to(_MOST).fits(one[1])
    for one in value
  )
  return is_kinds and sum(len(one) * n for one, n in value) <= _MOST


def _is_numbered(value: Any) -> bool:
  """Returns whether a value is an object by the number of a layer."""
  return isinstance(value, dict) and all(
    re.fullmatch(r"[0-9]{1,9}", key) for key in value
  )


_COUNTED = Kind(
  f"at most {_MOST}", lambda value: type(value) is not int or value <= _MOST
)
# What must hold before layers get other numbers.
_SHAPED = {
  "attention_types": either(
    Kind("a list of [kinds, how often]", _is_kinds), NULL
  ),
  "per_layer_config": either(
    LIST,
    Kind("an object by number of a layer", _is_numbered),
    NULL,
  ),
}


def _kind(is_windowed: Any, windowed: str = "sliding_attention") -> str:
  """Returns the name of a layer's kind of attention."""
  return windowed if is_windowed else "full_attention"


#: Lists that say nothing of layers, however many entries they have.
_OTHER_LISTS = re.compile(
  r"architectures|languages|(\w+_)?token_(id|index)s?|\w*pinpoints|begin_\w+"
  r"|(bad|forced)_\w+_ids|keys_to_ignore\w*|(image|patch|kernel|crop)_size"
)
#: Keys whose names speak of layers and that do not say which are of what kind.
_HARMLESS = re.compile(
  r"(\w+_)?(num|n)_(\w+_)?(layers?|blocks)(_\w+)?|\w+_layers?_num"
  r"|(\w+_)?(encoder|decoder|prenet|postnet|predictor)_layers"
  r"|(vision|audio|image|video|speech)_\w+|\w*token_(offset|index|indices)"
  r"|vocab_offset|out_indices|altup_active_idx|layers?_norm\w*|layer_scale\w*"
  r"|(attn|expert)_layer_offset|mtp_\w+|max_period|\w*_ignore_index"
  r"|accept_hidden_layer|\w*feature_layers?|hidden_layers?|\w*layerdrop"
  r"|index_(topk|head_dim|n_heads|block_size|\w+_blocks)|\w*_per_layer_input"
  r"|diffusion_max_period|insert_layer_id|freq_size"
)
#: Keys whose names speak of layers by number.
_BY_NUMBER = re.compile(
  r"(.*_)?(layers?|idxs?|idx|index|indices|indexes|every|interval|period|offset"
  r"|pattern|first_k|freq)(_.*)?"
)


def configure_layers(
  config: Mapping[str, Any], taken: Sequence[int], stored: int | None = None
) -> dict[str, Any]:
  """Makes the config.json of a model put together from a reference's layers.

  Args:
    config: of the reference.
    taken: for each new layer the number of the reference's layer it is like.
    stored: how many layers the reference's files hold, if that is known.

  Returns:
    A new configuration: `num_hidden_layers` (or `n_layer`, `num_layers`) is the
    number of new layers; lists with an entry for each layer and keys that say
    which layers are of a kind by their numbers follow them. A kind that a key
    cannot say of the new order goes to a list beside it where model types read
    one, as `layer_types`.

  Raises:
    ValueError: layers of a kind that the keys cannot say of the new order, a
      key that speaks of layers by number and is not known, no number of layers
      where it changes, or keys that do not hold what they should.

  Example:
    >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "window"]}
    >>> configure_layers(config, [0, 1, 1])["layer_types"]
    ['full', 'window', 'window']
    >>> config = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    >>> configure_layers(config, [0, 0, 1])["first_k_dense_replace"]
    2
  """
  found, taken = dict(config), list(taken)
  check_fields(found, dict.fromkeys(_COUNTS, _COUNTED), "config.json")
  given = {
    key: config[key]
    for key in _COUNTS
    if type(config.get(key)) is int and config[key] > 0
  }
  is_nested = isinstance(found.get("text_config"), dict)
  if given:
    count = next(iter(given.values()))
    if taken != list(range(count)):
      found = _renumbered(found, taken, count)
    # Another number is of other layers.
    found |= {key: len(taken) for key, own in given.items() if own == count}
  elif config and not is_nested and taken != list(range(stored or len(taken))):
    raise ValueError(
      f"config.json has none of {', '.join(_COUNTS)}, so that it cannot say "
      f"that the model has {len(taken)} layers now; write it there."
    )
  if is_nested:
    found["text_config"] = configure_layers(found["text_config"], taken, stored)
  return found


def _renumbered(
  config: Mapping[str, Any], taken: list[int], count: int
) -> dict[str, Any]:
  """Returns a configuration whose layers have other numbers."""
  kind = str(config.get("model_type"))
  implied = IMPLIED.get(kind, {})
  check_fields(config, _SHAPED, "config.json")
  found = _with_lists({**implied, **config}, count)
  _check_lists(kind, found)
  unknown, wrong = [], []
  for key, value in list(found.items()):
    if key in FIXED and _is_fixed(key, value, count):
      wrong.append(_said(key, value))
    elif (new := _list_anew(key, value, taken, count)) is not None:
      found[key] = new
    elif key in (*LEADING, *PERIODS) and type(value) is int:
      new = _ruled(key, value, taken, count)
      if new is not None:
        found[key] = new
      elif not any(key in LISTED[name] for name in LISTED if name in found):
        wrong.append(_said(key, value))
    elif _is_unknown(key, value):
      unknown.append(_said(key, value))
  _check_keys(unknown, wrong, taken)
  return {
    key: value
    for key, value in found.items()
    if key in config or key not in implied
  }


def _list_anew(key: str, value: Any, taken: list[int], count: int) -> Any:
  """Returns what says something of each layer for new ones; None if none."""
  if key == "per_layer_config" and value and isinstance(value, dict):
    return _keyed_anew(value, taken)
  if not isinstance(value, list) or _OTHER_LISTS.fullmatch(key):
    return None
  if key in INDICES:
    return [at for at, own in enumerate(taken) if own in value]
  if key == "attention_types":
    kinds = [kind for some, times in value for kind in some * times]
    return [[[kinds[own] for own in taken if own < len(kinds)], 1]]
  if len(value) == count:
    return [value[own] for own in taken if own < count]
  return None


def _check_lists(kind: str, config: Mapping[str, Any]) -> None:
  """Raises if a model type makes up lists by layer that are not there."""
  lacking = [
    name
    for name, types in MADE_UP.items()
    if kind in types and not config.get(name)
  ]
  if lacking:
    raise ValueError(
      f"config.json of {kind} lacks {name_some(lacking)}, so which layers are "
      "of what kind hangs on their numbers. Save it anew with transformers, "
      "which writes that down."
    )


def _check_keys(unknown: list[str], wrong: list[str], taken: list[int]) -> None:
  """Raises if keys are not known, or cannot be said of the new order."""
  if unknown:
    raise ValueError(
      f"config.json has {name_some(unknown)}, which may speak of layers by "
      "number; the order of layers cannot be changed here. Take it out of the "
      "model's config.json if it means something else."
    )
  if wrong:
    raise ValueError(
      f"config.json has {name_some(wrong)}, which cannot be said of layers "
      f"{name_some(map(str, taken))} in this order. Take layers in an order in "
      "which each stays of its kind."
    )


def _with_lists(config: Mapping[str, Any], count: int) -> dict[str, Any]:
  """Adds the lists by layer that rules stand for, unless all are of a kind."""
  found = dict(config)
  for name, rules in LISTED.items():
    for key, rule in rules.items():
      value = found.get(key)
      if found.get(name) or type(value) is not int or value < 1:
        continue
      if key == "max_window_layers" and not _has_windows(found):
        continue
      entries = [rule(value, at) for at in range(count)]
      if len(set(entries)) > 1:
        found[name] = entries
  step = found.get("decoder_sparse_step")
  if type(step) is int and step > 1:
    dense = set(found.get("mlp_only_layers") or [])
    dense |= {at for at in range(count) if (at + 1) % step}
    found |= {"mlp_only_layers": sorted(dense), "decoder_sparse_step": 1}
  step = found.get("interleave_moe_layer_step")
  if type(step) is int and step > 1:
    if found.get("moe_layers") is None:
      found["moe_layers"] = list(range(step - 1, count, step))
    found["interleave_moe_layer_step"] = 1
  return found


def _has_windows(config: Mapping[str, Any]) -> bool:
  """Returns whether layers from `max_window_layers` on are windowed."""
  has_use = config.get("use_sliding_window", False)
  return bool(has_use and config.get("sliding_window"))


def _said(key: str, value: Any) -> str:
  """Returns a key with its value, long lists cut short."""
  is_long = isinstance(value, list) and len(value) > 4
  return f"{key} {str(value[:4])[:-1]}, ...]" if is_long else f"{key} {value}"


def _keyed_anew(
  by_layer: Mapping[Any, Any], taken: list[int]
) -> dict[str, Any]:
  """Returns a mapping by the number of a layer, for the new layers."""
  own = {int(key): value for key, value in by_layer.items()}
  width = max(len(str(key)) for key in by_layer)
  return {
    f"{at:0{width}}": own[one] for at, one in enumerate(taken) if one in own
  }


def _is_fixed(key: str, value: Any, count: int) -> bool:
  """Returns whether a key ties layers to their places."""
  if key == "moe_layer_end_index":
    return type(value) is int and 0 <= value < count - 1
  return bool(value)


def _ruled(key: str, value: int, taken: list[int], count: int) -> int | None:
  """Returns a rule's number for the new order; None if there is none."""
  if key in PERIODS:
    apart = [own - at for at, own in enumerate(taken)]
    is_same = value < 2 or all(one % value == 0 for one in apart)
    return value if is_same else None
  if value >= count:  # all, or none: of more layers it must be so again
    return max(value, len(taken))
  flags = [own < value for own in taken]
  return sum(flags) if flags == sorted(flags, reverse=True) else None


def _is_unknown(key: str, value: Any) -> bool:
  """Returns whether a key may say something of layers by number."""
  if key in (*_COUNTS, *INDICES, *FIXED) or _HARMLESS.fullmatch(key):
    return False
  if isinstance(value, dict) and key != "per_layer_config":
    return (
      "layer" in key
      and bool(value)
      and all(str(one).isdigit() for one in value)
    )
  if not isinstance(value, list):
    is_numbers = type(value) is int and value != 0
  else:
    is_numbers = bool(value) and all(type(one) is int for one in value)
  return is_numbers and bool(_BY_NUMBER.fullmatch(key))
