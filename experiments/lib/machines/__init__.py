# SPDX-License-Identifier: Apache-2.0
"""Processes, pods and the traffic between devices."""
