# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, for other tools and in few bits.

`open_adapter` reads adapters of all tools, `open_components` the image and
video models that they are for, of folders and single files. `save_peft` and
`load_peft` are PEFT's folders, `save_diffusers`, `save_kohya` and `save_comfy`
write files for image models, `save_gguf` for llama.cpp, `save_mlx` for mlx-lm,
`save_qwix`, `save_tunix` and `save_maxtext` for models of JAX. `pack` keeps
factors in few bits. `fingerprint` tells the base of an adapter from others.
Whatever a format cannot carry is returned with a reason, never dropped.
"""

from jlora.formats.adapters import Adapter as Adapter
from jlora.formats.comfy import save_comfy as save_comfy
from jlora.formats.components import open_components as open_components
from jlora.formats.components import open_pair as open_pair
from jlora.formats.diffusers import save_diffusers as save_diffusers
from jlora.formats.fingerprints import Fingerprint as Fingerprint
from jlora.formats.fingerprints import OtherBaseWarning as OtherBaseWarning
from jlora.formats.fingerprints import check_fingerprint as check_fingerprint
from jlora.formats.fingerprints import fingerprint as fingerprint
from jlora.formats.fingerprints import read_fingerprint as read_fingerprint
from jlora.formats.gguf import save_gguf as save_gguf
from jlora.formats.kohya import kohya_layers as kohya_layers
from jlora.formats.kohya import save_kohya as save_kohya
from jlora.formats.maxtext import save_maxtext as save_maxtext
from jlora.formats.mlx import save_mlx as save_mlx
from jlora.formats.opening import open_adapter as open_adapter
from jlora.formats.packed import Packed as Packed
from jlora.formats.packed import bits_within as bits_within
from jlora.formats.packed import load_packed as load_packed
from jlora.formats.packed import pack as pack
from jlora.formats.packed import save_packed as save_packed
from jlora.formats.packed import unpack as unpack
from jlora.formats.peft.layouts import LLAMACPP as LLAMACPP
from jlora.formats.peft.layouts import PEFT as PEFT
from jlora.formats.peft.layouts import VLLM as VLLM
from jlora.formats.peft.layouts import Profile as Profile
from jlora.formats.peft.reading import PeftAdapter as PeftAdapter
from jlora.formats.peft.reading import load_peft as load_peft
from jlora.formats.peft.writing import save_peft as save_peft
from jlora.formats.qwix import save_qwix as save_qwix
from jlora.formats.qwix import save_tunix as save_tunix
from jlora.formats.qwix import to_qwix as to_qwix
from jlora.formats.storing import attention_layers as attention_layers
from jlora.formats.storing import everything as everything
from jlora.formats.storing import linear_layers as linear_layers

__all__ = [
  "Adapter",
  "Fingerprint",
  "LLAMACPP",
  "OtherBaseWarning",
  "PEFT",
  "Packed",
  "PeftAdapter",
  "Profile",
  "VLLM",
  "attention_layers",
  "bits_within",
  "check_fingerprint",
  "everything",
  "fingerprint",
  "kohya_layers",
  "linear_layers",
  "load_packed",
  "load_peft",
  "open_adapter",
  "open_components",
  "open_pair",
  "pack",
  "read_fingerprint",
  "save_comfy",
  "save_diffusers",
  "save_gguf",
  "save_kohya",
  "save_maxtext",
  "save_mlx",
  "save_packed",
  "save_peft",
  "save_qwix",
  "save_tunix",
  "to_qwix",
  "unpack",
]
