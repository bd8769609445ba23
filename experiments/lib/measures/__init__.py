# SPDX-License-Identifier: Apache-2.0
"""Measures what a change does to a model's outputs and texts."""
