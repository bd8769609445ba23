# SPDX-License-Identifier: Apache-2.0
"""Lists of names for error messages, cut short."""


def name_some(offenders, most: int = 3) -> str:
  """Lists up to three items by name and counts the rest, for an error message.

  Args:
    offenders: the items, which are printed with `str`.
    most: how many are named.

  Returns:
    "x, y, z and 4 more".

  Example:
    >>> name_some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
  """
  offenders = list(offenders)
  rest = len(offenders) - most
  named = ", ".join(str(offender) for offender in offenders[:most])
  return f"{named} and {rest} more" if rest > 0 else named
