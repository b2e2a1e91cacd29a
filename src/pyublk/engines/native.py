# SPDX-License-Identifier: MIT
"""Targets that are a C function: called without the GIL, by every queue's thread."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pyublk._native import Queue, address
from pyublk.engines.base import Engine, Setup
from pyublk.engines.requests import Request, RequestMethods, announced
from pyublk.errors import InvalidTarget
from pyublk.target import NativeTarget

_Handler = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_void_p,
)
#: Bytes that a function may be asked for by a layer at once: as many as it likes.
_LARGEST = sys.maxsize
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


class FunctionMethods(RequestMethods):
    """Calls the function as a target's methods are called, without the GIL."""

    def __init__(self, target: NativeTarget) -> None:
        super().__init__(_LARGEST)
        self._target = target

    def send(self, requests: Iterable[Request]) -> None:
        function = _Handler(self._target.handler)
        for op, flags, offset, length, memory in requests:
            place = address(memory or _NOTHING)
            result = function(self._target.context, op, flags, offset, length, place)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
