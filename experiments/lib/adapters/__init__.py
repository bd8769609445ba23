# SPDX-License-Identifier: Apache-2.0
"""Makes, cuts, fits and compares the adapters of experiments."""
