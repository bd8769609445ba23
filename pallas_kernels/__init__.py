# SPDX-License-Identifier: Apache-2.0
"""Kernels on arrays. Imports jax and nothing of jlora."""
