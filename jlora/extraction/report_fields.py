# SPDX-License-Identifier: Apache-2.0
"""What stands in a report.json, field by field, for who reads one."""

from typing import Any

from jlora.checkpoints.documents import (
  NULL,
  OBJECT,
  REAL,
  SIZE,
  TEXT,
  Kind,
  check_fields,
  either,
  list_of,
  record_of,
  shortened,
  table_of,
)
from jlora.messages import name_some

_MAYBE = either(REAL, NULL)
_SHAPE = Kind(
  "a list of two sizes or more",
  lambda value: list_of(SIZE).fits(value) and len(value) > 1,
)
_ROW = {
  "path": TEXT,
  "shape": _SHAPE,
  "rank": SIZE,
  "norm": REAL,
  "error": REAL,
  "relative_error": REAL,
  "energy": REAL,
  "relative_change": _MAYBE,
  "optimality": _MAYBE,
  "stable_rank": REAL,
  "noise_floor_rank": SIZE,
  "singular_values": list_of(REAL),
  "bytes": SIZE,
  "parameter_bytes": SIZE,
}
# What rounding did, which older reports do not tell.
_ROUNDING = dict.fromkeys(
  ("learnt_norm", "rounding_share", "unchanged"), either(REAL, NULL)
)
_LEDGER_ROW = {
  "base": list_of(TEXT),
  "finetuned": list_of(TEXT),
  "status": TEXT,
  "why": TEXT,
}
_OF_BOTH = record_of({"base": SIZE, "finetuned": SIZE})
_TOTALS = {
  "modules": SIZE,
  "relative_error": REAL,
  "energy": REAL,
  "adapter_bytes": SIZE,
  "parameter_bytes": SIZE,
  "ledger": table_of(SIZE),
}
_UNMATCHED = {"floating_bytes": _OF_BOTH, "unmatched_bytes": _OF_BOTH}
_SETTINGS = {"base": TEXT, "finetuned": TEXT, "profile": TEXT}
_VERIFIED = record_of(
  {"by": TEXT, "version": TEXT, "modules": SIZE, "worst_difference": _MAYBE}
)
_FIELDS = {
  "settings": OBJECT,
  "modules": list_of(OBJECT),
  "totals": OBJECT,
  "ledger": list_of(OBJECT),
  "verified": either(_VERIFIED, NULL),
  "run": either(OBJECT, NULL),
}
_OPTIONAL = {"verified", "run"}


def check_report(found: Any, place: str, version: int) -> dict[str, Any]:
  """Raises unless a document is a report of this version, in all its fields.

  Args:
    found: the parsed document.
    place: the file, for errors.
    version: of the schema.

  Returns:
    Its fields, without the version.

  Raises:
    ValueError: names the first rows that are not as they should be.

  Example:
    >>> check_report({"schema_version": 7}, "report.json", 1)
    Traceback (most recent call last):
    ...
    ValueError: report.json has schema version 7, this jlora reads 1: make it
    anew with this one.
  """
  found = dict(check_fields(found, {}, place))
  if (said := found.pop("schema_version", None)) != version:
    raise ValueError(
      f"{place} has schema version {shortened(said)}, this jlora reads "
      f"{version}: make it anew with this one."
    )
  check_fields(found, _FIELDS, place, required=_FIELDS.keys() - _OPTIONAL)
  if other := found.keys() - _FIELDS.keys():
    raise ValueError(
      f"{place}: {name_some(map(shortened, sorted(other)))}: no field of a "
      "report; take it out."
    )
  check_fields(found["settings"], _SETTINGS, f"{place}: settings")
  totals, said = found["totals"], f"{place}: totals"
  both = _UNMATCHED if _UNMATCHED.keys() & totals else {}
  fields = {**_TOTALS, **_ROUNDING, "not_identifiable": SIZE, **both}
  check_fields(totals, fields, said, required=[*_TOTALS, *both])
  for at, row in enumerate(found["modules"]):
    here = f"{place}: modules, {at}"
    check_fields(row, {**_ROW, **_ROUNDING}, here, required=[*_ROW])
  for at, row in enumerate(found["ledger"]):
    here = f"{place}: ledger, {at}"
    check_fields(row, _LEDGER_ROW, here, required=[*_LEDGER_ROW])
    if not row["base"] and not row["finetuned"]:
      raise ValueError(f"{here} names no tensor; mend it")
  return found
