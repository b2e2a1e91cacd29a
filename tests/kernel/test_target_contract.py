"""What a disk owes its clients, on a real one."""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest
from blocks import Blocks
from conftest import Serve
from zones import manage, report

import pyublk
from pyublk.stats import DeviceStats
from pyublk.uapi import Op
from pyublk.zones import Zone

pytest.register_assert_rewrite("target_contract")

from target_contract import ZONE, TargetContract, target  # noqa: E402

__all__ = ["target"]  # a fixture


class Opened:
    """A client that goes on after a short transfer, as far as the disk goes."""

    def __init__(self, disk: pyublk.Device, client: Blocks) -> None:
        self._disk, self._client = disk, client
        self.faults = disk.faults
        self.stats: Callable[[], DeviceStats] = disk.stats
        self.limit = disk.limit
        self.flush = client.sync
        self.discard = client.discard
        self.write_zeroes = client.zero_out

    @property
    def size(self) -> int:
        return self._client.size

    def pread(self, length: int, offset: int) -> bytes:
        found = b""
        while len(found) < length:
            piece = self._client.read(length - len(found), offset + len(found))
            if not piece:
                raise OSError(errno.EIO, "the end of the disk")
            found += piece
        return found

    def pwrite(self, data: bytes, offset: int) -> int:
        done = 0
        while done < len(data):
            done += self._client.write(data[done:], offset + done)
        return done

    def report_zones(self) -> list[Zone]:
        return report(self._client, self.size // ZONE)

    def manage_zone(self, op: Op, offset: int = 0) -> None:
        manage(self._client, op, offset, self.size if op is Op.ZONE_RESET_ALL else ZONE)


class TestARealDisk(TargetContract):
    COPIED: ClassVar[dict[str, Any]] = {"path": "copy"}

    @pytest.fixture
    def open_disk(self, serve: Serve) -> Iterator[Callable[..., Opened]]:
        with ExitStack() as clients:

            def start(target: pyublk.Target, **options: object) -> Opened:
                disk = serve(target, **options)
                return Opened(disk, clients.enter_context(Blocks(disk.path)))

            yield start
