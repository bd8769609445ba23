# SPDX-License-Identifier: Apache-2.0
"""What a change does to a model's outputs and texts."""
