# SPDX-License-Identifier: MIT
"""The session in the virtual machine: runs the tests that it is told to, and tells what becomes of
them.

The first line of the standard input is the job, pickled in base64. What follows on the standard
output are events, a line of JSON each: `ready`, `start` (of a test), `report`, `finish` (of a
test), `warning`, `collect` (a file that cannot be collected), `hang` (the last one), `end`.

It runs as a script, and imports nothing of this package before pytest does: pytest warns of plugins
whose assertions it can rewrite no more.
"""

import base64
import faulthandler
import io
import json
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the guest is to do.

    Attributes:
        ids: the tests, in order.
        files: where they are.
        options: the options of the session that asks, by their names in it.
        sys_path: where that session finds its modules.
        timeout: seconds that a test may take.
    """

    ids: list[str]
    files: list[str]
    options: dict[str, Any]
    sys_path: list[str]
    timeout: float

    def to_line(self) -> bytes:
        return base64.b64encode(pickle.dumps(vars(self))) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Job":
        return cls(**pickle.loads(base64.b64decode(line)))


#: Options that are the asking session's affair, and what the guest has instead.
_NOT_HERE: dict[str, Any] = {
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "stepwise_skip": False,
    "continue_on_collection_errors": True,  # the others' tests run
    "usepdb": False,
    "trace": False,
    "xmlpath": None,
    "basetemp": None,
    "dist": "no",
    "distload": False,
    "looponfail": False,
    "numprocesses": None,
    "maxprocesses": None,
    "tx": [],
    "ublk": "host",
}


@dataclass
class Teller:
    """Sends events."""

    stream: TextIO
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, event: str, **data: Any) -> None:
        line = json.dumps({"event": event, **data}, default=repr)
        with self.lock:
            self.stream.write(line + "\n")
            self.stream.flush()


class Watchdog:
    """Tells of a test that takes too long: where its threads are, and what the kernel says of tasks
    that are blocked."""

    def __init__(self, tell: Teller, timeout: float) -> None:
        self._tell = tell
        self._timeout = timeout
        self._condition = threading.Condition()
        self._test: str | None = None
        self._deadline = float("inf")
        threading.Thread(target=self._watch, name="ublk-watchdog", daemon=True).start()

    def begin(self, test: str | None) -> None:
        """`test` runs from now on; None: what follows the last one."""
        with self._condition:
            self._test, self._deadline = test, time.monotonic() + self._timeout
            self._condition.notify()

    def _watch(self) -> None:
        with self._condition:
            while (left := self._deadline - time.monotonic()) > 0:
                self._condition.wait(min(left, threading.TIMEOUT_MAX))
            test = self._test
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            self._tell("hang", id=test, stacks=stacks.read(), log=_blocked_tasks())


def _blocked_tasks() -> str:
    from pyublk.pytest_plugin.kernel_log import KernelLog

    with KernelLog() as log:
        try:
            Path("/proc/sysrq-trigger").write_text("w")
        except OSError as error:
            return str(error)
        return log.read()


class Terminal:
    """What plugins find as pytest's terminal, on which pytest itself writes nothing here:
    pytest-timeout, for one, writes the stacks of a test's threads."""

    def __init__(self, reporter: object) -> None:
        self._reporter = reporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


class Reporter:
    """The plugin that has the session run the job's tests, and reports."""

    def __init__(self, config: pytest.Config, job: Job, tell: Teller) -> None:
        self._config = config
        self._job = job
        self._tell = tell
        self._watchdog = Watchdog(tell, job.timeout)

    @pytest.hookimpl(trylast=True)  # pytest's own is there by then
    def pytest_configure(self, config: pytest.Config) -> None:
        reporter = config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Terminal(reporter), "terminalreporter")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Any:
        result = yield
        order = {test: place for place, test in enumerate(self._job.ids)}
        items[:] = sorted(
            (item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid]
        )
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell("collect", id=report.nodeid, text=report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._watchdog.begin(nodeid)
        self._tell("start", id=nodeid, location=location)

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._watchdog.begin(None)
        self._tell("finish", id=nodeid, location=location)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._tell("report", id=report.nodeid, when=report.when, data=data)

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        if when != "runtest":  # the session that asks has it itself
            return
        self._tell(
            "warning",
            text=str(warning_message.message),
            category=warning_message.category.__name__,
            filename=warning_message.filename,
            lineno=warning_message.lineno,
            when=when,
            id=nodeid,
            location=location,
        )

    def pytest_internalerror(self, excrepr: object) -> None:
        sys.stderr.write(f"{excrepr}\n")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # pytest.exit() comes here as well.
        self._tell("interrupted", text=str(excinfo.value) or excinfo.typename)


def main() -> int:
    """Runs the job; returns pytest's exit code."""
    with os.fdopen(os.dup(0), "rb") as orders:
        line = orders.readline()
    tell = Teller(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # What tests print with capture off must not get between the events.
    os.dup2(2, 1)
    # Line by line, as on a terminal: else it shows, or is captured, long after the test that wrote.
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    job = Job.from_line(line)
    sys.path[:] = job.sys_path
    tell("ready", release=os.uname().release)
    instead = {name: value for name, value in _NOT_HERE.items() if name in job.options}
    config = pytest.Config.fromdictargs({**job.options, **instead}, job.files)
    from pyublk.pytest_plugin import marking

    config.stash[marking.IN_GUEST] = True
    config.pluginmanager.register(Reporter(config, job, tell), "ublk-guest")
    code = config.hook.pytest_cmdline_main(config=config)
    tell("end", code=int(code))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
