# SPDX-License-Identifier: Apache-2.0
"""Merges from disk to disk, one tensor at a time."""
