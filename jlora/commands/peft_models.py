# SPDX-License-Identifier: Apache-2.0
"""What PEFT and transformers make of an adapter, on a model without weights.

config.json, or names and shapes ─► model on torch's meta device
  ─► adapter put on it ─► `Adapted`
checkpoint's names ─► transformers' own renaming and conversion ─► `Loader`

The one file of jlora that imports torch, transformers and peft, which are not
among its dependencies. Nothing imports it but `verdicts.check`, when asked.

References:
  huggingface/peft 0.21.2, `PeftModel.from_pretrained`;
  huggingface/transformers 5, `core_model_loading.py`.
"""

import collections
import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import conversion_mapping, core_model_loading

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.formats.peft.config import check_config, read_adapter_config
from jlora.formats.peft.layouts import CONFIG, PREFIX, TENSORS

#: Who checks, for the report.
NAME, VERSION = "PEFT", peft.__version__
_ADAPTER = "default"  # PEFT's name for the one adapter
# transformers' class for a task, where config.json names no architecture.
_AUTO_CLASSES = {
  "CAUSAL_LM": "AutoModelForCausalLM",
  "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
  "SEQ_CLS": "AutoModelForSequenceClassification",
  "TOKEN_CLS": "AutoModelForTokenClassification",
  "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


_MISFIT = re.compile(
  r"size mismatch for (\S+): copying a param with shape torch.Size\((.+?)\) "
  r"from checkpoint, the shape in current model is torch.Size\((.+?)\)"
)


class Refused(Exception):
  """PEFT does not load an adapter at all.

  Attributes:
    offenders: tensor -> what is wrong with it; empty if PEFT names none.
  """

  def __init__(self, error: Exception):
    text = " ".join(str(error).split())
    super().__init__(f"{type(error).__name__}: {text}")
    self.offenders = {
      name: f"PEFT refuses its shape {there}, it needs {needed}"
      for name, there, needed in _MISFIT.findall(text)
    }


class Adapted:
  """A base without weights, with an adapter on it as PEFT loads it.

  Attributes:
    model_class: name of the base's class.
    shapes: shape of each parameter and buffer of the base, by its name in the
      model.
    owners: name of a tied parameter -> name of the one it shares memory with.
    unused: keys of the adapter's file that end up nowhere.
    missing: tensors of the adapter that the file does not have.
  """

  def __init__(
    self,
    adapter: Path,
    base: Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
  ):
    """Builds it by transformers, or of layers of these shapes."""
    self._is_bare = shapes is not None
    file = adapter / CONFIG
    check_config(read_adapter_config(file), str(file))
    with _silence():
      config = peft.PeftConfig.from_pretrained(str(adapter))
      # One stays as it is; PEFT takes the other to pieces.
      try:
        self._plain, model = (
          _layers_of(shapes, adapter)
          if shapes is not None
          else _resized(_build(base, config.task_type), adapter)
          for _ in range(2)
        )
      except Exception as error:  # code of its own, or packages that lack
        raise ValueError(
          f"not verified: transformers does not build {base}: {error}"
        ) from error
      self.model_class = (
        "the base" if self._is_bare else type(self._plain).__name__
      )
      state = self._plain.state_dict()
      self.shapes = {name: tuple(leaf.shape) for name, leaf in state.items()}
      self.owners = _find_ties(self._plain)
      try:
        self._put_on(model, config, adapter)
      except Exception as error:  # whatever PEFT stumbles over
        raise Refused(error) from error

  def loader(self, checkpoint: Checkpoint) -> Any:
    """Returns how transformers would load a checkpoint into this base."""
    if self._is_bare:
      return Named(self.shapes, checkpoint)
    return Loader(self._plain, self.shapes, self.owners, checkpoint)

  def change(self, parameter: str) -> np.ndarray | None:
    """Computes what the adapter adds to a parameter, as PEFT does."""
    *_, layers = self._find(parameter)
    leaf, found = parameter.rpartition(".")[2], None
    for layer in layers:
      delta = _change_of(layer, leaf)
      if delta is not None:
        found = delta if found is None else found + delta
    return None if found is None else found.numpy()

  def carries(self, parameter: str) -> bool:
    """Returns whether the adapter has a Lora or a new value for a parameter."""
    tensor, layers = self._find(parameter)
    leaf = parameter.rpartition(".")[2]
    return not tensor.is_meta or any(_is_changed(one, leaf) for one in layers)

  def new_value(self, parameter: str) -> np.ndarray | None:
    """Returns the float32 value that replaces a parameter, or None."""
    tensor, _ = self._find(parameter)
    return None if tensor.is_meta else tensor.detach().float().numpy()

  def _put_on(self, base: Any, config: Any, adapter: Path) -> None:
    """Loads the adapter as `PeftModel.from_pretrained` does."""
    renaming = getattr(base, "_checkpoint_conversion_mapping", {})
    config.inference_mode = True
    make = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(
      config.task_type, peft.PeftModel
    )
    model = make(base, config, _ADAPTER, low_cpu_mem_usage=True)
    for module in model.modules():
      if isinstance(module, BaseTunerLayer):
        # It would follow the base, which is nowhere.
        module._move_adapter_to_device_of_base_layer = lambda *_, **__: None
    tensors = peft.load_peft_weights(
      str(adapter), device="cpu", key_mapping=renaming
    )
    self.unused = sorted(_unused(model, tensors))
    del tensors
    result = model.load_adapter(
      str(adapter),
      _ADAPTER,
      torch_device="cpu",
      low_cpu_mem_usage=True,
      key_mapping=renaming,
    )
    self.unused = sorted({*self.unused, *result.unexpected_keys})
    self.missing = sorted(result.missing_keys)
    for module in model.modules():
      if isinstance(module, ParamWrapper):
        _give_shape(module)
    # What the forward pass of the adapted model goes through.
    self._root = model.get_base_model()

  def _find(self, parameter: str) -> tuple[torch.Tensor, list[Any]]:
    """Finds the tensor at a parameter's place, and the LoRAs around it."""
    *parts, leaf = parameter.split(".")
    module, layers = self._root, []
    for part in parts:
      module, layers = _unwrap(getattr(module, part))
    return getattr(module, leaf), layers


class Named:
  """A checkpoint's tensors as parameters of the same names.

  Attributes:
    sources: parameter -> names of the tensors it is made of.
  """

  def __init__(self, shapes, checkpoint: Checkpoint):
    self._checkpoint = checkpoint
    spec = checkpoint.spec
    self.sources = {name: [name] for name in shapes if name in spec}

  def parameters_of(self, name: str) -> list[str]:
    """Lists the parameters that a tensor of this name is loaded into."""
    return [name] if name in self.sources else []

  def source_of(self, parameter: str) -> list[str]:
    """Lists the tensors a parameter is made of."""
    return self.sources.get(parameter, [])

  def read(self, parameter: str) -> np.ndarray | None:
    """Reads a parameter's values; None if the checkpoint does not have them."""
    if parameter not in self.sources:
      return None
    array = self._checkpoint.read(parameter)
    return array.astype(np.float32)


class Loader:
  """A checkpoint's tensors as parameters of a model, one at a time.

  Attributes:
    sources: parameter -> names of the tensors it is made of.
    places: name of a tensor -> parameters made of it.
  """

  def __init__(self, model, shapes, owners, checkpoint: Checkpoint):
    self._model, self._shapes, self._owners = model, shapes, owners
    self._checkpoint = checkpoint
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings, converters = [], []
    for one in transforms:
      is_converter = isinstance(one, core_model_loading.WeightConverter)
      (converters if is_converter else renamings).append(one)
    self._renamings, self._converters = renamings, converters
    groups: dict[str, list[tuple[str, str | None]]] = {}
    order = core_model_loading.dot_natural_key
    for name in sorted(checkpoint.spec, key=order):
      first, pattern = self._place(name)
      if first in shapes:
        groups.setdefault(first, []).append((name, pattern))
    self._groups = groups
    self._group_of: dict[str, str] = {}
    self._last: tuple[str, dict[str, np.ndarray]] = ("", {})
    self.sources: dict[str, list[str]] = {}
    self.places: dict[str, list[str]] = collections.defaultdict(list)
    for first, members in groups.items():
      for parameter in self._targets(first):
        self._group_of[parameter] = first
        self.sources[parameter] = [name for name, _ in members]
        for name, _ in members:
          self.places[name].append(parameter)

  def parameters_of(self, name: str) -> list[str]:
    """Lists the parameters that a tensor of this name is loaded into."""
    if name in self.places:
      return self.places[name]
    first, _ = self._place(name)
    return [first] if first in self._shapes else []

  def source_of(self, parameter: str) -> list[str]:
    """Lists the tensors a parameter is made of, its own or a tied one's."""
    return self.sources.get(self._own(parameter), [])

  def read(self, parameter: str) -> np.ndarray | None:
    """Reads a parameter's values; None if the checkpoint does not have them."""
    parameter = self._own(parameter)
    first = self._group_of.get(parameter)
    if first is None:
      return None
    if self._last[0] != first or parameter not in self._last[1]:
      self._last = "", {}  # let go of it before more is read
      self._last = first, self._convert(first, self._tensor)
    # What is given away is the caller's; its siblings wait for their turn.
    return self._last[1].pop(parameter, None)

  def _own(self, parameter: str) -> str:
    """Returns the parameter itself, or the stored one that it is tied to."""
    if parameter in self._group_of:
      return parameter
    owner = self._owners.get(parameter, parameter)
    if owner in self._group_of:
      return owner
    # The owner itself may be stored under a tied name.
    tied = [one for one, other in self._owners.items() if other == owner]
    return next((one for one in tied if one in self._group_of), owner)

  def _place(self, name: str) -> tuple[str, str | None]:
    """Finds the first parameter made of a tensor, and the pattern for it."""
    rename = core_model_loading.rename_source_key
    prefix, meta = self._model.base_model_prefix, self._shapes
    found = rename(name, self._renamings, self._converters, prefix, meta)
    if found[0] not in meta and name in meta:
      return rename(name, [], [], prefix, meta)
    return found

  def _targets(self, first: str) -> list[str]:
    """Lists all parameters that come out together with the first."""
    pattern = self._groups[first][0][1]
    if pattern is None:
      return [first]
    try:
      made = self._convert(first, self._blank)
    except Exception:  # an operation that needs values
      made = {}
    return [name for name in made if name in self._shapes] or [first]

  def _convert(self, first: str, tensor) -> dict[str, Any]:
    """Puts a group's tensors together as transformers does."""
    members = self._groups[first]
    if members[0][1] is None:
      (name, _), *_ = members
      return {first: _as_numpy(tensor(name))}
    converters = {p: c for c in self._converters for p in c.source_patterns}
    with _silence():
      converter = copy.deepcopy(converters[members[0][1]])
      for name, pattern in members:
        converter.add_tensor(first, name, pattern, lambda n=name: tensor(n))
      made = converter.convert(
        first, model=self._model, config=self._model.config
      )
    one = lambda found: found[0] if isinstance(found, list) else found  # noqa: E731
    return {name: _as_numpy(one(found)) for name, found in made.items()}

  def _tensor(self, name: str) -> torch.Tensor:
    array = self._checkpoint.read(name)
    if array.dtype.kind not in "biuc":
      array = array.astype(np.float32, copy=False)
    return torch.from_numpy(np.require(array, requirements="W"))

  def _blank(self, name: str) -> torch.Tensor:
    shape = self._checkpoint.spec[name].shape
    return torch.empty(shape, dtype=torch.float32, device="meta")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Silences the libraries: what they warn of is found in what was loaded."""
  logging = transformers.utils.logging
  level = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.set_verbosity(level)


def _build(base: Path, task: str | None) -> Any:
  """Builds the base from config.json on the meta device, without values."""
  config = transformers.AutoConfig.from_pretrained(
    base, trust_remote_code=False, local_files_only=True
  )
  names = [*(config.architectures or ()), _AUTO_CLASSES.get(task or "")]
  classes = (getattr(transformers, name or "", None) for name in names)
  make: Any = next(filter(None, classes), transformers.AutoModel)
  with torch.device("meta"):
    if hasattr(make, "_from_config"):
      return make._from_config(config, dtype=torch.float32)
    return make.from_config(config, dtype=torch.float32)


_CONVOLUTIONS = {
  3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d,
}  # fmt: skip


def _layers_of(shapes: Mapping[str, tuple[int, ...]], adapter: Path) -> Any:
  """Builds layers of these names and shapes, without values."""
  keys = open_checkpoint(adapter / TENSORS).spec
  modules: dict[str, dict[str, tuple[int, ...]]] = {"": {}}
  for name, shape in shapes.items():
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    for at in range(1, len(parts) + 1):
      modules.setdefault(".".join(parts[:at]), {})
    modules[module][leaf] = shape
  made: dict[str, Any] = {}
  for module in sorted(modules, key=lambda name: name.count(".") + bool(name)):
    is_table = f"{PREFIX}{module}.lora_embedding_A" in keys
    made[module] = _layer(modules[module], is_table)
    if module:
      above, _, name = module.rpartition(".")
      made[above].add_module(name, made[module])
  return made[""]


def _layer(leaves: Mapping[str, tuple[int, ...]], is_table: bool) -> Any:
  """Makes a layer of parameters of these shapes, on the meta device."""
  shape, has_bias = leaves.get("weight", ()), "bias" in leaves
  if {*leaves} <= {"weight", "bias"} and len(shape) > 1:
    how: Any = {"device": "meta"}
    if is_table:
      return torch.nn.Embedding(shape[0], shape[1], **how)
    if len(shape) == 2:
      return torch.nn.Linear(shape[1], shape[0], has_bias, **how)
    if make := _CONVOLUTIONS.get(len(shape)):
      kernel = tuple(shape[2:])
      return make(shape[1], shape[0], kernel, bias=has_bias, **how)
  layer = torch.nn.Module()
  for leaf, own in leaves.items():
    values = torch.empty(own, device="meta")
    layer.register_parameter(leaf, torch.nn.Parameter(values))
  return layer


def _resized(model: Any, adapter: Path) -> Any:
  """Makes room for another vocabulary, as PEFT's users have to."""
  try:
    table = model.get_input_embeddings()
  except NotImplementedError:  # several, or none
    return model
  names = [name for name, module in model.named_modules() if module is table]
  for key, spec in open_checkpoint(adapter / TENSORS).spec.items():
    is_table = any(key.endswith(f".{name}.weight") for name in names)
    if is_table and spec.shape[0] != table.weight.shape[0]:
      model.resize_token_embeddings(spec.shape[0], mean_resizing=False)
      break
  return model


def _find_ties(model: Any) -> dict[str, str]:
  """Names of tied parameters -> name of the parameter they are tied to."""
  first: dict[int, str] = {}
  owners = {}
  for name, leaf in model.named_parameters(remove_duplicate=False):
    owner = first.setdefault(id(leaf), name)
    if owner != name:
      owners[name] = owner
  return owners


def _unused(model: Any, tensors: dict[str, torch.Tensor]) -> set[str]:
  """Keys whose tensors end up nowhere in the model.

  Each tensor's place is taken by one of its shape, filled with a number of its
  own: the numbers that are then found in the model are those of keys that came
  through. PEFT tells of keys that it cannot place, but not of those that it
  loses while it converts.
  """
  numbered = {
    key: torch.tensor(float(at)).expand(tensor.shape)
    for at, (key, tensor) in enumerate(tensors.items(), 1)
  }
  peft.set_peft_model_state_dict(
    model, numbered, adapter_name=_ADAPTER, low_cpu_mem_usage=True
  )
  found: set[float] = set()
  for leaf in model.state_dict().values():
    if leaf.is_meta or not leaf.numel():
      continue
    low, high = (value.item() for value in leaf.aminmax())
    found |= {low} if low == high else {*leaf.unique().tolist()}
  return {key for at, key in enumerate(tensors, 1) if at not in found}


def _unwrap(module: Any) -> tuple[Any, list[Any]]:
  """Returns the module inside PEFT's wrappers, and the LoRA wrappers."""
  layers: list[Any] = []
  while True:
    if isinstance(module, ModulesToSaveWrapper):
      saved = module.modules_to_save
      kept = _ADAPTER in saved
      module = saved[_ADAPTER] if kept else module.original_module
    elif isinstance(module, BaseTunerLayer):
      if isinstance(module, LoraLayer):
        layers.append(module)
      module = getattr(module, "base_layer")  # noqa: B009  of no known type
    else:
      return module, layers


def _is_changed(layer: LoraLayer, leaf: str) -> bool:
  """Returns whether a LoRA layer has tensors for this parameter."""
  held = [
    *(one[_ADAPTER].weight for one in (layer.lora_A, layer.lora_B)
      if _ADAPTER in one),
    *(one[_ADAPTER] for one in (layer.lora_embedding_A, layer.lora_embedding_B)
      if _ADAPTER in one),
  ]  # fmt: skip
  if not held or any(tensor.is_meta for tensor in held):
    return False  # of what the file lacks, nothing was loaded
  if isinstance(layer, ParamWrapper):
    return leaf == layer.parameter_name
  if leaf == "bias":
    return bool(layer.lora_bias.get(_ADAPTER))
  return leaf in ("weight", "in_proj_weight")


def _change_of(layer: Any, leaf: str) -> torch.Tensor | None:
  """Computes what a LoRA layer adds to a parameter of its module."""
  if not _is_changed(layer, leaf):
    return None
  with torch.no_grad():
    if leaf == "bias" and not isinstance(layer, ParamWrapper):
      return layer.lora_B[_ADAPTER].bias.float() * layer.scaling[_ADAPTER]
    return layer.get_delta_weight(_ADAPTER).float()


def _give_shape(layer: ParamWrapper) -> None:
  """Lets a wrapped parameter have a shape and a device, but no memory."""
  shape = layer.get_param().shape
  layer.get_param = lambda: torch.zeros(()).expand(shape)


def _as_numpy(tensor: torch.Tensor) -> Any:
  """Returns a tensor as an array; one without values as it is."""
  return tensor if tensor.is_meta else tensor.numpy()
