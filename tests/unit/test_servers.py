"""Threads that serve many disks, with queues that have no kernel."""

import asyncio
import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import pyublk
from pyublk import DeviceClosed, DeviceLost, Queue, Servers
from pyublk._native import Handlers
from pyublk.queue_servers import QueueServer, ServingTask
from pyublk.uapi import Op


class Memory(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=1 << 20)
        self.threads: set[str] = set()
        self.may_go = threading.Event()
        self.may_go.set()
        self.error: BaseException | None = None

    def read(self, offset: int, buffer: memoryview) -> None:
        self.threads.add(threading.current_thread().name)
        self.may_go.wait(60)
        if self.error is not None:
            raise self.error

    def write(self, offset: int, data: memoryview) -> None:
        return


class Disks:
    """Tasks, and what became of them."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.failures: list[BaseException] = []

    def begin(self, target: Memory, name: str = "ublk0-q0") -> QueueServer:
        handlers = Handlers(target, lambda _outcome, _io: errno.EIO)

        def turns(queue: Queue) -> Callable[[], bool]:
            return partial(queue.turn, handlers)

        server = self.servers.begin(
            ServingTask(
                name=name,
                make_queues=lambda: [Queue.loopback(depth=2, buffer_size=4096, extra_entries=8)],
                serve=lambda _queues: None,
                turns=turns,
                cpus=None,
                failed=self.failures.append,
                ended=lambda: None,
            )
        )
        assert server.primed.wait(10)
        return server

    def end(self, server: QueueServer) -> None:
        """As a disk's that is given up: without a kernel a queue has no other end."""
        server.sever()
        assert server.ended.wait(10)


def read(server: QueueServer, tag: int = 0) -> int:
    (queue,) = server.queues
    queue.inject(tag, int(Op.READ), 0, 512)
    until = time.monotonic() + 20
    while (result := queue.answered(tag)) is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    return result


@pytest.fixture
def servers() -> Iterator[Servers]:
    with Servers(threads=2) as made:
        yield made
    assert not [one for one in threading.enumerate() if one.name.startswith("ublk-servers")]


def test_queues_are_spread_over_the_threads(servers: Servers) -> None:
    disks, targets = Disks(servers), [Memory() for _ in range(4)]
    begun = [disks.begin(target) for target in targets]
    assert len(servers) == 4
    assert [read(one) for one in begun] == [512] * 4
    names = [name for target in targets for name in target.threads]
    assert names == ["ublk-servers-0", "ublk-servers-1"] * 2
    for one in begun:
        disks.end(one)
    assert len(servers) == 0


def test_they_are_not_closed_under_disks(servers: Servers) -> None:
    disks = Disks(servers)
    begun = disks.begin(Memory(), "ublk7-q0")
    with pytest.raises(RuntimeError, match=r"still serve 1 queue\(s\) \(ublk7-q0\): stop their"):
        servers.close()
    assert read(begun) == 512
    disks.end(begun)


def test_what_is_raised_ends_one_disk(servers: Servers) -> None:
    disks = Disks(servers)
    good, bad = Memory(), Memory()
    bad.error = KeyboardInterrupt()
    stays, goes = disks.begin(good), disks.begin(bad)
    third = disks.begin(Memory())  # on the thread of the first
    read(goes)
    assert read(stays) == read(third) == 512
    for one in (stays, goes, third):
        disks.end(one)


def test_one_that_hangs_holds_up_its_thread_only(servers: Servers) -> None:
    disks = Disks(servers)
    target = Memory()
    target.may_go.clear()
    hangs, other, waits = disks.begin(target), disks.begin(Memory()), disks.begin(Memory())
    (queue,) = hangs.queues
    queue.inject(0, int(Op.READ), 0, 512)
    assert read(other) == 512
    while not target.threads:
        time.sleep(0.001)
    assert hangs.holds()
    assert "may_go.wait" in hangs.stack()
    waits.queues[0].inject(0, int(Op.READ), 0, 512)
    hangs.sever()
    assert not hangs.ended.wait(0.05)
    target.may_go.set()
    assert hangs.ended.wait(10)
    assert [type(one) for one in disks.failures] == [DeviceLost]
    assert read(waits, 1) == 512
    for one in (other, waits):
        disks.end(one)


def test_closed_ones_serve_nobody() -> None:
    servers = Servers()
    servers.close()
    servers.close()
    with pytest.raises(DeviceClosed, match="these servers are closed"):
        Disks(servers).begin(Memory())


def test_a_forked_child_has_no_part_in_them(servers: Servers) -> None:
    if (child := os.fork()) == 0:
        try:
            servers.close()
            Disks(servers).begin(Memory())
        except DeviceClosed:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_dropped_ones_end() -> None:
    Servers()
    assert not [one for one in threading.enumerate() if one.name.startswith("ublk-servers")]


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_numbers_of_threads_that_there_are_not(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be 1 to 1024, not {threads}"):
        Servers(threads)


def test_what_a_device_cannot_be_served_on(servers: Servers) -> None:
    with pytest.raises(TypeError, match="on must be Servers or None, not int"):
        pyublk.Device(Memory(), on=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="affinity is for a disk's own threads"):
        pyublk.Device(Memory(), on=servers, affinity=[[0]])


def test_an_event_loop_of_theirs() -> None:
    with Servers() as servers:
        loop = servers.loop()
        assert loop is servers.loop()
        work = asyncio.run_coroutine_threadsafe(asyncio.to_thread(int, "7"), loop)
        assert work.result(10) == 7
        servers.enter_loop()
        with pytest.raises(RuntimeError, match="1 on the event loop"):
            servers.close()
        servers.leave_loop()
    assert loop.is_closed()


def test_a_callback_that_ends_the_loop_ends_no_disk(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    loop = servers.loop()

    def leave() -> None:
        raise SystemExit(3)

    loop.call_soon_threadsafe(leave)
    loop.call_soon_threadsafe(loop.stop)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(30)
    assert "a callback on a target's event loop raised" in caplog.text


def test_servers_with_a_loop_that_are_dropped_end() -> None:
    servers = Servers()
    servers.loop()
    gone = weakref.ref(servers)
    del servers
    assert gone() is None
    assert not [one for one in threading.enumerate() if one.name.startswith("ublk-servers")]
