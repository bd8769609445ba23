# SPDX-License-Identifier: Apache-2.0
"""Lists of offenders, as errors name them."""


def name_some(offenders, most: int = 3) -> str:
  """Up to three offenders by name and the count of the rest, for an error.

  Args:
    offenders: any sequence of things to print.
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
