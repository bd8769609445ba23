# SPDX-License-Identifier: Apache-2.0
"""Compiling for accelerators that are not there, and reading the result."""
