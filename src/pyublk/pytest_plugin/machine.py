# SPDX-License-Identifier: MIT
"""The tests of a session that run in a virtual machine: all that need ublk, in one boot.

The machine is started before the session's other tests and runs beside them; its reports come after
theirs, as if the tests had run here. Under xdist it is the controller that has the machine: the
workers leave these tests out, and tell it which they are.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from pyublk.pytest_plugin import marking, remote
from pyublk.pytest_plugin.guest import Job
from pyublk.pytest_plugin.remote import Event, Lost, Run, plain_options
from pyublk.vm import Machine, VMError, WrongUsage

Location = tuple[str, int | None, str]

#: In xdist's `workerinput`: the file in which a worker leaves the tests that need ublk.
SELECTION = "ublk_selection"


@dataclass(frozen=True, slots=True)
class Test:
    """A test that the machine is to run."""

    id: str
    path: str
    location: Location


def tests_of(session: pytest.Session) -> list[Test]:
    """Takes the tests that need ublk out of what the session runs itself."""
    chosen = [item for item in session.items if marking.is_marked(item)]
    # Another list: how many tests the session has was counted by the one before.
    session.items = [item for item in session.items if not marking.is_marked(item)]
    return [Test(item.nodeid, str(item.path), item.location) for item in chosen]


class Worker:
    """In a worker of xdist: leaves the tests out, and leaves a list of them."""

    def __init__(self, selection: Path) -> None:
        self._selection = selection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        tests = tests_of(session)
        fresh = self._selection.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps([[test.id, test.path, test.location] for test in tests]))
        fresh.replace(self._selection)  # every worker has the same tests


class Host:
    """In the session itself: has the machine run the tests, and reports what it tells.

    `otherwise` says why the tests are not run here, where that is the first choice: then they are
    skipped if there is no machine either. Without, they fail.
    """

    def __init__(self, config: pytest.Config, otherwise: str | None) -> None:
        self._config = config
        self._otherwise = otherwise
        self._tests: list[Test] = []
        self._of_workers = False
        self._run: Run | None = None
        self._none = ""  # why there is no machine
        self._said = ""  # the last step of fetching its kernel
        self._directory = tempfile.TemporaryDirectory(prefix="pyublk-pytest-")
        config.add_cleanup(self._directory.cleanup)

    @property
    def _selection(self) -> Path:
        return Path(self._directory.name, "tests.json")

    def pytest_report_header(self) -> str:
        kernel = self._config.getoption("ublk_kernel")
        return f"ublk: tests that need it run in a virtual machine (kernel {kernel})"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """xdist: of a new worker."""
        node.workerinput[SELECTION] = str(self._selection)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self) -> None:
        """xdist: a worker has told what it will run; the machine begins, too."""
        if not self._of_workers:
            self._of_workers = True
            self._begin([Test(*test) for test in json.loads(self._selection.read_text())])

    @pytest.hookimpl(wrapper=True, trylast=True)  # the terminal's is around it
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        option = session.config.option
        if option.collectonly or (session.testsfailed and not option.continue_on_collection_errors):
            return (yield)
        try:
            if session.items:  # none under xdist
                self._begin(tests_of(session))
            result = yield
            if self._of_workers:  # it counts what its workers run
                session.testscollected += len(self._tests)
            self._finish(session)
            return result
        finally:
            if self._run is not None:
                self._run.end()

    # ---- the machine ----

    def _begin(self, tests: list[Test]) -> None:
        self._tests = tests
        if not tests:
            return
        kernel, memory = (
            self._config.getoption("ublk_kernel"),
            self._config.getoption("ublk_memory"),
        )
        try:
            Machine(kernel, memory=memory, progress=self._say)  # fetches the kernel
            self._run = Run(
                self._job(tests),
                remote.boot(kernel, memory),
                directory=self._config.invocation_params.dir,
                echo=self._config.getoption("capture") == "no",
            )
        except WrongUsage as error:
            raise pytest.UsageError(str(error)) from None
        except VMError as error:
            self._none = f"no virtual machine: {error}"

    def _job(self, tests: list[Test]) -> Job:
        return Job(
            ids=[test.id for test in tests],
            files=list(dict.fromkeys(test.path for test in tests)),
            options=plain_options(vars(self._config.option)),
            sys_path=sys.path,
            timeout=self._config.getoption("ublk_timeout"),
        )

    def _say(self, what: str, _fraction: float | None) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and what != self._said:
            terminal.ensure_newline()
            terminal.write_line(f"pyublk vm: {what}")
            self._said = what

    def _finish(self, session: pytest.Session) -> None:
        """Reports what the machine tells; where one is lost, another goes on after the test that
        ran in it."""
        tests = self._tests
        while tests:
            replay = Replay(self._config, tests)
            try:
                if self._run is None:
                    self._give_up(replay)
                    return
                for event in self._run.events():
                    replay.take(event)
                    _stop_if_wanted(session)
                replay.end_rest("failed", replay.why_not_run())
            except Lost as lost:
                replay.lose(str(lost), lost.log)
            except KeyboardInterrupt:  # pytest would show where this process waited
                raise KeyboardInterrupt(replay.where()) from None
            if self._run is not None:
                self._run.end()
                self._run = None
            _stop_if_wanted(session)
            if tests := replay.left():
                self._begin(tests)

    def _give_up(self, replay: "Replay") -> None:
        if self._otherwise is None or self._config.getoption("ublk_require"):
            replay.end_rest("failed", self._none)
        else:
            replay.end_rest("skipped", f"{self._otherwise}; {self._none}")


def _stop_if_wanted(session: pytest.Session) -> None:
    """As pytest's own loop does after each test."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


