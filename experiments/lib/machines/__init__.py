# SPDX-License-Identifier: Apache-2.0
"""Measures processes, and describes pods and the traffic between devices."""
