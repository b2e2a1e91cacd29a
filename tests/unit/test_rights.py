"""A process that has given up root's rights has its helpers from one that has not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
