# SPDX-License-Identifier: Apache-2.0
"""Code that several questions share; a file here has no `main`."""
