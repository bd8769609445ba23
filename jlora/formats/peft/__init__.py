# SPDX-License-Identifier: Apache-2.0
"""PEFT adapter folders: planned, written and read."""
