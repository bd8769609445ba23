# SPDX-License-Identifier: Apache-2.0
"""`jlora merge`, under the name it had: checkpoints merged by a recipe."""

from jlora.commands import start

if __name__ == "__main__":
  start("merge")
