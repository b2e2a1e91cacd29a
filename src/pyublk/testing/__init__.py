# SPDX-License-Identifier: MIT
"""Targets tested anywhere: disks without a kernel, power cuts, and a shadow to compare with."""

from pyublk.testing.client import AsyncDisk
from pyublk.testing.disk import Disk
from pyublk.testing.power_cuts import (
    CheckFailed,
    Crash,
    PowerCut,
    PowerCutFailed,
    Volatile,
    ZonedPowerCut,
)
from pyublk.testing.shadow import Shadow

__all__ = [
    "AsyncDisk",
    "CheckFailed",
    "Crash",
    "Disk",
    "PowerCut",
    "PowerCutFailed",
    "Shadow",
    "Volatile",
    "ZonedPowerCut",
]
