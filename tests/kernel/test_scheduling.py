# SPDX-License-Identifier: MIT
"""The I/O scheduler of a real disk, and the policy of the threads that serve it."""

import errno
import os
import threading
from threading import Event

import pytest

import pyublk
from pyublk.scheduling import io_scheduler
from pyublk.targets import Null, Zoned
from tests.kernel.blocks import Blocks
from tests.kernel.conftest import Serve


def policies(disk: pyublk.Device) -> set[int]:
    """Of the threads that serve a disk."""
    threads = [
        thread for thread in threading.enumerate() if thread.name.startswith(f"ublk{disk.id}-q")
    ]
    assert len(threads) == disk.info().queues
    return {os.sched_getscheduler(thread.native_id or 0) for thread in threads}


@pytest.mark.parametrize("queues", [1, 2])
def test_a_disk_has_no_scheduler_and_threads_that_never_interrupt(
    serve: Serve, queues: int
) -> None:
    disk = serve(Null(size=1 << 30), queues=queues)
    assert io_scheduler(disk.path) == "none"
    assert policies(disk) == {os.SCHED_BATCH}


def test_the_kernels_own_choices(serve: Serve) -> None:
    disk = serve(Null(size=1 << 30), io_scheduler=None, preempt=True)
    assert io_scheduler(disk.path) == "mq-deadline"
    assert policies(disk) == {os.SCHED_OTHER}


def test_a_scheduler_by_its_name(serve: Serve) -> None:
    disk = serve(Null(size=1 << 30), queues=2, io_scheduler="mq-deadline")
    assert io_scheduler(disk.path) == "mq-deadline"


def test_a_zoned_disk_keeps_the_kernels_scheduler(serve: Serve) -> None:
    target = Zoned(size=64 << 20, zone_size=4 << 20)
    kept = io_scheduler(serve(target, io_scheduler=None).path)
    disk = serve(Zoned(size=64 << 20, zone_size=4 << 20))
    assert io_scheduler(disk.path) == kept


def test_a_scheduler_that_the_kernel_has_not(serve: Serve) -> None:
    with pytest.raises(ValueError, match=r"io_scheduler must be one of .*none.*, not 'cfq'"):
        serve(Null(size=1 << 30), io_scheduler="cfq")


class Unwilling(pyublk.Target):
    """Answers no read until it may: of the partition scan, too."""

    def __init__(self) -> None:
        super().__init__(size=1 << 20)
        self.may_answer = Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        self.may_answer.wait(30)

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.EIO, "not to be written to")


def test_requests_in_flight_hold_up_no_start_for_long(serve: Serve) -> None:
    features = pyublk.Controller().features()
    if not features.has(pyublk.uapi.Feature.BATCH_IO):
        pytest.skip("Linux before 7.0 may look for partitions before the start returns")
    target = Unwilling()
    disk = serve(target)
    assert disk.state is pyublk.DeviceState.LIVE
    target.may_answer.set()
    with Blocks(disk.path) as blocks:
        assert blocks.read(512, 0) == bytes(512)
