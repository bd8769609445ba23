# SPDX-License-Identifier: Apache-2.0
"""Many small programs here too."""

from tests.jlora.merging.conftest import quick_compilation as quick_compilation
