# SPDX-License-Identifier: Apache-2.0
"""Arrays on the host, compiled or sharded; knows no Lora.

NumPy and JAX arrays go through one algorithm (`backends`), on meshes of devices
too (`meshes`). Users need nothing of it.
"""
