"""`pyublk upgrade`: disks that get another server process while they are used."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import added, run_here
from files import FILES
from load import Load
from memory import Memory
from needs import needs, only_where
from servers import until

import pyublk
from pyublk.cli.failures import ExitCode
from pyublk.control import Controller
from pyublk.service.channel import ask
from pyublk.service.records import Record, log_place, recorded_ids, socket_place
from pyublk.uapi import DeviceStatus, Feature

MIB = 1 << 20
RESEND = ("--recovery", "resend")


@pytest.fixture
def place(place: Path) -> Path:
    """With a file for a disk."""
    with open("store", "wb") as file:
        file.truncate(MIB)
    return place


def server_of(device: int) -> int:
    record = Record.read(device)
    assert record is not None
    return record.server.pid


def ends(pid: int) -> None:
    until(lambda: not os.path.exists(f"/proc/{pid}"), what=f"process {pid} ends")


class Watcher:
    """Looks all the time at how commands see a disk."""

    def __init__(self, device: int) -> None:
        self._device = device
        self.states: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._over.is_set():
            record = Record.read(self._device)
            if record is None:
                self.states.add("no record")
                continue
            try:
                told = ask(record, "status")
                self.states.add("served" if told["path"] == record.path else "another disk")
            except Exception as error:
                self.states.add(f"{error!r}")
            time.sleep(0.005)


def test_a_disk_gets_another_server_under_load(place: Path) -> None:
    needs(Feature.QUIESCE)
    disk = added("file", "store", "--queues", "2", *RESEND)
    number, first = str(disk["id"]), disk["server_pid"]
    with Load(disk["path"], clients=2) as load, Watcher(disk["id"]) as watcher:
        done = run_here("upgrade", number, "-o", "direct=yes")
        assert done.exit_code == ExitCode.USAGE
        assert f"File cannot serve {disk['path']}: the disk has basic.logical_" in done.stderr
        assert f"  {disk['path']} is served by process {first}, as before\n" in done.stderr
        load.goes_on()
        done = run_here("upgrade", "all", "--json")
        assert done.exit_code == 0, done.stderr
        second = server_of(disk["id"])
        assert json.loads(done.stdout) == [
            {"id": disk["id"], "path": disk["path"], "server_pid": second}
        ]
        assert second != first
        ends(first)
        load.goes_on()
    load.check()
    assert load.failed == 0
    assert watcher.states == {"served"}
    assert "has another server now" not in log_place(disk["id"]).read_text()
    assert socket_place(disk["id"]).exists()
    assert run_here("stop", number).exit_code == 0
    assert recorded_ids() == []
    assert not log_place(disk["id"]).exists()


def test_older_kernels_do_not_upgrade(place: Path, controller: Controller) -> None:
    only_where(not controller.features().has(Feature.QUIESCE), "this kernel can")
    disk = added("file", "store", *RESEND)
    refused = run_here("upgrade", str(disk["id"]))
    assert "QUIESCE is not available: it needs Linux 6.16" in refused.stderr
    with Blocks(disk["path"], os.O_RDONLY) as blocks:
        assert blocks.read(4096, 0) == bytes(4096)


@pytest.mark.thorough
def test_what_is_not_upgraded(place: Path, controller: Controller) -> None:
    needs(Feature.QUIESCE)
    unknown = run_here("upgrade", "1000")
    assert unknown.exit_code == ExitCode.NO_DEVICE
    several = run_here("upgrade", "all", "-o", "direct=yes")
    assert several.exit_code == ExitCode.USAGE
    assert "--option is for one disk" in several.stderr
    disk = added("file", "store", "--recovery", "none")
    refused = run_here("upgrade", str(disk["id"]))
    assert refused.exit_code == ExitCode.USAGE
    assert "was not made with --recovery resend" in refused.stderr
    assert "stop it and add it again" in refused.stderr
    memory = added("ram", "--size", "1M", *RESEND)
    refused = run_here("upgrade", str(memory["id"]))
    assert refused.exit_code == ExitCode.USAGE
    assert "another process would serve an empty disk" in refused.stderr
    os.kill(memory["server_pid"], signal.SIGKILL)
    until(lambda: controller.info(memory["id"]).status is DeviceStatus.QUIESCED)
    refused = run_here("upgrade", str(memory["id"]))
    assert refused.exit_code == ExitCode.BUSY
    assert f"`pyublk recover {memory['id']}` starts one" in refused.stderr
    with Blocks(disk["path"], os.O_RDONLY) as blocks:
        assert blocks.read(4096, 0) == bytes(4096)


# ---- Device.hand_over, in one process ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("file", {"queues": 2}),
        ("plain", {"workers": 2}),
        ("async", {}),
    ],
    ids=["mapped", "workers", "async"],
)
def test_a_device_hands_its_disk_over(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    needs(Feature.QUIESCE)
    store = tmp_path / "store"
    store.write_bytes(bytes(MIB))
    first = pyublk.Device(FILES[kind](store), recovery="resend", **options)
    first.start()
    second = pyublk.Device.take_over(first.id, FILES[kind](store), ask=lambda: asked())
    taken = threading.Event()
    left = threading.Event()
    results: list[bool] = []

    def wait_for_the_other() -> bool:
        left.set()
        return taken.wait(60)

    def asked() -> None:
        thread.start()
        assert left.wait(60)

    thread = threading.Thread(target=lambda: results.append(first.hand_over(wait_for_the_other)))
    with Load(first.path) as load:
        assert not first.hand_over(lambda: False)
        load.goes_on()
        with pytest.raises(OSError, match="said so"):
            first.hand_over(fails)
        load.goes_on()
        second.start()
        second.keep()
        taken.set()
        thread.join(60)
        assert results == [True]
        assert first.state is pyublk.DeviceState.STOPPED
        load.goes_on()
    load.check()
    assert load.failed == 0
    assert first.stats().total.errors == second.stats().total.errors == 0
    second.stop()
    assert not os.path.exists(second.path)


def fails() -> bool:
    raise OSError(errno.EIO, "said so")


def test_until_it_is_kept_a_disk_goes_back(tmp_path: Path) -> None:
    needs(Feature.QUIESCE)
    store = tmp_path / "store"
    store.write_bytes(bytes(MIB))
    with pyublk.Device(FILES["plain"](store), recovery="resend") as first:
        second = pyublk.Device.take_over(first.id, FILES["plain"](store), ask=lambda: asked())
        left = threading.Event()
        ended = threading.Event()

        def asked() -> None:
            thread.start()
            assert left.wait(60)

        def not_taken() -> bool:
            left.set()
            assert ended.wait(60)
            return False

        thread = threading.Thread(target=lambda: first.hand_over(not_taken))
        with Load(first.path) as load:
            with second:
                load.goes_on()
            ended.set()
            thread.join(60)
            assert first.state is pyublk.DeviceState.LIVE
            load.goes_on()
        load.check()
        assert load.failed == 0


class Hangs(Memory):
    """Whose reads at 64 KiB return when they are released."""

    recoverable = True

    def __init__(self) -> None:
        super().__init__(MIB)
        self.released = threading.Event()
        self.hangs = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        if offset == 65536 and not self.released.is_set():
            self.hangs.set()
            self.released.wait(60)
        super().read(offset, buffer)


def test_a_handler_that_hangs_keeps_the_disk_and_its_request(tmp_path: Path) -> None:
    needs(Feature.QUIESCE)
    target = Hangs()
    outcomes: list[bytes] = []

    def read() -> None:
        with Blocks(disk.path, os.O_RDONLY) as client:
            outcomes.append(client.read(4096, 65536))

    with pyublk.Device(target, recovery="resend", stop_timeout=1) as disk:
        client = threading.Thread(target=read)
        client.start()
        assert target.hangs.wait(30)
        threading.Timer(10, target.released.set).start()  # when all patience is over
        with pytest.raises(pyublk.HandlerTimeout, match="is not handed over: a handler of Hangs"):
            disk.hand_over(lambda: True)
        client.join(60)
        assert outcomes == [bytes(4096)]
        assert disk.state is pyublk.DeviceState.LIVE
