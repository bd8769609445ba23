# SPDX-License-Identifier: Apache-2.0
"""What comes up while a program runs: missing rules, and the notes of gates."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jlora.adapting.adapted import Adapted
from jlora.messages import name_some

Notes = dict[str, list[Any]]


class Said(NamedTuple):
  """Who is told what comes up while a program runs.

  Attributes:
    missing: called with the name of a primitive and an Adapted operand when a
      rule is missing, before the dense sum is formed; may raise.
    notes: None, or path -> the notes that gates made there, to be added to.
  """

  missing: Callable[[str, Adapted], None]
  notes: Notes | None = None

  def within(self) -> "Said":
    """Returns one for a body that is traced apart, with notes of its own."""
    return self if self.notes is None else self._replace(notes={})

  def add(self, notes: Notes | None) -> None:
    """Adds notes, such as those of a body once they are out of it."""
    if self.notes is not None:
      for path, found in (notes or {}).items():
        self.notes.setdefault(path, []).extend(found)

  def refuse(self, name: str) -> None:
    """Raises ValueError if a body, which notes cannot leave, made some."""
    if self.notes:
      raise ValueError(
        f"The gates of {name_some(self.notes)} make notes within {name}, from "
        "which adapt cannot hand them on; take it out of the function, or do "
        "without has_notes."
      )
