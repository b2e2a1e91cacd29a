"""Processes that stay the same although pids are used again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pyublk.openers import command_name, start_time
from pyublk.service.processes import ProcessId, unit_of


def test_this_process_is_itself() -> None:
    me = ProcessId.own()
    assert me.pid == os.getpid()
    opened = me.open()
    assert opened is not None
    with opened:
        assert not opened.wait(0)


def test_the_same_pid_with_another_start_is_another_process() -> None:
    me = ProcessId.own()
    assert ProcessId(me.pid, me.started - 1).open() is None


def test_an_ended_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        started = start_time(child.pid)
        assert started is not None
        handle = ProcessId(child.pid, started).open()
        assert handle is not None
        with handle:
            assert not handle.wait(0)
            handle.send(signal.SIGTERM)
            assert handle.wait(10)
            assert start_time(child.pid) is None, "a zombie counts as a process"
            child.wait()
            handle.send(signal.SIGTERM)  # to nobody: no error
    assert ProcessId(child.pid, started).open() is None
    assert start_time(child.pid) is None
    assert command_name(child.pid) is None


def test_a_name_with_parentheses_does_not_confuse() -> None:
    name = "a) b (c"
    program = f"import ctypes; ctypes.CDLL(None).prctl(15, {name!r}.encode()); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert command_name(child.pid) == name
        started = start_time(child.pid)
        assert started is not None
        assert started >= ProcessId.own().started
        child.communicate(b"\n")


def test_the_service_of_a_process(tmp_path: Path) -> None:
    def unit(text: str) -> str | None:
        (tmp_path / "7").mkdir(exist_ok=True)
        (tmp_path / "7/cgroup").write_text(text)
        return unit_of(7, proc=tmp_path)

    assert unit("0::/system.slice/system-pyublk.slice/pyublk@a.service\n") == "pyublk@a.service"
    assert unit("0::/user.slice/user-0.slice/session-1.scope\n") is None
    assert unit_of(8, proc=tmp_path) is None
