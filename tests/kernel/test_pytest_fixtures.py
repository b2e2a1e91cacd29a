# SPDX-License-Identifier: MIT
"""The plugin's fixtures leave nothing, however their test ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs
from servers import until

import pyublk
from pyublk.uapi import Feature

MOUNTS = Path("/proc/mounts")


def start(place: Path, test: str) -> "subprocess.Popen[str]":
    """Begins a session with one test."""
    (place / "test_it.py").write_text(test)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", "--ublk-require"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def nothing_is_left() -> bool:
    with pyublk.Controller() as controller:
        return not list(controller.devices()) and "/dev/ublkb" not in MOUNTS.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_session_that_is_interrupted_or_killed(tmp_path: Path, number: signal.Signals) -> None:
    session = start(
        tmp_path,
        """
import threading

def test_it(ublk_fs):
    fs = ublk_fs("ext4")
    (fs / "file").write_text("not synced")
    print("mounted", flush=True)
    threading.Event().wait()
""",
    )
    with session:
        assert session.stdout is not None
        assert any("mounted" in line for line in session.stdout)
        assert "/dev/ublkb" in MOUNTS.read_text()
        session.send_signal(number)
        session.communicate(timeout=100)
    until(nothing_is_left, what="the disk is unmounted and deleted")


def test_a_disk_that_hangs_when_its_test_is_over(tmp_path: Path) -> None:
    # Seen in 6.12.117: STOP_DEV waits for the file system, its unmount for the journal's write, and
    # that for STOP_DEV, also when the server has died. Kernels with this feature (6.16) do not.
    needs(Feature.UPDATE_SIZE)
    session = start(
        tmp_path,
        """
import threading
import pyublk
from pyublk.pytest_plugin import file_systems

file_systems.PATIENCE = 3

class Hanging(pyublk.Target):
    def __init__(self):
        super().__init__(size=64 << 20)
        self.data, self.hangs = bytearray(self.size), False

    def read(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset, data):
        while self.hangs:
            threading.Event().wait()
        self.data[offset : offset + len(data)] = data

def test_it(ublk_fs):
    target = Hanging()
    fs = ublk_fs("ext4", target, stop_timeout=2)
    (fs / "file").write_text("not synced")
    target.hangs = True
""",
    )
    with session:
        printed, _ = session.communicate(timeout=110)
    assert "1 passed, 1 error" in printed, printed
    assert "HandlerTimeout" in printed
    until(nothing_is_left, what="the disk is unmounted and deleted")
