# SPDX-License-Identifier: Apache-2.0
"""Arrays on the host, compiled or sharded; knows no Lora.

NumPy and JAX arrays go through one algorithm (`backends`), on meshes of devices
too (`meshes`). Of it users may need the norm of an array of any size and scale.
"""

from jlora.numerics.sums import norm_of as norm_of

__all__ = ["norm_of"]
