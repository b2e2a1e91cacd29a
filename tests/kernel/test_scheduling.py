# SPDX-License-Identifier: MIT
"""The I/O scheduler of a real disk, and the policy of the threads that serve it."""

import errno
import os
import threading
from threading import Event

import pytest
from blocks import Blocks
from conftest import Serve
from needs import CPUs, needs
from servers import until

import pyublk
from pyublk.scheduling import io_scheduler, queue_threads
from pyublk.targets import Null, Zoned


def threads(disk: pyublk.Device) -> list[int]:
    """Those that serve a disk, one for each queue, in their order."""
    names = [f"ublk{disk.id}-q{queue}" for queue in range(disk.info().queues)]
    found = {thread.name: thread.native_id for thread in threading.enumerate()}
    return [found[name] or 0 for name in names]


def policies(disk: pyublk.Device) -> set[int]:
    return {os.sched_getscheduler(thread) for thread in threads(disk)}


@pytest.mark.parametrize("queues", [1, 2])
def test_a_disk_has_no_scheduler_and_threads_that_never_interrupt(
    serve: Serve, queues: int
) -> None:
    disk = serve(Null(size=1 << 30), queues=queues)
    until(lambda: io_scheduler(disk.path) == "none")  # the start does not wait for it
    assert policies(disk) == {os.SCHED_BATCH}


def test_a_stop_on_the_heels_of_a_start(serve: Serve) -> None:
    for _ in range(5):
        disk = serve(Null(size=1 << 30), id=33)
        disk.stop()


def test_the_kernels_own_choices(serve: Serve) -> None:
    disk = serve(Null(size=1 << 30), io_scheduler=None, preempt=True)
    assert io_scheduler(disk.path) == "mq-deadline"
    assert policies(disk) == {os.SCHED_OTHER}


@pytest.mark.parametrize("name", ["mq-deadline", "kyber"])  # kyber: the kernel loads its module
def test_a_scheduler_by_its_name(serve: Serve, name: str) -> None:
    disk = serve(Null(size=1 << 30), queues=2, io_scheduler=name)
    assert io_scheduler(disk.path) == name


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
        self.waited_in_vain = False

    def read(self, offset: int, buffer: memoryview) -> None:
        if not self.may_answer.wait(60):
            self.waited_in_vain = True

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.EIO, "not to be written to")


def test_requests_in_flight_hold_up_no_start_for_long(serve: Serve) -> None:
    needs(pyublk.uapi.Feature.BATCH_IO)  # older ones may look for partitions in the start
    target = Unwilling()
    disk = serve(target)
    assert not target.may_answer.is_set()
    assert not target.waited_in_vain, "the start waited for the read"
    target.may_answer.set()
    with Blocks(disk.path) as blocks:
        assert blocks.read(512, 0) == bytes(512)


# ---- CPUs ----

CPUS = sorted(os.sched_getaffinity(0))


def cpus(disk: pyublk.Device) -> list[set[int]]:
    """Where the threads that serve a disk may run."""
    return [os.sched_getaffinity(thread) for thread in threads(disk)]


def test_a_queues_thread_keeps_to_the_cpus_whose_requests_it_gets(serve: Serve) -> None:
    needs(CPUs(2))
    disk = serve(Null(size=1 << 30), queues=2)
    with pyublk.Controller() as controller:
        wanted = [controller.queue_affinity(disk.id, queue) for queue in range(2)]
    assert cpus(disk) == [set(one) & set(CPUS) for one in wanted]
    assert not cpus(disk)[0] & cpus(disk)[1]


def test_a_queues_thread_keeps_to_cpus_that_are_given(serve: Serve) -> None:
    needs(CPUs(2))
    disk = serve(Null(size=1 << 30), queues=2, affinity=[[CPUS[1]], CPUS])
    assert cpus(disk) == [{CPUS[1]}, set(CPUS)]


def test_a_queues_thread_keeps_to_no_cpus(serve: Serve) -> None:
    assert cpus(serve(Null(size=1 << 30), affinity=None)) == [set(CPUS)]


def test_cpus_that_this_machine_has_not(serve: Serve) -> None:
    words = r"a queue's thread cannot be kept to CPUs \[8191\]: Invalid argument; this process may"
    with pytest.raises(OSError, match=words):
        serve(Null(size=1 << 30), affinity=[[8191]])


def test_which_thread_serves_a_queue_can_be_told_from_outside(serve: Serve) -> None:
    disk = serve(Null(size=1 << 30), queues=2)
    assert queue_threads(os.getpid(), disk.id) == {
        queue: [thread] for queue, thread in enumerate(threads(disk))
    }


def test_a_queue_for_each_of_the_cpus(serve: Serve) -> None:
    cpus = os.cpu_count() or 1
    assert serve(Null(size=1 << 30), queues="max").info().queues == cpus
    assert serve(Null(size=1 << 30), queues=cpus + 3, clamp_queues=True).info().queues == cpus
    with pytest.raises(OSError, match="asked for 4096, the kernel granted"):
        serve(Null(size=1 << 30), queues=4096, depth=1)
