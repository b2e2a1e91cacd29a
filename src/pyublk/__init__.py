# SPDX-License-Identifier: MIT
"""Linux block devices written in Python, over ublk.

General layout, from the bottom up; a module imports only from the lines above its own:

    arguments, launch        numbers that callers pass; how the command and a disk's server begin
    uapi, uring              the kernel's numbers and layouts
    files, openers           what the kernel says of a file; who has it open
    keeping                  a file's bytes for one disk only
    errors                   what is raised, and the sentences for it
    _native (over _core/)    Ring, Queue, IO; control commands; native targets
    features, params, stats  what the kernel can do; device parameters; counters
    occupants                who has an id that is taken
    methods                  whether a target's methods can be called as they will be
    zones                    the zones of a zoned disk, and the rules for writing to them
    paths                    the ways a request's data takes, and the choice among them
    control                  Controller: one method per control command
    backing, resizing        the files that hold a disk's bytes; another size for all of them
    scheduling               when a disk's requests and the threads that serve them run
    target, mapped, serving  what a target implements; the ways requests reach it
    zoned, sharing           the base of zoned targets; memory shared with clients
    loops                    queues served on an event loop
    crew                     everyone who serves a device, until nobody holds a request
    device                   Device: queues, threads, start in step, clean stop
    targets/, testing/       the targets that ship; disks without a kernel
    vm/                      a kernel with ublk for machines without
    service/                 daemons that serve a disk: started, recorded, found, stopped
    cli/                     the command
"""

from pyublk import launch as launch  # first: Ctrl-C, from here on
from pyublk._native import IO, Queue, Ring, ShardedLock
from pyublk.control import Controller, DeviceInfo
from pyublk.device import Device, DeviceState
from pyublk.errors import (
    DeviceBusy,
    DeviceClosed,
    DeviceLost,
    FeatureMissing,
    HandlerTimeout,
    InternalError,
    InvalidTarget,
    StaleIO,
    UblkError,
)
from pyublk.features import Features
from pyublk.mapped import MappedTarget
from pyublk.params import Params
from pyublk.paths import DataPath, PathChoice
from pyublk.sharing import SharedMemory
from pyublk.stats import DeviceStats, QueueStats
from pyublk.target import NativeTarget, Target
from pyublk.zoned import ZonedTarget

__all__ = [
    "IO",
    "Controller",
    "DataPath",
    "Device",
    "DeviceBusy",
    "DeviceClosed",
    "DeviceInfo",
    "DeviceLost",
    "DeviceState",
    "DeviceStats",
    "FeatureMissing",
    "Features",
    "HandlerTimeout",
    "InternalError",
    "InvalidTarget",
    "MappedTarget",
    "NativeTarget",
    "Params",
    "PathChoice",
    "Queue",
    "QueueStats",
    "Ring",
    "ShardedLock",
    "SharedMemory",
    "StaleIO",
    "Target",
    "UblkError",
    "ZonedTarget",
]
