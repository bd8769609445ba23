# SPDX-License-Identifier: Apache-2.0
"""What the scripts keep between runs: downloads, models, compiled programs."""

import os
import pathlib

import jax


def cache_folder(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
  """Returns the folder of downloads and models: `cache`, or the user's own.

  Args:
    cache: a folder, or None for `$XDG_CACHE_HOME/jlora`, `~/.cache/jlora`.

  Returns:
    The path; it need not exist yet.

  Example:
    >>> cache_folder("/scratch/me").name
    'me'
  """
  if cache is not None:
    return pathlib.Path(cache)
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "jlora"


def keep_compilations(cache: str | os.PathLike[str] | None = None) -> None:
  """Makes JAX keep compiled programs in the user's cache folder.

  Scripts call this, the library never does: it is the process's own setting.

  Args:
    cache: as `cache_folder`.

  Example:
    >>> was = jax.config.jax_compilation_cache_dir
    >>> keep_compilations("/scratch/me")
    >>> jax.config.jax_compilation_cache_dir
    '/scratch/me/compilations'
    >>> jax.config.update("jax_compilation_cache_dir", was)
  """
  folder = cache_folder(cache) / "compilations"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
