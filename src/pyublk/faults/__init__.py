# SPDX-License-Identifier: MIT
"""Faults and limits: what a disk's queues do to its requests, whatever target serves them."""

from pyublk.faults.filters import FaultFilter
from pyublk.faults.rules import BURST, Faults, Rule, WithFaults

__all__ = ["BURST", "FaultFilter", "Faults", "Rule", "WithFaults"]
