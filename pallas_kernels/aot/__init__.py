# SPDX-License-Identifier: Apache-2.0
"""Compiles for accelerators that are not here, and reads the result."""
