# SPDX-License-Identifier: Apache-2.0
"""Writes a comparison as the study's own script did: results.json by matrix."""

import json
import os
from pathlib import Path
from typing import Any

from jlora.checkpoints import replace_text
from jlora.extraction import Report


def study_rows(report: Report) -> dict[str, dict[str, Any]]:
  """Returns {matrix: figures} in the shape of the study's script.

  Args:
    report: at the rank to show.

  Returns:
    {name: {loss: {mse, cosine_distance}, mean_diff_value, diff_rank}}. The loss
    is between the change and its LoRA; `mean_diff_value` is the mean magnitude
    of the change; `diff_rank` counts its singular values above the rounding of
    the stored dtype, of those that were computed.

  Example:
    >>> row = {"path": "q", "mse": 0.5, "cosine_distance": 0.1,
    ...        "mean_abs_delta": 2.0, "noise_floor_rank": 3}
    >>> study_rows(Report({}, [row], {}, []))
    {'q': {'loss': {'mse': 0.5, 'cosine_distance': 0.1}, \
'mean_diff_value': 2.0, 'diff_rank': 3}}
  """
  return {
    row["path"]: {
      "loss": {"mse": row["mse"], "cosine_distance": row["cosine_distance"]},
      "mean_diff_value": row["mean_abs_delta"],
      "diff_rank": row["noise_floor_rank"],
    }
    for row in report.modules
  }


def write_study(path: str | os.PathLike[str], report: Report) -> None:
  """Writes the study's results.json, atomically.

  Args:
    path: the file; its folder must exist.
    report: at the rank to show.
  """
  replace_text(Path(path), json.dumps(study_rows(report), indent=2) + "\n")
