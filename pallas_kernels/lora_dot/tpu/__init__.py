# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel: its call, its blocks, and the table of their sizes."""
