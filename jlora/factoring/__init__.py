# SPDX-License-Identifier: Apache-2.0
"""Turning weight changes into low-rank factors, with certificates of the error.

    delta (..., m, n) -> Factors(u, s, vt),   certificate: exact errors by rank

Factorisers are functions of one signature: `svd`, `gram`, `krylov`. `whitened`
weighs the error by what a layer reads and writes.
"""

from jlora.factoring.certificates import Certificate as Certificate
from jlora.factoring.certificates import certificate as certificate
from jlora.factoring.deltas import survey as survey
from jlora.factoring.factorisers import cheapest as cheapest
from jlora.factoring.factorisers import gram as gram
from jlora.factoring.factorisers import krylov as krylov
from jlora.factoring.factorisers import recompress as recompress
from jlora.factoring.factorisers import svd as svd
from jlora.factoring.figures import row_of as row_of
from jlora.factoring.figures import summarise as summarise
from jlora.factoring.moments import Moment as Moment
from jlora.factoring.moments import dense_inputs as dense_inputs
from jlora.factoring.moments import second_moments as second_moments
from jlora.factoring.moments import weighted_error as weighted_error
from jlora.factoring.rounding import ulp_histogram as ulp_histogram
from jlora.factoring.whitening import Weight as Weight
from jlora.factoring.whitening import diagonal as diagonal
from jlora.factoring.whitening import full as full
from jlora.factoring.whitening import whitened as whitened

__all__ = [
  "Certificate",
  "Moment",
  "Weight",
  "certificate",
  "cheapest",
  "dense_inputs",
  "diagonal",
  "full",
  "gram",
  "krylov",
  "recompress",
  "row_of",
  "second_moments",
  "summarise",
  "survey",
  "svd",
  "ulp_histogram",
  "weighted_error",
  "whitened",
]
