# SPDX-License-Identifier: MIT
"""A plugin for `nbdkit python` that does what `handlers.Methods` does; loaded by nbdkit."""

API_VERSION = 2


def open(_readonly: bool) -> int:  # noqa: A001 -- nbdkit's name
    return 1


def get_size(_handle: int) -> int:
    return 250 << 30


def can_multi_conn(_handle: int) -> bool:
    return True


def pread(_handle: int, _buffer: bytearray, _offset: int, _flags: int) -> None:
    return


def pwrite(_handle: int, _data: bytearray, _offset: int, _flags: int) -> None:
    return
