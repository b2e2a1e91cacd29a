# SPDX-License-Identifier: MIT
"""Targets tested anywhere: disks without a kernel, faults, and a shadow to compare with."""

from pyublk.layers.faults import Faulty
from pyublk.testing.client import AsyncDisk
from pyublk.testing.disk import Disk
from pyublk.testing.shadow import Shadow

__all__ = ["AsyncDisk", "Disk", "Faulty", "Shadow"]
