# SPDX-License-Identifier: Apache-2.0
"""Layers in another order, and what configurations say of them by number.

Every model type of the installed transformers: what its class makes of the new
configuration is what it made of the old one, layer by layer; or it is an error.
"""

import json
import zlib

import pytest
from transformers.models.auto.configuration_auto import (
  CONFIG_MAPPING,
  CONFIG_MAPPING_NAMES,
)

from jlora.pairing.layer_numbers import (
  FIXED,
  INDICES,
  LEADING,
  MADE_UP,
  PERIODS,
  configure_layers,
)

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What classes hold for each layer, read from config.json or made up.
BY_LAYER = (
  "layer_types",
  "mlp_layer_types",
  "layers_block_type",
  "no_rope_layers",
  "attention_layers",
  "layer_rope_theta",
)


def read(kind, config):
  """A configuration by its class."""
  given = {key: value for key, value in config.items() if key != "model_type"}
  return CONFIG_MAPPING[kind](**given)


def by_layer(config, count):
  """What a configuration says of each layer."""
  found = {name: getattr(config, name, None) for name in BY_LAYER}
  return {
    name: list(value)
    for name, value in found.items()
    if isinstance(value, list | tuple) and len(value) == count
  }


def configs(part):
  """Model types, with the default configuration of each that has layers."""
  for kind in sorted(CONFIG_MAPPING_NAMES):
    if zlib.crc32(kind.encode()) % part:
      continue
    try:
      plain = CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # transformers' own, such as parts that must be given
      continue
    config = json.loads(json.dumps(plain, default=str))
    if any(isinstance(config.get(key), int) for key in COUNTS):
      yield kind, config


def orders(count):
  """Layers repeated, left out and moved by one."""
  half = count // 2
  yield [*range(max(2, half) + 1), *range(max(1, half), count)]
  yield list(range(1, count))
  yield [0, 0, *range(count)]


def fault_of(kind, config, taken, count):
  """What is wrong of a model type, None if nothing is; and if it is refused."""
  before = by_layer(read(kind, config), count)
  try:
    new = configure_layers(config, taken)
  except ValueError:
    return None, True
  try:
    after = by_layer(read(kind, new), len(taken))
  except Exception as error:
    return f"is not read: {error}", False
  wrong = [
    name
    for name, value in before.items()
    if after.get(name) != [value[own] for own in taken]
  ]
  return wrong or None, False


def walk(is_old, part=1):
  """Faults, and how many orders are right and refused, of a part of types."""
  faults, right, refused = [], 0, 0
  for kind, config in configs(part):
    count = next(config[k] for k in COUNTS if isinstance(config.get(k), int))
    if count < 2:
      continue
    if is_old:
      config = {k: v for k, v in config.items() if k not in BY_LAYER}
      try:
        read(kind, config)
      except Exception:  # it needs the lists
        continue
    for taken in orders(count):
      fault, is_refused = fault_of(kind, config, taken, count)
      right, refused = right + (not is_refused), refused + is_refused
      if fault:
        faults.append((kind, fault, taken))
  return faults, right, refused


@pytest.mark.parametrize("is_old", [False, True])
def test_model_types_follow_or_are_refused(is_old):
  """As transformers writes it now; and as before it wrote lists by layer.

  A sample; `python -m tests.merges` takes them all.
  """
  faults, right, refused = walk(is_old, 5)
  assert not faults
  assert right > refused > 0


def test_the_tables_are_apart():
  listed = [*FIXED, *INDICES, *LEADING, *PERIODS]
  assert len(listed) == len(set(listed))
  assert set(MADE_UP) <= set(BY_LAYER)


