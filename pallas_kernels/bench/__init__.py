# SPDX-License-Identifier: Apache-2.0
"""Counts and times the kernels: bytes, cycles, rooflines and clocks."""
