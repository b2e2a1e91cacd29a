# SPDX-License-Identifier: MIT
"""The pytest plugin: real disks as fixtures, a marker for tests that need ublk, and the virtual
machine that runs them where the kernel has none. pytest loads it; nothing else imports it."""

import argparse
from collections.abc import Generator
from pathlib import Path

import pytest

from pyublk.pytest_plugin import machine, marking, needs
from pyublk.pytest_plugin.file_systems import FileSystem
from pyublk.pytest_plugin.fixtures import (
    MakeDisk,
    MakeFileSystem,
    MakePowerCut,
    faulty_disk,
    power_cut,
    ublk_disk,
    ublk_fs,
)
from pyublk.pytest_plugin.kernel_log import KernelLog
from pyublk.vm import VMError
from pyublk.vm.attached import memory_size
from pyublk.vm.machine import LONGEST

__all__ = [
    "FileSystem",
    "MakeDisk",
    "MakeFileSystem",
    "MakePowerCut",
    "faulty_disk",
    "power_cut",
    "ublk_disk",
    "ublk_fs",
]

_LOG = pytest.StashKey[KernelLog]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ublk", "disks over ublk (pyublk)")
    group.addoption(
        "--ublk",
        choices=["host", "vm", "auto"],
        default="host",
        help="where tests that need ublk run: on this machine (host, the default), in a virtual "
        "machine (vm), or in one unless this machine can (auto)",
    )
    group.addoption(
        "--ublk-require",
        action="store_true",
        help="fail tests that need ublk, or a part of it, where it is missing; they are skipped "
        "otherwise",
    )
    group.addoption(
        "--ublk-kernel",
        default="latest",
        metavar="NAME",
        help="kernel of the virtual machine: latest (the default), host, or a series such as 6.12",
    )
    group.addoption(
        "--ublk-memory",
        type=_memory,
        default="2G",
        metavar="SIZE",
        help="memory of the virtual machine (2G)",
    )
    group.addoption(
        "--ublk-timeout",
        type=_seconds,
        default=300,
        metavar="SECONDS",
        help="the most that a test may take in the virtual machine (300)",
    )


def _memory(text: str) -> int:
    try:
        return memory_size(text)
    except VMError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0 and up to {LONGEST:g} s")
    return seconds


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", needs.MARKER)
    mode = config.getoption("ublk")
    selection = getattr(config, "workerinput", {}).get(machine.SELECTION)
    if selection is not None:
        config.pluginmanager.register(machine.Worker(Path(selection)), "ublk-worker")
    elif mode == "vm":
        config.pluginmanager.register(machine.Host(config, None), "ublk-machine")
    elif mode == "auto" and (reason := needs.lacking(needs.Driver(), needs.Root())) is not None:
        config.pluginmanager.register(machine.Host(config, reason), "ublk-machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marking.is_marked(item):
            marking.needs_of(item)  # a marker that is wrong is told before anything runs


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if marking.is_marked(item):
        item.stash[_LOG] = KernelLog()
        marking.need(item, *marking.needs_of(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[marking.PASSED] = report.passed
        told = [
            f"{disk.path}: {rule.text}: fired {rule.fired} times{state}"
            for disk in item.stash.get(marking.DISKS, [])
            for rules, state in ((disk.faults.removed, ", removed"), (disk.faults, ""))
            for rule in rules
        ]
        if report.failed and told:
            report.sections.append(("faults", "\n".join(told)))
    log = item.stash.get(_LOG, None)
    if log is not None and report.failed and (text := log.read()):
        report.sections.append(("kernel log", text))
    if log is not None and call.when == "teardown":
        log.close()
        del item.stash[_LOG]
    return report
