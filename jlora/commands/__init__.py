# SPDX-License-Identifier: Apache-2.0
"""What users run: `jlora extract`, `merge`, `plan`, `port`, `serve`, and so on.

Each is also `python -m jlora.commands.NAME`. The names here are what other
scripts need; nothing is imported before it is asked for, so that `jlora` alone
answers at once, and no command's flags are known to another.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jlora.commands.caches import cache_folder as cache_folder
  from jlora.commands.caches import keep_compilations as keep_compilations
  from jlora.commands.entry import start as start

_HOMES = {
  "cache_folder": "caches",
  "keep_compilations": "caches",
  "start": "entry",
}

__all__ = ["cache_folder", "keep_compilations", "start"]


def __getattr__(name: str) -> Any:
  """Imports a name when it is first asked for."""
  if name not in _HOMES:
    raise AttributeError(f"module 'jlora.commands' has no attribute {name!r}")
  home = importlib.import_module(f"jlora.commands.{_HOMES[name]}")
  globals()[name] = getattr(home, name)
  return globals()[name]


def __dir__() -> list[str]:
  """Lists what `jlora.commands.` completes to, imported or not."""
  return sorted({*globals(), *_HOMES})
