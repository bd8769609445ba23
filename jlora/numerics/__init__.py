# SPDX-License-Identifier: Apache-2.0
"""Numerical helpers for NumPy, JAX and sharded arrays; internal.

NumPy and JAX arrays go through one algorithm (`backends`), on meshes of devices
too (`meshes`). Nothing here knows of Loras, and users need nothing of it.
"""
