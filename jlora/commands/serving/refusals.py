# SPDX-License-Identifier: Apache-2.0
"""What a server refuses, in the form in which OpenAI's clients read it."""

from typing import Any

# Status -> the word that clients have for such errors.
_TYPES = {
  404: "not_found_error",
  408: "timeout_error",
  500: "server_error",
  503: "server_error",
  504: "timeout_error",
}


class Refused(Exception):
  """A request, or a part of one, that is not carried out, and why.

  Attributes:
    status: of HTTP.
    code: a word for programs.
  """

  def __init__(self, status: int, code: str, message: str):
    super().__init__(message)
    self.status, self.code = status, code

  def body(self) -> dict[str, Any]:
    """Returns the error as clients expect it."""
    kind = _TYPES.get(self.status, "invalid_request_error")
    error = {"message": str(self), "type": kind, "code": self.code}
    return {"error": {**error, "param": None}}


def closing() -> Refused:
  """Returns what a server that is being stopped says."""
  return Refused(
    503, "shutting_down", "The server is shutting down; ask again later."
  )
