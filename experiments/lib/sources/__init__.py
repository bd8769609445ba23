# SPDX-License-Identifier: Apache-2.0
"""Reads the source code of other libraries, without running it."""
