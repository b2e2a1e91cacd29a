# SPDX-License-Identifier: MIT
"""Linux block devices written in Python, over ublk.

General layout, from the bottom up. A module imports only from the lines above its own, and what is
in a directory also from its own line; `tests/unit/test_rooms.py` reads the map here and holds it.

    arguments, sizes         numbers that callers pass, and their defaults; sizes as text
    launch                   how the command and a disk's server begin
    uapi, files              the kernel's numbers and layouts; what it says of a file
    uring, causes            an io_uring's numbers; why the kernel refuses a command
    openers                  who has a file open
    pauses                   between attempts to reach what is away
    keeping                  a file's bytes for one disk only
    errors                   what is raised, and the sentences for it
    _native                  of _binding/, over _core/: Ring, Queue, IO; commands; native targets
    features, defects        what the kernel can do, and what is wrong with it
    params, stats, tracing   device parameters; counters and latencies; a record of each request
    descriptors              room for the open files of many disks
    claimant                 a program that claims a disk and flushes it
    claiming                 how it is used
    occupants, methods       who has an id that is taken; whether methods can be called as they are
    interruptions            what signals and cancellations may interrupt
    zones                    the zones of a zoned disk, and the rules for writing to them
    recovery                 what becomes of a disk whose server is gone
    paths                    the ways a request's data takes, and the choice among them
    backing                  the files that hold a disk's bytes
    resizing                 another size for all of them
    scheduling               when a disk's requests and the threads that serve them run
    options                  what a disk can be asked for; whoever takes it, takes it from here
    control                  Controller: one method per control command
    profile                  what a target says of itself, as one value
    target                   what a target implements
    deferring                requests that other threads finish for a queue
    mapped, zoned, sharing   the bases of mapped and zoned targets; memory shared with clients
    connected                the base of targets whose server the queues talk to
    faults/                  rules for a disk's requests: faults, limits, the profiles of disks
    queue_servers            who serves some queues: a thread, or a loop
    engines/                 how requests reach a target: one engine for each kind
    servers                  threads that serve the queues of many disks
    kernel_disk, session     a disk's two halves: the kernel's device; one target served on it
    handover                 a disk's requests, from one server to the next
    lifecycle                the steps of a disk's life, in which the two halves meet
    tapped                   what is asked of a disk's queues, whatever serves them
    device                   Device: who takes these steps, and when
    texts                    values of parameters, written as texts
    named                    classes by name, and objects made of them from texts
    layers/                  targets over targets
    targets/                 the targets that ship
    testing/, vm/            disks without a kernel, power cuts; a kernel with ublk
    overlays/                what is done to overlays that no disk uses
    service/                 daemons that serve a disk: started, recorded, found, restarted, stopped
    nbdkit/                  targets served by nbdkit, and disks by it and the nbd driver
    traces/                  what was recorded of a disk: read, summed up, exported, drawn
    pytest_plugin/           disks for other people's tests
    demo                     what `./run demo` shows
    cli/                     the command
"""

from pyublk import launch as launch  # first: Ctrl-C, from here on
from pyublk._native import IO, Layout, MappedQueue, Mapper, Queue, QueueSet, Ring, ShardedLock
from pyublk.control import Controller, DeviceInfo
from pyublk.device import Device
from pyublk.errors import (
    DeviceBusy,
    DeviceClosed,
    DeviceLost,
    DeviceNotFound,
    ExtraMissing,
    FeatureMissing,
    HandlerTimeout,
    InternalError,
    InvalidTarget,
    StaleIO,
    UblkError,
)
from pyublk.features import Features
from pyublk.layers import Layer
from pyublk.lifecycle import DeviceState
from pyublk.mapped import MappedTarget
from pyublk.params import Params
from pyublk.paths import DataPath, PathChoice
from pyublk.profile import Profile
from pyublk.recovery import Recovery
from pyublk.servers import Servers
from pyublk.sharing import SharedMemory
from pyublk.stats import DeviceStats, Histogram, QueueStats
from pyublk.target import NativeTarget, Target
from pyublk.tracing import Trace, TraceSummary
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
    "DeviceNotFound",
    "DeviceState",
    "DeviceStats",
    "ExtraMissing",
    "FeatureMissing",
    "Features",
    "HandlerTimeout",
    "Histogram",
    "InternalError",
    "InvalidTarget",
    "Layer",
    "Layout",
    "MappedQueue",
    "MappedTarget",
    "Mapper",
    "NativeTarget",
    "Params",
    "PathChoice",
    "Profile",
    "Queue",
    "QueueSet",
    "QueueStats",
    "Recovery",
    "Ring",
    "Servers",
    "ShardedLock",
    "SharedMemory",
    "StaleIO",
    "Target",
    "Trace",
    "TraceSummary",
    "UblkError",
    "ZonedTarget",
]
