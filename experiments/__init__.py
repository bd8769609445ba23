# SPDX-License-Identifier: Apache-2.0
"""Runnable questions; each module is one command."""

import logging

# Every script begins here. That a machine has no TPU is no news.
logging.getLogger("jax").setLevel(logging.WARNING)
