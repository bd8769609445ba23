# SPDX-License-Identifier: Apache-2.0
"""Loras trained: started, stepped, saved and distilled.

Any program of `adapting` is trained on a frozen base with any optax optimiser.
"""

from jlora.training.distillation import distil as distil
from jlora.training.inits import by_rank as by_rank
from jlora.training.inits import by_root as by_root
from jlora.training.inits import gaussian as gaussian
from jlora.training.inits import init_lora as init_lora
from jlora.training.inits import kaiming as kaiming
from jlora.training.inits import orthogonal as orthogonal
from jlora.training.inits import principal as principal
from jlora.training.inits import relative_to_base as relative_to_base
from jlora.training.inits import split_base as split_base
from jlora.training.snapshots import Snapshot as Snapshot
from jlora.training.snapshots import load_snapshot as load_snapshot
from jlora.training.snapshots import save_snapshot as save_snapshot
from jlora.training.trainer import Trainer as Trainer
from jlora.training.trainer import beside as beside
from jlora.training.trainer import lora_plus as lora_plus
from jlora.training.trainer import summed as summed
from jlora.training.trainer import train as train
from jlora.training.trainer import trained_part as trained_part

__all__ = [
  "Snapshot",
  "Trainer",
  "beside",
  "by_rank",
  "by_root",
  "distil",
  "gaussian",
  "init_lora",
  "kaiming",
  "load_snapshot",
  "lora_plus",
  "orthogonal",
  "principal",
  "relative_to_base",
  "save_snapshot",
  "split_base",
  "summed",
  "train",
  "trained_part",
]
