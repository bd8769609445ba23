# SPDX-License-Identifier: Apache-2.0
"""Damaged files sent through every door that reads files."""
