# SPDX-License-Identifier: Apache-2.0
"""Adapters that experiments make, cut, fit and compare."""
