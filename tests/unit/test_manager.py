"""What the service manager is told, and what it keeps for the next server."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyublk import targets
from pyublk.service import manager
from pyublk.service.manager import MEMORY, Store
from pyublk.testing import Disk

SIZE = 1 << 20


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.setblocking(False)
        yield one


def told(listening: socket.socket) -> tuple[str, list[int]] | None:
    try:
        text, files, _, _ = socket.recv_fds(listening, 4096, 4)
    except BlockingIOError:
        return None
    return text.decode(), files


def passed(monkeypatch: pytest.MonkeyPatch, *files: int, names: str = MEMORY) -> None:
    """This process has got descriptors of the manager's, the first of which is `files[0]`."""
    monkeypatch.setattr(manager, "_FIRST", files[0])
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", str(len(files)))
    monkeypatch.setenv("LISTEN_FDNAMES", names)


def kept(listening: socket.socket) -> int:
    """The descriptor that a new disk in memory gives to the manager; something is written there."""
    disk = targets.Ram(size=SIZE)
    Store().prepare(disk, new=True)
    answer = told(listening)
    assert answer is not None
    text, files = answer
    assert text == f"FDSTORE=1\nFDNAME={MEMORY}"
    with Disk(disk) as opened:
        opened.pwrite(b"kept".ljust(512), 4096)
    (file,) = files
    return file


def test_what_is_told_reaches_the_manager(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.tell("READY=1\nSTATUS=here")
    assert told(listening) == ("READY=1\nSTATUS=here", [])
    monkeypatch.delenv("NOTIFY_SOCKET")
    manager.tell("READY=1")
    assert told(listening) is None


def test_a_name_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("")  # a name that the kernel chooses
        one.setblocking(False)
        name = one.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        manager.tell("READY=1")
        assert told(one) == ("READY=1", [])


@pytest.mark.parametrize("new", [True, False])
def test_the_next_server_has_the_memory(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch, *, new: bool
) -> None:
    passed(monkeypatch, kept(listening))
    disk = targets.Ram(size=SIZE)
    Store().prepare(disk, new=new)
    assert disk.recoverable
    with Disk(disk) as opened:
        assert opened.pread(512, 4096) == b"kept".ljust(512)
    assert told(listening) is None  # the manager has it already


def test_memory_that_is_too_small(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new disk begins with its own; one that is there is not served by anything else."""
    disk = targets.Ram(size=2 * SIZE)
    passed(monkeypatch, kept(listening))
    with pytest.raises(ValueError, match=f"the memory has {SIZE} bytes"):
        Store().prepare(disk, new=False)
    assert told(listening) is None

    passed(monkeypatch, kept(listening))
    Store().prepare(disk, new=True)
    assert told(listening) == (f"FDSTOREREMOVE=1\nFDNAME={MEMORY}", [])
    answer = told(listening)
    assert answer is not None
    text, (file,) = answer
    assert (text, os.fstat(file).st_size) == (f"FDSTORE=1\nFDNAME={MEMORY}", 2 * SIZE)
    os.close(file)
    with Disk(disk) as opened:
        assert opened.pread(512, 4096) == bytes(512)


def test_who_keeps_no_memory(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = targets.Ram(size=SIZE)
    Store().prepare(lost, new=False)
    assert not lost.recoverable  # so that nobody takes it over with an empty one
    Store().prepare(targets.Null(size=SIZE), new=True)
    assert told(listening) is None
    monkeypatch.delenv("NOTIFY_SOCKET")
    alone = targets.Ram(size=SIZE)
    Store().prepare(alone, new=True)
    assert not alone.recoverable


def test_descriptors_of_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the process that they are for has them, under their names, and nobody after it."""
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", MEMORY)
    assert manager.passed_on() == {}
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
    program = (
        "import os, subprocess, sys\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from pyublk.service import manager\n"
        "print(manager.passed_on(), manager.passed_on())\n"
        "print(*[os.get_inheritable(file) for file in (3, 4)])\n"
    )
    pipes = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    shell = f'exec {sys.executable} -c "$1" 3<&{pipes[0]} 4<&{pipes[1]}'
    done = subprocess.run(
        ["bash", "-c", shell, "sh", program],
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": f"other:{MEMORY}"},
        pass_fds=pipes,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    for file in pipes:
        os.close(file)
    assert done.stdout == f"{{'other': 3, '{MEMORY}': 4}} {{}}\nFalse False\n", done.stderr
