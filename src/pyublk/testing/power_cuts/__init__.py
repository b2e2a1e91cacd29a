# SPDX-License-Identifier: MIT
"""Power cuts: the disks that may be left by one, of a disk with a volatile write cache.

record       what was done, in which order, and what is stable since when
states       what may be left of it, in the order in which it tells most
filesystems  mounting and checking what is left
crash        one of these disks
checks       trying them, and the smallest loss at which a check fails
log_writes   the record in the format of dm-log-writes
saved        the record in a file of its own
recording    what every such disk has
cut          the disk
zoned        one with zones
"""

from pyublk.testing.file_systems import CheckFailed
from pyublk.testing.power_cuts.checks import PowerCutFailed
from pyublk.testing.power_cuts.crash import Crash
from pyublk.testing.power_cuts.cut import PowerCut
from pyublk.testing.power_cuts.record import Write
from pyublk.testing.power_cuts.recording import Volatile
from pyublk.testing.power_cuts.zoned import ZonedPowerCut

__all__ = [
    "CheckFailed",
    "Crash",
    "PowerCut",
    "PowerCutFailed",
    "Volatile",
    "Write",
    "ZonedPowerCut",
]
