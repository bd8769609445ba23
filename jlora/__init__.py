# SPDX-License-Identifier: Apache-2.0
"""Weight changes as composable programs: two checkpoints in, a LoRA out.

checkpoints ─► deltas ─► factors ─► {path: Lora} ─► measured, exported
"""

from jlora.application import apply as apply
from jlora.assembly import Spectra as Spectra
from jlora.certificates import Certificate as Certificate
from jlora.certificates import certificate as certificate
from jlora.checkpoints import Checkpoint as Checkpoint
from jlora.checkpoints import open_checkpoint as open_checkpoint
from jlora.checkpoints import save_orbax as save_orbax
from jlora.deltas import is_matrix as is_matrix
from jlora.divergences import Divergence as Divergence
from jlora.divergences import Score as Score
from jlora.divergences import mean_kl as mean_kl
from jlora.divergences import recovered as recovered
from jlora.divergences import score as score
from jlora.evaluation import compare as compare
from jlora.exporting import PEFT as PEFT
from jlora.exporting import VLLM as VLLM
from jlora.exporting import load_peft as load_peft
from jlora.exporting import save_merged as save_merged
from jlora.exporting import save_peft as save_peft
from jlora.extraction import extract as extract
from jlora.factoring import cheapest as cheapest
from jlora.factoring import gram as gram
from jlora.factoring import krylov as krylov
from jlora.factoring import recompress as recompress
from jlora.factoring import svd as svd
from jlora.loras import Factors as Factors
from jlora.loras import Lora as Lora
from jlora.loras import Loras as Loras
from jlora.loras import dense as dense
from jlora.loras import from_factors as from_factors
from jlora.moments import Moment as Moment
from jlora.moments import second_moments as second_moments
from jlora.moments import weighted_error as weighted_error
from jlora.pairing import common_rows as common_rows
from jlora.pairing import keep_whole as keep_whole
from jlora.pairing import refuse as refuse
from jlora.paths import matching as matching
from jlora.reporting import Report as Report
from jlora.reporting import read_report as read_report
from jlora.runs import extract_checkpoint as extract_checkpoint

__all__ = [
  "PEFT",
  "VLLM",
  "Certificate",
  "Checkpoint",
  "Divergence",
  "Factors",
  "Lora",
  "Loras",
  "Moment",
  "Report",
  "Score",
  "Spectra",
  "apply",
  "certificate",
  "cheapest",
  "common_rows",
  "compare",
  "dense",
  "extract",
  "extract_checkpoint",
  "from_factors",
  "gram",
  "is_matrix",
  "keep_whole",
  "krylov",
  "load_peft",
  "matching",
  "mean_kl",
  "open_checkpoint",
  "read_report",
  "recompress",
  "recovered",
  "refuse",
  "save_merged",
  "save_orbax",
  "save_peft",
  "score",
  "second_moments",
  "svd",
  "weighted_error",
]
