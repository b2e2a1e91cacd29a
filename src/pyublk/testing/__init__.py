# SPDX-License-Identifier: MIT
"""Targets tested anywhere: disks without a kernel, faults, power cuts, and a shadow to compare
with."""

from pyublk.layers.faults import Faulty
from pyublk.testing.client import AsyncDisk
from pyublk.testing.disk import Disk
from pyublk.testing.power_cuts import CheckFailed, Crash, PowerCut, PowerCutFailed, Volatile
from pyublk.testing.shadow import Shadow

__all__ = [
    "AsyncDisk",
    "CheckFailed",
    "Crash",
    "Disk",
    "Faulty",
    "PowerCut",
    "PowerCutFailed",
    "Shadow",
    "Volatile",
]
