# SPDX-License-Identifier: Apache-2.0
"""The kernel for NVIDIA Hopper cards, and its call."""
