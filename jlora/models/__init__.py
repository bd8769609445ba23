# SPDX-License-Identifier: Apache-2.0
"""Small exact reference models that read Hugging Face folders."""

from jlora.models.folders import load as load
from jlora.models.folders import read_config as read_config
from jlora.models.folders import save as save
from jlora.models.generation import generate as generate
from jlora.models.names import from_hf as from_hf
from jlora.models.names import hf_name as hf_name
from jlora.models.names import to_hf as to_hf
from jlora.models.networks import Model as Model
from jlora.models.networks import init as init
from jlora.models.placement import RULES as RULES
from jlora.models.weight_orders import hf_symmetry as hf_symmetry

__all__ = [
  "Model",
  "RULES",
  "from_hf",
  "generate",
  "hf_name",
  "hf_symmetry",
  "init",
  "load",
  "read_config",
  "save",
  "to_hf",
]
