# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the texts, images, models and checkpoints of experiments."""
