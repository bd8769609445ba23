# SPDX-License-Identifier: Apache-2.0
"""What several questions share; a file here has no `main`."""
