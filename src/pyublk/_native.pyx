# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
# cython: initializedcheck=False, infer_types=True, auto_pickle=False
# SPDX-License-Identifier: MIT
"""The binding of the C core: Ring, Queue, IO, control commands, native targets.

The core owns rings, tags and buffers and never sees Python; this module owns object lifetime, takes
the GIL once per batch of requests, and turns exceptions into errno values. Policy is elsewhere.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.contextvars cimport (
    PyContext_Copy,
    PyContext_CopyCurrent,
    PyContext_Enter,
    PyContext_Exit,
)
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetObject, PyErr_WriteUnraisable
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport (
    errno, EAGAIN, EALREADY, EBUSY, ECHILD, EINTR, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC,
    EOPNOTSUPP, EROFS, ESHUTDOWN, ESTALE, ETIME,
)
from libc.limits cimport INT_MAX
from libc.stdint cimport (
    UINT32_MAX, UINT64_MAX, int32_t, int64_t, intptr_t, uint8_t, uint16_t, uint32_t, uint64_t,
    uintptr_t
)
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close as close_number

import atexit
import errno as _errno
import logging
import os
import warnings
from array import array
from time import monotonic

from pyublk import errors, uapi
from pyublk.arguments import DEFAULT_DEPTH, DEFAULT_MAX_IO_SIZE
from pyublk.uring import Completion

__all__ = [
    "HELPER_PROGRAM",
    "IO",
    "NULL_HANDLER",
    "Buffers",
    "CharDevice",
    "ConnectedQueue",
    "Dispatcher",
    "FileMemory",
    "Gate",
    "GateRule",
    "Handlers",
    "Helper",
    "Layout",
    "MappedQueue",
    "Mapper",
    "MirrorLayout",
    "PresenceLayout",
    "Queue",
    "QueueSet",
    "Ram",
    "Ring",
    "ShardedLock",
    "SharedTable",
    "TraceBuffer",
    "WriteInChild",
    "address",
    "become_io_flusher",
    "name_thread",
    "open_private",
    "process",
    "spawn_helper_for",
    "spawn_helpers_by",
    "this_thread",
    "write_in_child",
]

include "_binding/core.pxi"
include "_binding/threads.pxi"
include "_binding/buffers.pxi"
include "_binding/ring.pxi"
include "_binding/shared.pxi"
include "_binding/io.pxi"
include "_binding/trace.pxi"
include "_binding/gate.pxi"
include "_binding/queue.pxi"
include "_binding/suspended.pxi"
include "_binding/dispatcher.pxi"
include "_binding/layout.pxi"
include "_binding/mirror.pxi"
include "_binding/presence.pxi"
include "_binding/mapped.pxi"
include "_binding/nbd.pxi"
include "_binding/set.pxi"
include "_binding/control.pxi"
include "_binding/targets.pxi"
