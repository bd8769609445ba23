# SPDX-License-Identifier: Apache-2.0
"""Questions to run, one command each: `python -m experiments.NAME`."""

import logging

# Every script begins here. That a machine has no TPU is no news.
logging.getLogger("jax").setLevel(logging.WARNING)
