# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, for other tools and in few bits.

`save_peft` and `load_peft` are PEFT's folders, `pack` keeps factors in few
bits. Whatever a format cannot carry is returned with a reason, never dropped.
"""

from jlora.formats.packed import Packed as Packed
from jlora.formats.packed import bits_within as bits_within
from jlora.formats.packed import load_packed as load_packed
from jlora.formats.packed import pack as pack
from jlora.formats.packed import save_packed as save_packed
from jlora.formats.packed import unpack as unpack
from jlora.formats.peft.layouts import PEFT as PEFT
from jlora.formats.peft.layouts import VLLM as VLLM
from jlora.formats.peft.layouts import Profile as Profile
from jlora.formats.peft.reading import PeftAdapter as PeftAdapter
from jlora.formats.peft.reading import load_peft as load_peft
from jlora.formats.peft.writing import save_peft as save_peft

__all__ = [
  "PEFT",
  "Packed",
  "PeftAdapter",
  "Profile",
  "VLLM",
  "bits_within",
  "load_packed",
  "load_peft",
  "pack",
  "save_packed",
  "save_peft",
  "unpack",
]
