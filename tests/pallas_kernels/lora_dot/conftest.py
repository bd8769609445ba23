# SPDX-License-Identifier: Apache-2.0
"""Puts this folder on the path: the tests below it import `products`."""
