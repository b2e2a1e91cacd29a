# SPDX-License-Identifier: MIT
"""Machines that stay, with a process of this machine in the place of the virtual one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyublk.vm import VMError, staying

LIMIT = 60

#: Holds a machine as `python -m pyublk.vm.staying` does, but the agent runs here, where it must not
#: empty the kernel's caches.
KEEPER = """
import subprocess, sys
from types import SimpleNamespace
from pyublk.vm import staying

AGENT = '''
import importlib.machinery, sys
agent = importlib.machinery.SourceFileLoader("agent", sys.argv[1]).load_module()
agent.look_again = lambda: None
agent.main()
'''

class Machine:
    def __init__(self, **settings): pass

    def run(self, argv, stdin, stdout, stderr, **options):
        command = [argv[0], "-W", "ignore", "-c", AGENT, argv[1]]
        return subprocess.run(command, stdin=stdin, stdout=stdout, **options)

staying.Machine = Machine
sys.exit(staying.main())
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine that was started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "keeper.py").write_text(KEEPER)
    python = tmp_path / "python"
    # Stands for `python -m pyublk.vm.staying`, and otherwise for python.
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pyublk.vm.staying ] || exec {sys.executable} "$@"\n'
        f'shift 2\nexec {sys.executable} {tmp_path}/keeper.py "$@"\n'
    )
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        staying.start("here", {})
    yield "here"
    if staying.machines():
        staying.stop("here")


def execute(name: str, *argv: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "pyublk", "vm", "exec", "--name", name, *argv],
        input=stdin,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )


def test_streams_and_exit_codes(name: str) -> None:
    every_byte = bytes(range(256)) * 4096
    done = execute(name, "sh", "-c", "cat; echo more >&2; exit 7", stdin=every_byte)
    assert (done.returncode, done.stdout, done.stderr) == (7, every_byte, b"more\n")
    assert execute(name, "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    missing = execute(name, "no-such-program")
    assert missing.returncode == 127
    assert b"no-such-program" in missing.stderr
    assert execute(name, str(Path(__file__))).returncode == 126
    # What a command leaves behind keeps its output open, and nobody waiting.
    assert execute(name, "sh", "-c", "sleep 1000 & echo over").stdout == b"over\n"


def test_an_interrupt_is_passed_on_and_a_client_that_goes_takes_its_command(name: str) -> None:
    command = [sys.executable, "-m", "pyublk", "vm", "exec", "--name", name]
    script = 'trap "echo caught; exit 5" INT; echo $$; while :; do sleep 0.1; done'
    with subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        client.send_signal(signal.SIGINT)
        assert client.communicate(timeout=LIMIT)[0] == b"caught\n"
        assert client.returncode == 5
    with subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        there = int(client.stdout.readline())
        client.kill()
    end = time.monotonic() + LIMIT
    while Path(f"/proc/{there}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_that_reads_nothing_keeps_no_other_waiting(name: str) -> None:
    command = [sys.executable, "-m", "pyublk", "vm", "exec", "--name", name]
    with subprocess.Popen(
        [*command, "sleep", "1000"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as stuck:
        assert stuck.stdin is not None
        stuck.stdin.write(bytes(1 << 20))
        assert execute(name, "echo", "goes on").stdout == b"goes on\n"
        stuck.kill()


def test_one_that_stays_is_there_once_and_leaves_nothing(name: str) -> None:
    (there,) = staying.machines()
    assert there.alive
    assert there.release == os.uname().release
    with pytest.raises(VMError, match="there is a machine 'here' already"):
        staying.start(name, {})
    assert staying.stop(name)
    assert staying.machines() == []
    assert list(staying._place(name).parent.iterdir()) == []


def test_one_that_has_died_is_found_out(name: str) -> None:
    (there,) = staying.machines()
    os.kill(there.pid, signal.SIGKILL)
    end = time.monotonic() + LIMIT
    while staying.machines()[0].alive:
        assert time.monotonic() < end
        time.sleep(0.05)
    done = execute(name, "true")
    assert done.returncode == 125
    assert b"has died: its log is" in done.stderr
    assert not staying.stop(name)
    assert staying.machines() == []
