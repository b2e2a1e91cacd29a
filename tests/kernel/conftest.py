"""Fixtures for tests that need a kernel with ublk. Every disk comes from `serve`, which leaves
nothing behind, also when the test fails; a test that leaves a device, a process, a thread or a
descriptor behind fails for it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from needs import Elsewhere
from restarted import leave_nothing
from servers import running_children, until

import pyublk

CONTROL = "/dev/ublk-control"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-kernel",
        action="store_true",
        help="fail instead of skipping where this machine's kernel lacks ublk",
    )

    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out the variations that are marked as thorough, which are the same thing again",
    )

    parser.addoption(
        "--every-feature",
        action="store_true",
        help="fail where a test is skipped, unless it is for other machines only: nothing lacks on "
        "the newest kernel",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leaves_threads: a handler that hangs keeps its thread, also after the test"
    )


def pytest_report_header() -> list[str]:
    lines = [
        f"kernel: {os.uname().release}, {os.cpu_count()} CPUs, python {sys.version.split()[0]}"
    ]
    try:
        with pyublk.Controller() as controller:
            lines.append(f"ublk features: {controller.features()}")
    except OSError as error:
        lines.append(f"no ublk: {error}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if os.path.exists(CONTROL) and os.access(CONTROL, os.R_OK | os.W_OK):
        return
    missing = f"{CONTROL} cannot be opened: run this in a VM (`./run test`), or modprobe ublk_drv"
    if config.getoption("--require-kernel"):
        raise pytest.UsageError(missing)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    report = yield
    if report.skipped and item.config.getoption("--every-feature"):
        skipped = call.excinfo and call.excinfo.value
        if isinstance(skipped, pytest.skip.Exception) and not isinstance(skipped, Elsewhere):
            report.outcome = "failed"
            report.longrepr = str(skipped)
    if report.failed:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60, check=False)
        report.sections.append(("kernel log", "\n".join(log.stdout.splitlines()[-40:])))
    return report


def existing() -> set[int]:
    with pyublk.Controller() as controller:
        return {device.id for device in controller.devices()}


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Devices, processes, threads and descriptors after a test are those from before it."""
    devices, threads, children = existing(), set(threading.enumerate()), running_children()
    fds = len(os.listdir("/proc/self/fd"))
    yield
    if left := existing() - devices:
        with pyublk.Controller(deadline=10) as controller:
            for device in left:
                with suppress(pyublk.DeviceNotFound):
                    controller.delete(device)
        pytest.fail(f"devices left behind: {sorted(left)}")
    until(lambda: running_children() <= children, what="every process of the test ends")
    if strays := [node for node in Path("/dev").glob("ublkb*") if node.is_file()]:
        for stray in strays:
            stray.unlink()
        pytest.fail(f"files in the place of disks: {strays}")
    if request.node.get_closest_marker("leaves_threads"):
        return
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
        assert not thread.is_alive(), f"thread left behind: {thread.name}"
    assert len(os.listdir("/proc/self/fd")) <= fds, "descriptors left behind"


Serve = Callable[..., pyublk.Device]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a disk that is gone when the test ends: `serve(target, queues=2, ...)`."""
    disks: list[pyublk.Device] = []

    def start(target: pyublk.Target, **options: object) -> pyublk.Device:
        disk = pyublk.Device(target, **options)  # type: ignore[arg-type]
        disk.start()
        disks.append(disk)
        return disk

    yield start
    failures = []
    for disk in reversed(disks):  # those on other disks before these
        try:
            disk.stop(20)
        except Exception as error:  # every disk gets its turn
            failures.append(error)
    if failures:
        raise failures[0]


@pytest.fixture
def controller() -> Iterator[pyublk.Controller]:
    with pyublk.Controller() as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a run directory of its own, whose servers end with the test."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.chdir("/")
    leave_nothing()
