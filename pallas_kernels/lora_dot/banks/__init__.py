# SPDX-License-Identifier: Apache-2.0
"""Many adapters in one batch: each row takes its own."""
