# SPDX-License-Identifier: Apache-2.0
"""Turns two checkpoints into Loras and a report of what was lost.

extract(base, finetuned)                        trees in memory
extract_checkpoint(base, finetuned, out)        disk to disk, resumable
port_adapter(loras, source, target)             an adapter for an updated base
port_checkpoint(adapter, source, target, out)   likewise, disk to disk
"""

from jlora.extraction.assembly import Policy as Policy
from jlora.extraction.card import write_card as write_card
from jlora.extraction.port_planning import expand_map as expand_map
from jlora.extraction.port_planning import match_rows as match_rows
from jlora.extraction.port_run import PORT as PORT
from jlora.extraction.port_run import port_checkpoint as port_checkpoint
from jlora.extraction.ported_adapters import Ported as Ported
from jlora.extraction.ported_adapters import port_adapter as port_adapter
from jlora.extraction.porting import add as add
from jlora.extraction.porting import both_parts as both_parts
from jlora.extraction.porting import find_spaces as find_spaces
from jlora.extraction.porting import port as port
from jlora.extraction.porting import project as project
from jlora.extraction.porting import rotate as rotate
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
  "PORT",
  "Policy",
  "Ported",
  "REPORT",
  "Report",
  "add",
  "both_parts",
  "change_of_weights",
  "expand_map",
  "extract",
  "extract_checkpoint",
  "find_spaces",
  "ledger_lines",
  "match_rows",
  "module_type",
  "noise_rank",
  "port",
  "port_adapter",
  "port_checkpoint",
  "project",
  "read_report",
  "rotate",
  "rounding_line",
  "total_up",
  "type_table",
  "whole_of",
  "worst_table",
  "write_card",
]
