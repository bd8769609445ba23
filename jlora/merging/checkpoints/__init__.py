# SPDX-License-Identifier: Apache-2.0
"""Merges checkpoints from disk to disk, one tensor at a time."""
