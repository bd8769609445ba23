# SPDX-License-Identifier: Apache-2.0
"""Merging methods on stacked arrays, (models, ...) -> (...)."""
