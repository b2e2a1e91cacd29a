# SPDX-License-Identifier: MIT
"""When and where things run: policies of threads, the choice of a disk's I/O scheduler."""

import errno
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from pyublk import scheduling
from pyublk._native import Helper, WriteInChild, write_in_child
from pyublk.scheduling import (
    NamedThread,
    SchedulerRemoval,
    choose_io_scheduler,
    io_scheduler,
    keep_to,
    never_interrupt,
    queue_thread_name,
    queue_threads,
)

T = TypeVar("T")


def on_a_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_thread_that_never_interrupts() -> None:
    def policy() -> int:
        never_interrupt()
        return os.sched_getscheduler(0)

    assert on_a_thread(policy) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_policy_that_was_given_is_left_alone() -> None:
    def policy() -> int:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        never_interrupt()
        return os.sched_getscheduler(0)

    assert on_a_thread(policy) == os.SCHED_IDLE


def test_cpus_that_there_are_not() -> None:
    with pytest.raises(OSError, match=r"cannot be kept to CPUs \[4000\]: Invalid argument; this"):
        on_a_thread(lambda: keep_to(frozenset({4000})))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for sysfs' file, which says what there is, and takes what is wanted."""
    file = tmp_path / "scheduler"
    file.write_text("none [mq-deadline] kyber\n")
    monkeypatch.setattr(scheduling, "_place", lambda _disk: file)
    return file


def test_the_scheduler_in_use_is_in_brackets(place: Path) -> None:
    assert io_scheduler("/dev/ublkb0") == "mq-deadline"
    place.unlink()
    assert io_scheduler("/dev/ublkb0") is None


def test_a_scheduler_is_chosen(place: Path) -> None:
    choose_io_scheduler("/dev/ublkb0", "kyber", 5.0)
    assert place.read_text().startswith("kyber")


def test_a_scheduler_is_taken_away(place: Path) -> None:
    SchedulerRemoval("/dev/ublkb0").finish(5.0)
    assert place.read_text().startswith("none")


def test_nothing_is_written_where_it_is_so_already(place: Path) -> None:
    place.write_text("[none] mq-deadline\n")
    SchedulerRemoval("/dev/ublkb0").finish()
    choose_io_scheduler("/dev/ublkb0", "none", 5.0)
    assert place.read_text() == "[none] mq-deadline\n"


@pytest.mark.parametrize("name", ["cfq", "", " "])
def test_a_scheduler_that_there_is_not(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(scheduling, "write_in_child", lambda *_, **__: -errno.EINVAL)
    words = f"io_scheduler must be one of none, mq-deadline, kyber, not {name!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        choose_io_scheduler("/dev/ublkb0", name, 5.0)


def test_a_scheduler_in_a_module(place: Path) -> None:
    choose_io_scheduler("/dev/ublkb0", "bfq", 5.0)
    assert place.read_text().startswith("bfq")


def test_a_scheduler_that_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "write_in_child", lambda *_, **__: -errno.EROFS)
    words = "/dev/ublkb0 cannot have the I/O scheduler kyber: Read-only file system"
    with pytest.raises(OSError, match=words) as caught:
        choose_io_scheduler("/dev/ublkb0", "kyber", 5.0)
    assert caught.value.errno == errno.EROFS


def test_a_switch_that_waits_too_long(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "write_in_child", lambda *_, **__: None)
    with pytest.raises(TimeoutError, match="scheduler kyber: requests are in flight"):
        choose_io_scheduler("/dev/ublkb0", "kyber", 5.0)


def test_a_scheduler_that_does_not_go_fails_nobody(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.unlink()
    place.mkdir()
    with caplog.at_level(logging.INFO):
        SchedulerRemoval("/dev/ublkb0").finish(5.0)
    assert "/dev/ublkb0 kept the I/O scheduler of the kernel: Is a directory" in caplog.text


def test_a_removal_that_waits_is_called_off(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    place.unlink()
    os.mkfifo(place)
    reader = threading.Thread(target=place.write_text, args=("none [mq-deadline]\n",))
    reader.start()
    removal = SchedulerRemoval("/dev/ublkb0")
    reader.join(10)
    with caplog.at_level(logging.INFO):
        removal.finish(0.2)  # nobody reads from it
        removal.finish(0.2)
    assert "/dev/ublkb0 kept the I/O scheduler mq-deadline: requests are in" in caplog.text


def test_a_write_that_is_dropped_is_called_off(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    WriteInChild(str(pipe), "none")
    assert write_in_child(str(pipe), "none", deadline=0.2) is None


def test_writing_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert write_in_child(str(file), "none", deadline=5.0) == -errno.ENOENT
    file.write_text("")
    assert write_in_child(str(file), "none", deadline=5.0) == 0
    assert file.read_text() == "none"


def test_writing_apart_by_a_helper_that_is_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    helper = Helper()

    def kill() -> None:
        time.sleep(0.1)  # the write waits by now, or is asked of the next one
        os.kill(helper.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert write_in_child(str(pipe), "none", deadline=30.0) == -errno.ECANCELED
    killer.join()


def test_writing_apart_to_what_never_answers(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert write_in_child(str(pipe), "none", deadline=0.2) is None  # nobody reads from it
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    assert children == "", "the helper is nobody's child"


# ---- names ----


@pytest.mark.parametrize(
    ("device", "queues", "name"),
    [
        (3, [0], "ublk3-q0"),
        (3, [0, 0], "ublk3-q0"),
        (3, [0, 1, 2], "ublk3-q0-2"),
        (1048575, [12], "ublk1048575-q12"),
        (1048575, [123], "ublk1048575-serve"),
    ],
)
def test_the_name_of_a_queues_thread(device: int, queues: list[int], name: str) -> None:
    assert queue_thread_name(device, queues) == name


def test_threads_are_found_by_their_names() -> None:
    over = threading.Event()
    names = ["ublk77-q0", "ublk77-q0", "ublk77-q1-2", "ublk7-q0", "ublk77-stop"]
    threads = [NamedThread(target=over.wait, name=name, daemon=True) for name in names]
    try:
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        ids = [thread.native_id for thread in threads]
        while (found := queue_threads(os.getpid(), 77)).keys() != {0, 1, 2} or len(found[0]) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert found == {0: sorted(ids[:2]), 1: [ids[2]], 2: [ids[2]]}
        assert queue_threads(os.getpid(), 78) == {}
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_threads_of_a_process_that_is_not_there() -> None:
    assert queue_threads(4194304 + 1, 0) == {}
