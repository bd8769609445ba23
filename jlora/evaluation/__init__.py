# SPDX-License-Identifier: Apache-2.0
"""What Loras lose and why: in the weights, in the outputs, to each other."""

from jlora.evaluation.conflicts import compare_adapters as compare_adapters
from jlora.evaluation.conflicts import find_intruders as find_intruders
from jlora.evaluation.interference import Interference as Interference
from jlora.evaluation.interference import interference as interference
from jlora.evaluation.outputs import Divergence as Divergence
from jlora.evaluation.outputs import Score as Score
from jlora.evaluation.outputs import divergence_of as divergence_of
from jlora.evaluation.outputs import mean_kl as mean_kl
from jlora.evaluation.outputs import recovered as recovered
from jlora.evaluation.outputs import score as score
from jlora.evaluation.overlaps import compare_layers as compare_layers
from jlora.evaluation.overlaps import link_layers as link_layers
from jlora.evaluation.overlaps import overlap as overlap
from jlora.evaluation.weights import Comparison as Comparison
from jlora.evaluation.weights import compare as compare
from jlora.evaluation.weights import spectral_norm as spectral_norm

__all__ = [
  "Comparison",
  "Divergence",
  "Interference",
  "Score",
  "compare",
  "compare_adapters",
  "compare_layers",
  "divergence_of",
  "find_intruders",
  "interference",
  "link_layers",
  "mean_kl",
  "overlap",
  "recovered",
  "score",
  "spectral_norm",
]
