# SPDX-License-Identifier: Apache-2.0
"""Small exact reference models that read Hugging Face folders."""

from jlora.models.attention import WHOLE as WHOLE
from jlora.models.attention import turns as turns
from jlora.models.decoder import Layer as Layer
from jlora.models.folders import load as load
from jlora.models.folders import read_config as read_config
from jlora.models.folders import save as save
from jlora.models.folders import write_folder as write_folder
from jlora.models.generation import generate as generate
from jlora.models.layers import rms_norm as rms_norm
from jlora.models.names import from_hf as from_hf
from jlora.models.names import hf_name as hf_name
from jlora.models.names import to_hf as to_hf
from jlora.models.networks import Model as Model
from jlora.models.networks import build as build
from jlora.models.networks import init as init
from jlora.models.placement import RULES as RULES
from jlora.models.placement import rules_for as rules_for
from jlora.models.weight_orders import hf_symmetry as hf_symmetry

__all__ = [
  "Layer",
  "Model",
  "RULES",
  "WHOLE",
  "build",
  "from_hf",
  "generate",
  "hf_name",
  "hf_symmetry",
  "init",
  "load",
  "read_config",
  "rms_norm",
  "rules_for",
  "save",
  "to_hf",
  "turns",
  "write_folder",
]