class Replay:
    """Turns a machine's events into the session's own reports."""

    def __init__(self, config: pytest.Config, tests: list[Test]) -> None:
        self._config = config
        self._left = {test.id: test for test in tests}
        self._running: Test | None = None
        self._last: Test | None = None
        self._last_phase = ""
        self._trouble: list[str] = []

    def left(self) -> list[Test]:
        """The tests that have not begun."""
        return list(self._left.values())

    def take(self, event: Event) -> None:
        """Raises Lost for a test that hangs."""
        match event["event"]:
            case "start":
                self._start(event["id"])
            case "report":
                self._report(event["data"])
                self._last_phase = event["when"]
            case "finish":
                self._finish()
            case "warning":
                self._warn(event)
            case "collect" | "interrupted":
                self._trouble.append(event["text"])
            case "hang":
                raise Lost(
                    f"the test did not end within {self._config.getoption('ublk_timeout'):g} s",
                    f"{event['stacks']}\n{event['log']}",
                )

    def _start(self, id: str) -> None:
        self._running = self._last = self._left.pop(id, None)
        self._last_phase = ""
        if self._running is not None:
            self._config.hook.pytest_runtest_logstart(nodeid=id, location=self._running.location)

    def _finish(self) -> None:
        if self._running is not None:
            self._config.hook.pytest_runtest_logfinish(
                nodeid=self._running.id, location=self._running.location
            )
        self._running = None

    def _report(self, data: dict[str, Any]) -> None:
        if isinstance(data["longrepr"], list):  # of a skip: JSON has no tuples
            data["longrepr"] = tuple(data["longrepr"])
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        self._config.hook.pytest_runtest_logreport(report=report)

    def _warn(self, event: Event) -> None:
        category = type(event["category"], (Warning,), {})
        message = warnings.WarningMessage(
            category(event["text"]), category, event["filename"], event["lineno"]
        )
        self._config.hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": message,
                "when": event["when"],
                "nodeid": event["id"],
                "location": event["location"],
            }
        )

    def where(self) -> str:
        """What the machine was doing."""
        if self._running is not None:
            return f"{self._running.id} was running in the virtual machine"
        done = "no test" if self._last is None else self._last.id
        return f"{done} had ended in the virtual machine, and none was running"

    # ---- tests without a report of their own ----

    def lose(self, reason: str, log: str) -> None:
        """The machine was lost: what fails is the test that ran, or else the one before. If none
        has run, all fail: another machine would end as this one."""
        reason = f"the virtual machine was lost: {reason}"
        test = self._running or self._last
        if test is None:
            self.end_rest("failed", reason, log)
            return
        phases = {"": "setup", "setup": "call"}
        phase = phases.get(self._last_phase, "teardown") if self._running else "teardown"
        self._end(test, phase, "failed", reason, log)
        self._finish()

    def why_not_run(self) -> str:
        """Of the tests that are left when the guest's session has ended by itself."""
        return "\n".join(["the guest's pytest did not run it", *self._trouble])

    def end_rest(self, outcome: str, reason: str, log: str = "") -> None:
        """Tests that will not run any more are skipped, or have failed."""
        for test in self.left():
            self._start(test.id)
            self._end(test, "setup", outcome, reason, log)
            self._finish()

    def _end(self, test: Test, phase: str, outcome: str, reason: str, log: str) -> None:
        line = test.location[1] or 0
        self._config.hook.pytest_runtest_logreport(
            report=pytest.TestReport(
                nodeid=test.id,
                location=test.location,
                keywords={},
                outcome=cast(Any, outcome),
                longrepr=reason if outcome == "failed" else (test.path, line, f"Skipped: {reason}"),
                when=cast(Any, phase),
                sections=[("virtual machine", log)] if log else [],
            )
        )
