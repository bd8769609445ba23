# SPDX-License-Identifier: Apache-2.0
"""Merging methods on Loras: the dense change is never formed."""
