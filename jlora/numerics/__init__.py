# SPDX-License-Identifier: Apache-2.0
"""Numerical helpers for NumPy, JAX and sharded arrays; internal.

NumPy and JAX arrays go through one algorithm (`backends`), on meshes of devices
too (`meshes`). Nothing here knows of Loras; users may need `norm_of`, the norm
of an array of any size and scale.
"""

from jlora.numerics.sums import norm_of as norm_of

__all__ = ["norm_of"]
