# SPDX-License-Identifier: Apache-2.0
"""Runnable questions; each module is one command."""
