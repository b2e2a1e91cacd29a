# SPDX-License-Identifier: MIT
"""io_uring's numbers that `Ring` takes and gives (include/uapi/linux/io_uring.h)."""

from enum import IntEnum, IntFlag
from typing import NamedTuple


class SetupFlag(IntFlag):
    """Flags of io_uring_setup(2); what the kernel accepted is in `Ring.flags`."""

    CQSIZE = 1 << 3
    CLAMP = 1 << 4
    SUBMIT_ALL = 1 << 7
    COOP_TASKRUN = 1 << 8
    TASKRUN_FLAG = 1 << 9
    SQE128 = 1 << 10
    CQE32 = 1 << 11
    SINGLE_ISSUER = 1 << 12
    DEFER_TASKRUN = 1 << 13
    NO_SQARRAY = 1 << 16


class RingFeature(IntFlag):
    """What the kernel says it can do (`Ring.features`); only what matters here has a name."""

    SINGLE_MMAP = 1 << 0
    NODROP = 1 << 1
    SUBMIT_STABLE = 1 << 2
    FAST_POLL = 1 << 5
    EXT_ARG = 1 << 8
    CQE_SKIP = 1 << 11
    REG_REG_RING = 1 << 13
    RECVSEND_BUNDLE = 1 << 14
    MIN_TIMEOUT = 1 << 15


class Opcode(IntEnum):
    """Operations that `Ring.prepare` is commonly given; any other number works too."""

    NOP = 0
    READV = 1
    WRITEV = 2
    FSYNC = 3
    POLL_ADD = 6
    TIMEOUT = 11
    ASYNC_CANCEL = 14
    FALLOCATE = 17
    READ = 22
    WRITE = 23
    MSG_RING = 40
    URING_CMD = 46


#: A kernel that refuses one of these is asked again without, the youngest dropped first.
RECOMMENDED = (
    SetupFlag.SUBMIT_ALL
    | SetupFlag.COOP_TASKRUN
    | SetupFlag.SINGLE_ISSUER
    | SetupFlag.DEFER_TASKRUN
    | SetupFlag.NO_SQARRAY
)


class Completion(NamedTuple):
    """One completion: whose, with what result (negative: -errno), and its flags."""

    user_data: int
    result: int
    flags: int
    extra: bytes = b""  #: the second half of a 32-byte completion (CQE32 rings)
