# SPDX-License-Identifier: Apache-2.0
"""Weight changes as composable programs, in JAX."""
