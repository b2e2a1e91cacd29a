# SPDX-License-Identifier: MIT
"""Targets that are a C function: called without the GIL, by every queue's thread."""

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyublk._native import Queue, address
from pyublk.engines.base import Engine, Setup
from pyublk.errors import InvalidTarget
from pyublk.target import NativeTarget, Target
from pyublk.uapi import IOFlag, Op

_Handler = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_void_p,
)
NO_FLAGS = IOFlag(0)
#: What a function is given as the bytes of a request that has none.
_NOTHING = bytearray(8)


class NativeEngine(Engine):
    """Serves by `NativeTarget.handler`."""

    kind = "native"
    target: NativeTarget

    def begin(self, setup: Setup) -> None:
        target = self.target
        if not target.handler:
            raise InvalidTarget(
                f"{type(target).__name__}.handler is 0: set it before open() returns"
            )
        self._served = target.handler, target.context, target.blind

    def serve(self, queues: list[Queue]) -> None:
        handler, context, blind = self._served
        queues[0].serve_native(handler, context, blind=blind)

    def turns(self, queue: Queue) -> Callable[[], bool]:
        handler, context, blind = self._served
        return partial(queue.turn_native, handler, context, blind=blind)

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        return announced(self.target, FunctionMethods(self.target))


class FunctionMethods:
    """Calls the function as a target's methods are called, without the GIL."""

    def __init__(self, target: NativeTarget) -> None:
        self._target = target

    def read(self, offset: int, buffer: memoryview) -> None:
        self._call(Op.READ, NO_FLAGS, offset, len(buffer), buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._call(Op.WRITE, NO_FLAGS, offset, len(data), data)

    def write_fua(self, offset: int, data: memoryview) -> None:
        self._call(Op.WRITE, IOFlag.FUA, offset, len(data), data)

    def flush(self) -> None:
        self._call(Op.FLUSH, NO_FLAGS, 0, 0, _NOTHING)

    def discard(self, offset: int, length: int) -> None:
        self._call(Op.DISCARD, NO_FLAGS, offset, length, _NOTHING)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        flags = NO_FLAGS if unmap else IOFlag.NOUNMAP
        self._call(Op.WRITE_ZEROES, flags, offset, length, _NOTHING)

    def _call(
        self, op: Op, flags: IOFlag, offset: int, length: int, memory: memoryview | bytearray
    ) -> None:
        function = _Handler(self._target.handler)
        result = function(self._target.context, op, flags, offset, length, address(memory))
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def announced(target: Target, methods: object) -> Mapping[str, Callable[..., Any]]:
    """Those of the methods whose requests the target takes."""
    names = ("read", "write", "write_fua", "flush", "discard", "write_zeroes")
    return {name: getattr(methods, name) for name in names if target.announces(name)}
