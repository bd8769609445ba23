# SPDX-License-Identifier: Apache-2.0
"""Small exact reference models that read Hugging Face folders."""

from jlora.models.decoder import init as init
from jlora.models.folders import load as load
from jlora.models.folders import read_config as read_config
from jlora.models.folders import save as save
from jlora.models.names import from_hf as from_hf
from jlora.models.names import hf_module as hf_module
from jlora.models.names import to_hf as to_hf

__all__ = [
  "from_hf",
  "hf_module",
  "init",
  "load",
  "read_config",
  "save",
  "to_hf",
]
