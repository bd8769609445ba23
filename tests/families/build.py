# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the types that the installed transformers knows.

configuration as its class makes it ─► made small ─► model, float32 ─► inputs
"""

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
  CONFIG_MAPPING,
  CONFIG_MAPPING_NAMES,
)

from tests.families import sizes

MOST_PARAMETERS = 15_000_000

# What a type is built as: the first that it has. Then what it is called.
_TASKS = (
  ("IMAGE_TEXT_TO_TEXT", "multimodal"),
  ("SPEECH_SEQ_2_SEQ", "audio"),
  ("SEQ_TO_SEQ_CAUSAL_LM", "seq2seq"),
  ("MASKED_LM", "encoder"),
  ("CAUSAL_LM", "text"),
  ("CTC", "audio"),
  ("AUDIO_CLASSIFICATION", "audio"),
  ("TEXT_TO_WAVEFORM", "audio"),
  ("IMAGE_CLASSIFICATION", "vision"),
  ("SEMANTIC_SEGMENTATION", "vision"),
  ("OBJECT_DETECTION", "vision"),
  ("DEPTH_ESTIMATION", "vision"),
  ("ZERO_SHOT_IMAGE_CLASSIFICATION", "multimodal"),
  ("SEQUENCE_CLASSIFICATION", "encoder"),
  ("PRETRAINING", ""),
  ("", ""),
)


class NotBuilt(Exception):
  """No model of this type can be made here, and why."""


def model_types() -> list[str]:
  """Every model type, in one order."""
  return sorted(CONFIG_MAPPING_NAMES)


def classes_of(model_type: str) -> Iterator[tuple[type, str]]:
  """The classes to try for a type, with what kind of model they are."""
  for task, kind in _TASKS:
    table = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
    names = getattr(modeling_auto, table, {}).get(model_type, ())
    for name in (names,) if isinstance(names, str) else names:
      if found := getattr(transformers, name, None):
        yield found, kind
  yield from ((found, "part") for found in _by_configuration(model_type))


def _by_configuration(model_type: str) -> Iterator[type]:
  """Models of a type that no task has: parts of others, mostly."""
  config = CONFIG_MAPPING[model_type]
  name = config.__module__.replace("configuration_", "modeling_")
  try:
    module = __import__(name, fromlist=["x"])
  except ImportError:
    return
  for found in vars(module).values():
    if (
      inspect.isclass(found)
      and issubclass(found, transformers.PreTrainedModel)
      and found.__dict__.get("config_class", found.config_class) is config
      and not found.__name__.endswith("PreTrainedModel")
    ):
      yield found


def build(model_type: str) -> tuple[torch.nn.Module, str]:
  """A tiny model of random weights, and its kind.

  Raises:
    NotBuilt: with the reason of each attempt that differs.
  """
  reasons: dict[str, None] = {}
  tried = set()
  for made, kind in list(classes_of(model_type))[:4]:
    if made in tried:
      continue
    tried.add(made)
    for level in (0, 1, 2):
      try:
        config = tiny_config(model_type, level)
        with torch.device("meta"):
          count = sum(p.numel() for p in made(config).parameters())
        if count > MOST_PARAMETERS:
          raise NotBuilt(f"{count:,} parameters when made small")
        if not count:
          raise NotBuilt("no parameters")
        torch.manual_seed(0)
        model = made(tiny_config(model_type, level)).float().eval()
        return randomised(model), _finer(kind or _kind_of(model), model)
      except Exception as error:
        text = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {text[-1][:140]}"
        reasons.setdefault(reason.removeprefix("NotBuilt: "))
  if not tried:
    raise NotBuilt("transformers has no model class for it")
  raise NotBuilt(next(iter(reasons)))


def _kind_of(model):
  main = model.main_input_name
  if main in ("pixel_values", "pixel_values_videos"):
    return "vision"
  return "audio" if main in ("input_features", "input_values") else "encoder"


def _finer(kind, model):
  """The kind of model, with what sets it apart among texts."""
  if kind != "text":
    return kind
  names = " ".join(name for name, _ in model.named_parameters())
  if re.search(r"A_log|ssm|time_decay|mlstm", names):
    return "state space"
  return "mixture of experts" if "expert" in names else kind


def randomised(model: torch.nn.Module) -> torch.nn.Module:
  """The same model with matrices drawn anew."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.dim() > 1:
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn * 0.08)
  return model


def tiny_config(model_type: str, level: int = 0) -> Any:
  """A configuration whose sizes are small.

  Args:
    model_type: the type.
    level: 0 makes all small, 1 only numbers and not lists, 2 only the number
      of layers and rows.
  """
  made = CONFIG_MAPPING[model_type]
  plain = made().to_dict()
  small = _shrunk(plain, level, {})
  for name, value in sizes.EXCEPTIONS.get(model_type, {}).items():
    *parts, last = name.split(".")
    place = functools.reduce(lambda d, p: d.setdefault(p, {}), parts, small)
    place[last] = value
  for name in ("transformers_version", "architectures", "model_type"):
    small.pop(name, None)
  return made(**small)


