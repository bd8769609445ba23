# SPDX-License-Identifier: Apache-2.0
"""What `jlora serve` is made of; loaded by that command alone."""
