# SPDX-License-Identifier: Apache-2.0
"""Formats and draws what was measured: tables, plots and pages."""
