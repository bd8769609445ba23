# SPDX-License-Identifier: Apache-2.0
"""Questions to run, one command each: `python -m experiments.NAME`."""
