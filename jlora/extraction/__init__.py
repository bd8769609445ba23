# SPDX-License-Identifier: Apache-2.0
"""Turns two checkpoints into Loras and a report of what was lost.

extract(base, finetuned)                   trees in memory
extract_checkpoint(base, finetuned, out)   disk to disk, resumable
"""

from jlora.extraction.assembly import Policy as Policy
from jlora.extraction.card import write_card as write_card
from jlora.extraction.report import REPORT as REPORT
from jlora.extraction.report import Report as Report
from jlora.extraction.report import change_of_weights as change_of_weights
from jlora.extraction.report import ledger_lines as ledger_lines
from jlora.extraction.report import module_type as module_type
from jlora.extraction.report import noise_rank as noise_rank
from jlora.extraction.report import read_report as read_report
from jlora.extraction.report import rounding_line as rounding_line
from jlora.extraction.report import total_up as total_up
from jlora.extraction.report import type_table as type_table
from jlora.extraction.report import whole_of as whole_of
from jlora.extraction.report import worst_table as worst_table
from jlora.extraction.run import extract_checkpoint as extract_checkpoint
from jlora.extraction.trees import extract as extract

__all__ = [
  "Policy",
  "REPORT",
  "Report",
  "change_of_weights",
  "extract",
  "extract_checkpoint",
  "ledger_lines",
  "module_type",
  "noise_rank",
  "read_report",
  "rounding_line",
  "total_up",
  "type_table",
  "whole_of",
  "worst_table",
  "write_card",
]
