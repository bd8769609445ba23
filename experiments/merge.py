# SPDX-License-Identifier: Apache-2.0
"""Runs `jlora merge`, under its former name."""

from jlora.commands import start

if __name__ == "__main__":
  start("merge")
