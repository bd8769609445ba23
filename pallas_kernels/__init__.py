# SPDX-License-Identifier: Apache-2.0
"""Kernels on arrays; imports jax and nothing of jlora."""
