# SPDX-License-Identifier: Apache-2.0
"""The compilation cache that the scripts share: a program is compiled once."""

import os

import jax

from experiments import smollm2


def keep_compilations(cache: str | os.PathLike[str] | None = None) -> None:
  """Makes JAX keep compiled programs in the user's cache folder.

  Scripts call this, the library never does: it is the process's own setting.

  Args:
    cache: as `smollm2.cache_folder`.
  """
  folder = smollm2.cache_folder(cache) / "compilations"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
