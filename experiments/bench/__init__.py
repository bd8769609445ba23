# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, one command each: `python -m experiments.bench.NAME`."""
