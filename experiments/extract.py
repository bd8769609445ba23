# SPDX-License-Identifier: Apache-2.0
"""`jlora extract`, under the name it had: two checkpoints in, a LoRA out."""

from jlora.commands import start

if __name__ == "__main__":
  start("extract")
