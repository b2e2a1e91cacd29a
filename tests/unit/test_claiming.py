"""The process that claims a disk, here a file in a disk's place."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyublk.claiming import Claim
from pyublk.service import claim as claims


@pytest.fixture
def slow_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has many disks to stop at once."""
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))


@pytest.mark.usefixtures("slow_interpreter")
def test_no_disk_hangs_because_the_process_begins_late(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.write_bytes(b"")
    disk: Any = SimpleNamespace(path=str(node), id=1 << 20, server_pid=1)
    with Claim(str(node), exclusive=False) as claim:
        with pytest.raises(OSError, match="could not be flushed") as told:
            claims._flush(disk, claim, 0.5, force=True)
        assert told.value.errno == errno.ENOTTY  # it came so far: a file has no such call


@pytest.mark.usefixtures("slow_interpreter")
def test_a_process_that_never_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEGINS", 0.1)
    disk: Any = SimpleNamespace(path=str(tmp_path / "node"), id=1 << 20, server_pid=1)
    with (
        Claim(str(tmp_path / "node"), exclusive=False) as claim,
        pytest.raises(TimeoutError, match=r"no process began to do so within 0\.1 s"),
    ):
        claims._flush(disk, claim, 10, force=True)
