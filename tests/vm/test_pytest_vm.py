# SPDX-License-Identifier: MIT
"""Tests that run in a virtual machine by themselves, and a machine that stays: a boot for each."""

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyublk.vm import KernelUnavailable, Machine, MissingProgram

pytestmark = pytest.mark.timeout(900)
LIMIT = 400
"""Seconds within which a command must have ended, on a busy host."""

SUITE = """
import os
import threading
from pathlib import Path

import pytest


def disks():
    return sorted(path.name for path in Path("/dev").glob("ublkb*"))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "vfat"])
def test_a_file_system(ublk_fs, kind):
    fs = ublk_fs(kind)
    (fs / "file").write_text("content")
    fs.unmount()
    fs.check()
    fs.mount("ro")
    assert (fs / "file").read_text() == "content"


def test_nothing_is_left_by_it(ublk_disk):
    assert disks() == []
    assert "/dev/ublkb" not in Path("/proc/mounts").read_text()
    print("the disk is", ublk_disk("1M").path)


def test_a_failure_with_the_kernels_log(ublk_disk):
    ublk_disk()
    print("printed by the test")
    Path("/dev/kmsg").write_text("logged by the test\\n")
    assert disks() == ["nothing"]


def test_a_fault(faulty_disk):
    disk = faulty_disk("16M")
    disk.faults.fail("write", times=1)
    with open(disk.path, "r+b", buffering=0) as file, pytest.raises(OSError):
        file.write(bytes(4096))
        os.fsync(file.fileno())


def test_a_fault_that_never_happens(faulty_disk):
    faulty_disk().faults.fail("write")


def test_what_is_in_use_is_told(ublk_fs):
    fs = ublk_fs("ext4")
    test_what_is_in_use_is_told.held = (fs / "file").open("w")


def test_and_is_gone_even_so(ublk_disk):
    test_what_is_in_use_is_told.held.close()
    assert disks() == []


@pytest.mark.ublk("BATCH_IO", tools="no-such-tool")
def test_a_skip():
    pass


@pytest.fixture
def broken(ublk_disk):
    ublk_disk()
    raise RuntimeError("a broken fixture")


def test_an_error(broken):
    pass


def test_a_hang(ublk_disk):
    if "UBLK_DIRECTLY" in os.environ:
        pytest.fail("it would hang")
    threading.Event().wait()


def test_after_the_hang(ublk_disk):
    assert disks() == []


def test_plain():
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    try:
        Machine()
    except (KernelUnavailable, MissingProgram) as reason:
        pytest.skip(str(reason))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\nfilterwarnings = ['error']"
    )
    return tmp_path


def run(*command: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def outcomes(results: Path) -> dict[str, list[str]]:
    """How each test ended, from JUnit's XML."""
    cases = ET.parse(results).getroot().iter("testcase")
    return {
        str(one.get("name")): [child.tag for child in one if child.tag in KINDS] for one in cases
    }


KINDS = ("failure", "error", "skipped")
EXPECTED = {
    **{f"test_a_file_system[{kind}]": [] for kind in ("ext4", "xfs", "btrfs", "vfat")},
    "test_nothing_is_left_by_it": [],
    "test_a_failure_with_the_kernels_log": ["failure"],
    "test_a_fault": [],
    "test_a_fault_that_never_happens": ["error"],
    "test_what_is_in_use_is_told": ["error"],
    "test_and_is_gone_even_so": [],
    "test_a_skip": ["skipped"],
    "test_an_error": ["error"],
    "test_a_hang": ["failure"],
    "test_after_the_hang": [],
    "test_plain": [],
}


def test_a_suite_in_the_machine(project: Path) -> None:
    """All of it in one boot, and a second for what comes after a test that hangs."""
    options = ("--ublk=vm", "--ublk-timeout=45", "--junitxml=results.xml", "--durations=2", "-rs")
    done = run("pytest", *options, cwd=project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes(project / "results.xml") == EXPECTED, done.stdout
    for said in (
        "the virtual machine was lost: the test did not end within 45 s",
        "in test_a_hang",
        "printed by the test",
        "logged by the test",
        "these faults never happened",
        "was still in use and is unmounted lazily",
        "needs the program no-such-tool",
        "a broken fixture",
        "slowest 2 durations",
    ):
        assert said in done.stdout, said


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    """Of a machine that ends with the test."""
    chosen = f"test-{os.getpid()}"
    yield chosen
    run("pyublk", "vm", "stop", "--name", chosen, cwd=tmp_path)


def test_a_machine_that_stays(project: Path, name: str) -> None:
    def vm(verb: str, *rest: str) -> "subprocess.CompletedProcess[str]":
        return run("pyublk", "vm", verb, "--name", name, *rest, cwd=project)

    started = vm("start")
    assert started.returncode == 0, started.stderr
    assert vm("start").returncode == 125
    file = project / "file"
    for text in ("one", "another"):  # it sees changes on this side
        file.write_text(text)
        done = vm("exec", "--", "sh", "-c", "cat file; echo more >&2; echo own >made; exit 7")
        assert (done.returncode, done.stdout, done.stderr) == (7, text, "more\n")
    assert not (project / "made").exists()
    assert vm("exec", "--", "cat", "made").stdout == "own\n"  # and keeps its own
    assert vm("exec", "no-such-program").returncode == 127
    # The suite again, directly: it ends as it did when a session here sent it there.
    direct = ("--env", "UBLK_DIRECTLY=1", sys.executable, "-m", "pytest", "--junitxml=results.xml")
    vm("exec", *direct)
    copy = vm("exec", "cat", "results.xml")
    (project / "copied.xml").write_text(copy.stdout)
    assert outcomes(project / "copied.xml") == EXPECTED

    keeper = next(
        int(line.rpartition(" ")[2])
        for line in run("pyublk", "vm", "list", cwd=project).stdout.splitlines()
        if line.startswith(f"{name}: Linux")
    )
    os.kill(keeper, signal.SIGKILL)
    end = time.monotonic() + LIMIT
    while f"{name}: has died" not in run("pyublk", "vm", "list", cwd=project).stdout:
        assert time.monotonic() < end
    died = vm("exec", "true")
    assert died.returncode == 125
    assert "has died: its log is" in died.stderr
    assert "had died; what it has left is removed" in vm("stop").stderr
    assert "there is no machine" in vm("stop").stderr