def _shrunk(config: Mapping[str, Any], level: int, ids: dict[int, int]) -> dict:
  """A dict of a configuration and those in it, made small."""
  keep = _layers_kept(config)
  small = {}
  for name, value in config.items():
    if not isinstance(name, str):
      small[name] = value  # a table by number
      continue
    if name in sizes.DROPPED:
      continue
    if isinstance(value, dict):
      small[name] = _shrunk(value, level, ids)
    elif isinstance(value, (list, tuple)):
      value = list(value)
      if keep and len(value) == keep[0] and _is_by_layer(name, value):
        small[name] = [value[i] for i in keep[1]]
      elif name in ("short_factor", "long_factor"):
        small[name] = value[: sizes.HEAD // 2]
      else:
        small[name] = value if level else sizes.smaller_list(name, value)
    elif type(value) is int:
      small[name] = _number(name, value, level, ids)
    else:
      small[name] = value
  if keep:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
      if name in small and config[name] == keep[0]:
        small[name] = len(keep[1])
  if "expand" in config and ("state_size" in config):
    small.pop("intermediate_size", None)
  heads, ours = (
    config.get(n) for n in ("num_attention_heads", "num_key_value_heads")
  )
  if heads is not None and heads == ours:
    small["num_key_value_heads"] = small["num_attention_heads"]
  return small


def _number(name, value, level, ids):
  if re.fullmatch(r".*_(token_)?(id|index|ids)", name) and value > 0:
    if value < sizes.VOCABULARY - 40:
      return value
    return ids.setdefault(value, sizes.VOCABULARY - 1 - len(ids))
  small = sizes.smaller(name, value)
  rows = {2, sizes.VOCABULARY, 64, 1}
  return small if level < 2 or small in rows else value


def _is_by_layer(name, value):
  return all(isinstance(x, str) for x in value) or name.endswith(
    ("_types", "_pattern", "_layers", "_per_layer")
  )


def _layers_kept(config):
  """(layers that a configuration has, those that show all kinds of layer)."""
  for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
    count = config.get(name)
    if type(count) is int and count > 2:
      lists = [
        value
        for key, value in config.items()
        if isinstance(key, str)
        if isinstance(value, (list, tuple))
        and len(value) == count
        and _is_by_layer(key, value)
      ]
      if not lists:
        return None
      first = {}
      for index in range(count):
        first.setdefault(str([v[index] for v in lists]), index)
      chosen = sorted(first.values())[:4]
      chosen += [i for i in range(count) if i not in chosen][: 2 - len(chosen)]
      return count, sorted(chosen)
  return None


def inputs_of(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
  """Inputs that a model may take, the simplest first."""
  names = [
    name
    for name, parameter in inspect.signature(model.forward).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
  ]
  known = {n: v for n in names if (v := _drawn(n, model)) is not None}
  main = model.main_input_name
  decoder = {n: known[n] for n in ("decoder_input_ids",) if n in known}
  if "input_ids" in known:
    yield {"input_ids": known["input_ids"]} | decoder
  if isinstance(main, list):
    main = main[0]
  if main in known:
    yield {main: known[main]}
    yield {main: known[main]} | decoder
  if main == "input_features":
    turned = {main: known[main].transpose(1, 2).contiguous()}
    yield turned
    yield turned | decoder
  for name in ("pixel_values", "pixel_values_videos", "input_values"):
    if name in known:
      yield {name: known[name]}
      if "input_ids" in known:
        yield {name: known[name], "input_ids": known["input_ids"]}
  yield known
  if "pixel_values" in known:
    video = known["pixel_values"][:, None].repeat(1, 4, 1, 1, 1)
    yield {"pixel_values": video}
  if "input_values" in known:
    yield {"input_values": known["input_values"][:, None]}
    yield {"input_values": _normal(1, 64, _first(model, "num_mel_bins", 16))}
  try:
    yield dict(model.dummy_inputs)
  except Exception:
    return


def _normal(*shape):
  return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _first(model, name, default):
  """An attribute of a configuration or of a part of it."""
  todo = [model.config]
  for config in todo:
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and value:
      value = value[0]
    if isinstance(value, int):
      return value
    todo += [
      v for v in vars(config).values()
      if isinstance(v, transformers.PreTrainedConfig)
    ]  # fmt: skip
  return default


def _drawn(name, model):
  """A value of an argument of `forward`, or None if it is none we know."""
  if name == "input_ids":
    return torch.arange(5, 17)[None]
  if name == "decoder_input_ids":
    return torch.arange(7, 13)[None]
  if name in ("pixel_values", "pixel_values_videos"):
    side = _first(model, "image_size", sizes.IMAGE)
    channels = _first(model, "num_channels", 3)
    frames = (_first(model, "num_frames", 4),) if "videos" in name else ()
    return _normal(1, *frames, channels, side, side)
  if name == "input_values":
    return _normal(1, 3200)
  if name == "input_features":
    bins = _first(model, "num_mel_bins", _first(model, "feature_size", 16))
    positions = _first(model, "max_source_positions", 32)
    return _normal(1, bins, 2 * positions)
  return None
