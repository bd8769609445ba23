# SPDX-License-Identifier: Apache-2.0
"""What every long run from disk to disk needs.

A journal of what is finished, several processes that agree on what they do, and
a watch that tells when one of them is lost.
"""

from jlora.runs.processes import LostProcess as LostProcess

__all__ = [
  "LostProcess",
]