TWO = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
  ("config", "taken", "wanted"),
  [
    ({"first_k_dense_replace": 1}, [0, 0, 1, 2], {"first_k_dense_replace": 2}),
    ({"first_k_dense_replace": 1}, [2, 3], {"first_k_dense_replace": 0}),
    ({"first_k_dense_replace": 0}, [3, 0], {"first_k_dense_replace": 0}),
    ({"mlp_only_layers": [1]}, [0, 1, 0, 1, 2], {"mlp_only_layers": [1, 3]}),
    ({"full_attn_idxs": [0, 1, 2, 3]}, [3, 3], {"full_attn_idxs": [0, 1]}),
    (
      {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
      [1, 0, 1, 3],
      {"decoder_sparse_step": 1, "mlp_only_layers": [1, 3]},
    ),
    (
      {"interleave_moe_layer_step": 2, "moe_layers": None},
      [0, 1, 1],
      {"interleave_moe_layer_step": 1, "moe_layers": [1, 2]},
    ),
    ({"attn_layer_period": 2}, [0, 1, 0, 1, 2], {"attn_layer_period": 2}),
    ({"moe_layer_freq": [0, 1, 1, 1]}, [0, 1], {"moe_layer_freq": [0, 1]}),
    ({"moe_layer_end_index": 3}, [0, 1, 1], {"moe_layer_end_index": 3}),
    (
      {"per_layer_config": {"01": {"heads": 2}}},
      [1, 0, 1],
      {"per_layer_config": {"00": {"heads": 2}, "02": {"heads": 2}}},
    ),
    ({"id2label": {"0": "a"}}, [1], {"id2label": {"0": "a"}}),
    (
      {"max_window_layers": 9, "use_sliding_window": False},
      [3, 0],
      {"max_window_layers": 9},
    ),
    # All layers are of a kind, and stay so when there are more of them.
    (
      {"first_k_dense_replace": 4},
      [0, 1, 2, 3, 3],
      {"first_k_dense_replace": 5},
    ),
    ({"moe_layer_start_index": 9}, [0, 1], {"moe_layer_start_index": 9}),
    (
      {"max_window_layers": 4, "use_sliding_window": True, "sliding_window": 8},
      [0, 1, 2, 3, 0, 1],
      {"max_window_layers": 6},
    ),
    # Lists that have as many entries as there are layers by chance.
    (
      {"eos_token_id": [1, 2, 3, 4], "architectures": ["a", "b", "c", "d"]},
      [0, 0],
      {"eos_token_id": [1, 2, 3, 4], "architectures": ["a", "b", "c", "d"]},
    ),
    ({"head_dim": [1, 2, 3, 4]}, [3, 0], {"head_dim": [4, 1]}),
    # Of another stack, whose number of layers is another.
    ({"num_layers": 3}, [0, 1, 2, 3], {"num_layers": 3}),
    ({"num_layers": 3}, [0, 1], {"num_layers": 3}),
    ({"num_layers": 4}, [0, 1], {"num_layers": 2}),
    (
      {"attention_types": [[["global", "local"], 2]]},
      [1, 1, 2],
      {"attention_types": [[["local", "local", "global"], 1]]},
    ),
  ],
)  # fmt: skip
def test_what_follows(config, taken, wanted):
  found = configure_layers({**TWO, **config}, taken)
  assert wanted.items() <= found.items()
  assert found["num_hidden_layers"] == len(taken)


@pytest.mark.parametrize(
  ("config", "taken", "said"),
  [
    ({"first_k_dense_replace": 1}, [0, 1, 0, 1], "first_k_dense_replace 1"),
    ({"attn_layer_period": 2}, [0, 1, 1, 2], "attn_layer_period 2"),
    ({"num_kv_shared_layers": 2}, [0, 0, 1], "num_kv_shared_layers 2"),
    ({"every_other_layer": 3}, [0, 0], "every_other_layer 3, which may speak"),
    ({"layer_map": {"0": 1}}, [0, 0], "layer_map"),
    ({"model_type": "olmo3"}, [0, 0], "of olmo3 lacks layer_types"),
    ({"attention_types": [1, 2]}, [0, 0], "attention_types is .1, 2., needed"),
    ({"attention_types": [[["a"], 10**12]]}, [0, 0], "how often"),
    ({"per_layer_config": {"x": {}}}, [0, 0], "per_layer_config is"),
  ],
)
def test_what_cannot_follow_is_named(config, taken, said):
  with pytest.raises(ValueError, match=said):
    configure_layers({**TWO, **config}, taken)
  whole = configure_layers({**TWO, **config}, range(4))  # nothing moves
  assert whole == {**TWO, **config}


def test_only_the_language_model_of_several():
  nested = {"text_config": {"num_hidden_layers": 2}, "x": 1}
  assert configure_layers(nested, [0, 1, 1]) == {
    "text_config": {"num_hidden_layers": 3}, "x": 1
  }  # fmt: skip


@pytest.mark.parametrize("count", [10**5, 10**18])
def test_a_number_of_layers_that_no_model_has_is_refused(count):
  with pytest.raises(ValueError, match="n_layer is 10+, needed is at most"):
    configure_layers({"n_layer": count}, [0, 0])


def test_a_configuration_without_a_number_of_layers_cannot_say_another():
  """The class's own number would be taken, whatever lies in the files."""
  nested = {"llm_config": {"num_hidden_layers": 2}}
  for config in ({"model_type": "llama"}, nested, {"text_config": {"a": 1}}):
    with pytest.raises(ValueError, match="none of num_hidden_layers.*3 layers"):
      configure_layers(config, [0, 1, 1])
    with pytest.raises(ValueError, match="none of num_hidden_layers.*2 layers"):
      configure_layers(config, [0, 1], 4)
    for stored in (None, 2):
      assert configure_layers(config, [0, 1], stored) == config
  assert configure_layers({}, [0, 0]) == {}
