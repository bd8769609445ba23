# SPDX-License-Identifier: Apache-2.0
"""Runs `jlora extract`, under its former name."""

from jlora.commands import start

if __name__ == "__main__":
  start("extract")
