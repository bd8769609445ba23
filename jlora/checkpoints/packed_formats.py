# SPDX-License-Identifier: Apache-2.0
"""Recognises quantised checkpoints whose codes jlora does not read.

Their codes are integers, under names of their own: a comparison that takes them
for other parameters would find a model without layers, and no fault.
"""

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.messages import name_some

# Format, what holds a module's codes, and what must lie beside them. The first
# that fits counts.
_FORMATS = (
  ("GPTQ", "qweight", ("qzeros", "scales", "g_idx")),
  ("AWQ", "qweight", ("qzeros", "scales")),
  ("EETQ", "qweight", ("weight_scales",)),
  ("FP-Quant or HIGGS", "qweight", ("scales",)),
  ("compressed-tensors", "weight_packed", ("weight_scale",)),
  ("NVFP4 of modelopt", "weight", ("weight_scale", "weight_scale_2")),
  ("compressed-tensors", "weight", ("weight_scale",)),
  ("EETQ", "weight", ("weight_scales",)),
  ("torchao", "_weight_qdata", ("_weight_scale",)),
  ("MLX", "weight", ("scales", "biases")),
  ("quanto", "weight._data", ("weight._scale",)),
  ("HQQ", "W_q", ("scale", "zero")),
  ("AQLM", "codes", ("codebooks", "scales")),
  ("bitsandbytes", "weight", ("weight.absmax",)),
)
_GPTQMODEL = (
  "gptqmodel's `from gptqmodel.utils.model_dequant import dequantize_model; "
  "dequantize_model(FOLDER, NEW_FOLDER)`"
)
_LOAD = "transformers' AutoModelForCausalLM.from_pretrained(FOLDER"
# Method in config.json, in small letters -> what gives floating weights.
_REMEDIES = {
  "gptq": _GPTQMODEL,
  "awq": _GPTQMODEL,
  "compressed-tensors": f"{_LOAD}, quantization_config="
  "CompressedTensorsConfig(dequantize=True)).save_pretrained(NEW_FOLDER)",
  "mlx": "`mlx_lm.convert --hf-path FOLDER --mlx-path NEW_FOLDER --dequantize`",
  "bitsandbytes": f"{_LOAD}).dequantize().save_pretrained(NEW_FOLDER)",
}
_OTHERWISE = "the tool that quantised it, and save it in bfloat16"


def check_dequantised(checkpoint: Checkpoint) -> None:
  """Raises if the weights of a checkpoint are packed in a way not read here.

  Args:
    checkpoint: an open one.

  Raises:
    ValueError: names the format, by config.json or else by its tensors, some
      weights, and a tool that dequantises them.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from jlora.checkpoints.checkpoint import open_checkpoint
    >>> from jlora.checkpoints.safetensors import write_safetensors
    >>> codes, scales = np.zeros((2, 2), np.int32), np.ones((2, 1), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/m.safetensors", {
    ...     "q.qweight": codes, "q.qzeros": codes, "q.scales": scales})
    ...   check_dequantised(open_checkpoint(folder))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... is quantised (AWQ): 1 tensors are packed in integers...
  """
  spec = checkpoint.spec
  matrices = [
    name
    for name, one in spec.items()
    if one.dtype.kind in "iu" and len(one.shape) >= 2
  ]
  if not matrices:
    return
  said = checkpoint.config.get("quantization_config")
  method = str(said.get("quant_method", "")) if isinstance(said, dict) else ""
  found = {name: _format_of(name, checkpoint) for name in matrices}
  packed = [name for name in matrices if found[name]]
  if method and not packed:  # not known by its tensors, but by its own word
    packed = [name for name in matrices if name.endswith("weight")]
  if not packed:
    return
  name = method or found[packed[0]]
  remedy = _REMEDIES.get(name.lower(), _OTHERWISE)
  raise ValueError(
    f"{checkpoint.path} is quantised ({name}): {len(packed)} tensors are "
    f"packed in integers, {name_some(packed)}. Give the checkpoint that it was "
    f"made from, or dequantise it first with {remedy}."
  )


def _format_of(name: str, checkpoint: Checkpoint) -> str:
  """Returns the format of which a tensor holds codes; "" of none."""
  names = checkpoint.spec.keys() | checkpoint.companions.keys()
  for format, codes, others in _FORMATS:
    if name == codes or name.endswith(f".{codes}"):
      stem = name.removesuffix(codes)
      if all(stem + other in names for other in others):
        return format
  return ""
