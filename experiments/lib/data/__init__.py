# SPDX-License-Identifier: Apache-2.0
"""Texts, images, models and checkpoints that experiments read or write."""
