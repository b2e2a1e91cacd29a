# SPDX-License-Identifier: MIT
"""Many disks on a few threads: real ones, under verified load."""

import gc
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest
from blocks import Blocks
from conftest import Serve
from memory import AsyncMemory
from servers import until
from test_queue_by_hand import by_hand

import pyublk
from pyublk._native import QueueSet
from pyublk.engines.methods import MethodsEngine
from pyublk.targets import File, Ram

pytestmark = pytest.mark.timeout(240)

SIZE = 1 << 20


class Memory(pyublk.Target):
    """Keeps bytes; a read waits while it is held."""

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.bytes = bytearray(SIZE)
        self.may_go = threading.Event()
        self.may_go.set()
        self.held = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        if not self.may_go.is_set():
            self.held.set()
            self.may_go.wait(120)
        buffer[:] = self.bytes[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.bytes[offset : offset + len(data)] = data


class HasPath(Protocol):
    @property
    def path(self) -> str: ...


def verify(disks: Sequence[HasPath], rounds: int = 3) -> None:
    """Writes to all, in turns, and reads back what is only that disk's."""
    with ExitStack() as opened:
        clients = [opened.enter_context(Blocks(disk.path)) for disk in disks]
        for turn in range(rounds):
            for number, client in enumerate(clients):
                client.write(bytes([number + turn + 1]) * 4096, turn * 4096)
        for turn in range(rounds):
            for number, client in enumerate(clients):
                assert client.read(4096, turn * 4096) == bytes([number + turn + 1]) * 4096


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if "ublk" in thread.name)


def test_disks_of_every_kind_on_two_threads(serve: Serve, tmp_path: Path) -> None:
    with pyublk.Servers(threads=2) as servers:
        disks = [serve(Ram(size=SIZE), on=servers) for _ in range(2)]
        disks += [serve(Memory(), on=servers) for _ in range(2)]
        disks += [serve(AsyncMemory(SIZE), on=servers) for _ in range(2)]
        disks += [serve(File(tmp_path / f"{n}", size=SIZE), on=servers) for n in range(2)]
        assert len(servers) == 8
        assert threads() == ["ublk-servers-0", "ublk-servers-1", "ublk-servers-loop"]
        verify(disks)
        with pytest.raises(RuntimeError, match=r"still serve 8 queue\(s\) \(ublk\d+-q0, .*first"):
            servers.close()
        for disk in disks:
            disk.stop()
        assert len(servers) == 0
    assert threads() == []


def test_disks_come_and_go_while_others_are_busy(serve: Serve) -> None:
    with pyublk.Servers() as servers:
        stays = serve(Memory(), on=servers)
        over = threading.Event()
        failures: list[BaseException] = []

        def keep_busy() -> None:
            try:
                while not over.is_set():
                    verify([stays], 8)
            except BaseException as error:
                failures.append(error)

        client = threading.Thread(target=keep_busy)
        client.start()
        for _ in range(5):
            disk = serve(Ram(size=SIZE), on=servers)
            verify([disk])
            disk.stop()
        over.set()
        client.join()
        assert failures == []
        stays.stop()


def test_a_handler_that_hangs_holds_up_its_thread_and_is_given_up(serve: Serve) -> None:
    with pyublk.Servers() as servers:
        hangs, waits = Memory(), Memory()
        disk, other = serve(hangs, on=servers, stop_timeout=0.5), serve(waits, on=servers)
        hangs.may_go.clear()

        def read() -> None:
            with Blocks(disk.path) as client, suppress(OSError):
                client.read(512, 0)

        reader = threading.Thread(target=read)
        reader.start()
        assert hangs.held.wait(60)
        with pytest.raises(pyublk.HandlerTimeout):
            disk.stop()
        reader.join(60)
        hangs.may_go.set()
        verify([other])
        other.stop()
        until(lambda: len(servers) == 0)


def test_a_queue_that_fails_ends_its_disk_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_one_of_two_fail(serve, monkeypatch)
    caplog.clear()  # the failure's traceback has the queue, and all that saw it
    gc.collect()


def let_one_of_two_fail(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with pyublk.Servers() as servers:
        other = serve(Ram(size=SIZE), on=servers)
        fails = threading.Event()
        turns = MethodsEngine.turns

        def turns_that_may_fail(engine: MethodsEngine, queue: pyublk.Queue) -> Callable[[], bool]:
            turn = turns(engine, queue)

            def take() -> bool:
                if fails.is_set():
                    raise OSError("the ring is gone")
                return turn()

            return take

        monkeypatch.setattr(MethodsEngine, "turns", turns_that_may_fail)
        disk = pyublk.Device(Memory(), on=servers)
        disk.start()
        fails.set()
        with Blocks(disk.path) as client, pytest.raises(OSError, match="Input/output"):
            client.read(512, 0)
        with pytest.raises(OSError, match="the ring is gone"):
            disk.wait(60)
        until(lambda: disk.state is pyublk.DeviceState.STOPPED)
        verify([other])
        other.stop()
        until(lambda: len(servers) == 0)


def test_a_forked_child_has_no_part_in_them(serve: Serve) -> None:
    with pyublk.Servers() as servers:
        disk = serve(Ram(size=SIZE), on=servers)
        if (child := os.fork()) == 0:
            try:
                pyublk.Device(Ram(size=SIZE), on=servers).start()
            except pyublk.DeviceClosed:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        verify([disk])
        disk.stop()


def test_idle_disks_wake_nobody(serve: Serve) -> None:
    def switches() -> int:
        (thread,) = (one for one in threading.enumerate() if one.name == "ublk-servers-0")
        text = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(text.split("voluntary_ctxt_switches:")[1].split()[0])

    with pyublk.Servers() as servers:
        disks = [serve(Ram(size=SIZE), on=servers, trim_after=None) for _ in range(4)]
        verify(disks)
        threading.Event().wait(0.5)
        before = switches()
        threading.Event().wait(2)
        assert switches() == before
        for disk in disks:
            disk.stop()


def test_several_disks_by_hand(controller: pyublk.Controller) -> None:
    data = [bytearray(SIZE) for _ in range(3)]
    ended = threading.Event()
    primed = threading.Event()

    with by_hand(controller) as a, by_hand(controller) as b, by_hand(controller) as c:
        disks = [a, b, c]
        for disk in disks:
            disk.configure()

        def serve_all() -> None:
            with QueueSet() as queues:
                bytes_of = {}
                for disk, its in zip(disks, data, strict=True):
                    queue = disk.queue()
                    queue.fetch()
                    queues.add(queue)
                    bytes_of[queue] = its
                primed.set()
                while len(queues):
                    for queue in queues.wait():
                        if (batch := queue.wait(0)) is None:
                            queues.remove(queue)
                            queue.close()
                            continue
                        for io in batch:
                            span = slice(io.offset, io.offset + io.length)
                            if io.op.name == "READ":
                                io.buffer[:] = bytes_of[queue][span]
                            elif io.op.name == "WRITE":
                                bytes_of[queue][span] = io.buffer
                            io.complete()
            ended.set()

        thread = threading.Thread(target=serve_all, daemon=True)
        thread.start()
        assert primed.wait(60)
        for disk in disks:
            controller.start(disk.info.id, os.getpid())
        verify(disks)
        assert [its[0] for its in data] == [1, 2, 3]
        for disk in disks:
            controller.stop(disk.info.id)
        assert ended.wait(60)
        thread.join(60)
