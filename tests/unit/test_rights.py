"""A process that has given up root's rights has its helpers from one that has not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyublk.service.plan import DiskSpec
from pyublk.service.server import serve

#: Tells its helper's pid, and that of each next one when it is asked; 0: there is none.
PROGRAM = """
import os, pwd, sys, time
from pyublk import _native
from pyublk.service import rights

keeper = rights.Keeper()
helper = _native.Helper()
keeper.start_helpers()
if os.geteuid() == 0:
    os.setresuid(*[pwd.getpwnam("nobody").pw_uid] * 3)
pid = helper.pid
print(pid, flush=True)
while sys.stdin.readline():
    before, until = pid, time.monotonic() + 30
    while (pid := helper.pid) == before and time.monotonic() < until:
        time.sleep(0.01)
    print(pid, flush=True)
"""


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_helper_that_is_killed_is_replaced_by_one_with_the_same_rights() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def killed(helper: int) -> int:
            os.kill(helper, signal.SIGKILL)
            program.stdin.write("next\n")
            program.stdin.flush()
            return int(program.stdout.readline())

        try:
            first = int(program.stdout.readline())
            second = killed(first)
            assert second not in (0, first)
            assert os.stat(f"/proc/{second}").st_uid == os.geteuid()
            (keeper,) = children(program.pid)
            os.kill(keeper, signal.SIGKILL)
            assert killed(second) == 0  # and none without them
        finally:
            program.kill()


def test_a_keeper_ends_with_its_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (keeper,) = children(process.pid)
        process.kill()
    until = time.monotonic() + 30
    while Path(f"/proc/{keeper}/cmdline").exists():
        if not Path(f"/proc/{keeper}/cmdline").read_bytes():  # nobody has reaped it yet
            break
        assert time.monotonic() < until
        time.sleep(0.01)


SPARED = """
import sys, time
from pathlib import Path
from pyublk import _native
from pyublk.service import title

def told(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\\0").decode()

if sys.argv[1] == "spared":
    title.be_spared()
title.show("mine", "pyublk: ublkb0 (ram)")
helper = _native.Helper()
until = time.monotonic() + 30
while "helper:" not in told(helper.pid) and time.monotonic() < until:
    time.sleep(0.01)
print(told("self"), told(helper.pid), sep="|")
"""


@pytest.mark.parametrize(("word", "mark"), [("spared", "@"), ("ordinary", "")])
def test_a_server_of_a_root_disk_is_marked_for_systemd_and_so_is_its_helper(
    word: str, mark: str
) -> None:
    """systemd-shutdown looks at the first byte of a command line."""
    command = [sys.executable, "-c", SPARED, word, "room for the line" * 2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"{mark}pyublk: ublkb0")
    assert done.stdout.strip().split("|")[1] == f"{mark}pyublk-helper:"


def test_only_a_server_of_roots_is_spared_by_systemd() -> None:
    spec = DiskSpec(target="ram", disk={"size": 1 << 20, "root_storage": True, "user": "nobody"})
    with pytest.raises(ValueError, match="systemd spares no other: leave it out, or user"):
        serve(spec, log_file=None, ready=lambda _: None)
