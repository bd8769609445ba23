# SPDX-License-Identifier: Apache-2.0
"""Opening, reading and writing checkpoints on disk.

    open_checkpoint(path) -> {name: array}, read when asked for

Safetensors files, Hugging Face folders and orbax directories all become a lazy
mapping. `restore` puts arrays onto devices, each process its own shards.
"""

from jlora.checkpoints.checkpoint import Checkpoint as Checkpoint
from jlora.checkpoints.checkpoint import open_checkpoint as open_checkpoint
from jlora.checkpoints.huggingface import stream_checkpoint as stream_checkpoint
from jlora.checkpoints.merged import save_merged as save_merged
from jlora.checkpoints.new_files import replace_text as replace_text
from jlora.checkpoints.orbax import save_orbax as save_orbax
from jlora.checkpoints.restoring import restore as restore
from jlora.checkpoints.restoring import restore_loras as restore_loras
from jlora.checkpoints.safetensors import write_safetensors as write_safetensors

__all__ = [
  "Checkpoint",
  "open_checkpoint",
  "replace_text",
  "restore",
  "restore_loras",
  "save_merged",
  "save_orbax",
  "stream_checkpoint",
  "write_safetensors",
]
