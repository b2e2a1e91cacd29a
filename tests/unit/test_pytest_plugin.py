# SPDX-License-Identifier: MIT
"""The plugin's markers, options and reports, without a kernel: in the place of the virtual machine
is a process of this one, which runs the same session by the same events."""

import os
import sys
import xml.etree.ElementTree as ET

import pytest

import pyublk
from pyublk.pytest_plugin import guest as session
from pyublk.pytest_plugin import machine, needs, remote
from pyublk.uapi import Feature
from pyublk.vm import KernelUnavailable

#: What a project has for these tests: nothing is lacking in the guest.
WITHOUT_NEEDS = """
import pytest
from pyublk.pytest_plugin import needs, marking

def pytest_configure(config):
    if config.stash.get(marking.IN_GUEST, False):
        needs.lacking = lambda *wanted: None
"""

SUITE = """
import os, warnings
import pytest

HERE = os.getpid()

def test_plain():
    assert "UBLK_GUEST" not in os.environ

@pytest.mark.ublk
def test_passes(record_property):
    record_property("place", "guest")
    assert os.environ["UBLK_GUEST"] == "yes"

@pytest.mark.ublk
def test_fails():
    print("printed by the test")
    assert [1, 2] == [1, 3]

@pytest.mark.ublk
def test_skips():
    pytest.skip("for a reason")

@pytest.fixture
def broken():
    raise RuntimeError("a broken fixture")

@pytest.mark.ublk
def test_errs(broken):
    pass

@pytest.mark.ublk
@pytest.mark.xfail(strict=True)
def test_expected():
    warnings.warn("a warning of the guest")
    assert False

@pytest.mark.ublk
@pytest.mark.parametrize("text", ["a b", "[x]::y", "\\u00e9"])
def test_parameters(text):
    pass
"""


class NoMachine:
    """In the place of `pyublk.vm.Machine`, which finds a kernel when it is made."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


@pytest.fixture
def guest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose machine is a process."""
    started = pytester.path / "started"
    script = f"""
import os, runpy
os.environ["UBLK_GUEST"] = "yes"
with open({str(started)!r}, "a") as file:
    file.write("a machine\\n")
runpy.run_path({session.__file__!r}, run_name="__main__")
"""
    monkeypatch.setattr(remote, "boot", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(machine, "Machine", NoMachine)
    for variable in ("UBLK_GUEST", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(variable, raising=False)
    pytester.makeconftest(WITHOUT_NEEDS)
    pytester.makepyfile(SUITE)
    return pytester


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:hypothesispytest", *options)


def machines(pytester: pytest.Pytester) -> int:
    started = pytester.path / "started"
    return len(started.read_text().splitlines()) if started.exists() else 0


# ---- what a test needs ----


def test_a_test_that_needs_ublk_is_skipped_without(pytester: pytest.Pytester) -> None:
    if os.path.exists("/dev/ublk-control"):
        pytest.skip("this machine has ublk")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.ublk
        def test_marked(): pass

        def test_by_its_fixture(ublk_disk): pass

        @pytest.fixture
        def database(ublk_fs): return ublk_fs("xfs")

        def test_by_a_fixture_of_its_fixture(database): pass

        def test_by_name(request):
            request.getfixturevalue("ublk_disk")

        def test_plain(): pass
        """
    )
    found = run(pytester, "-rs")
    found.assert_outcomes(passed=1, skipped=4)
    found.stdout.fnmatch_lines(
        ["*test_a_test_that_needs_ublk_is_skipped_without.py:3: needs ublk:*--ublk=vm*"]
    )
    found = run(pytester, "--ublk-require")
    found.assert_outcomes(passed=1, failed=1, errors=3)


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("'NOTHING'", "ublk: ublk has no feature 'NOTHING'; it has *ZONED*"),
        ("kernel='new'", "ublk: kernel='new' is no release: write '6.16', for example"),
        (
            "tool='fio'",  # newer Pythons have guesses about what was meant
            "ublk([*]features, kernel=None, tools=(), root=True): "
            "ublk() got an unexpected keyword argument 'tool'*",
        ),
        ("3", "ublk: ublk has no feature 3; *"),
    ],
)
def test_a_marker_that_says_something_impossible(
    pytester: pytest.Pytester, mark: str, said: str
) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.ublk({mark})\ndef test_it(): pass")
    found = run(pytester)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([f"ERROR: *::test_it: pytest.mark.{said}"])


def marks(*made: pytest.MarkDecorator) -> list[needs.Need]:
    return needs.of_marks(iter([one.mark for one in made]))


def test_markers_of_a_test_and_its_class_add_up() -> None:
    both = marks(
        pytest.mark.ublk("ZONED", kernel="6.16"),
        pytest.mark.ublk(Feature.BATCH_IO | Feature.ZONED, tools=["fio", "mkfs.xfs"]),
    )
    assert both == [
        needs.Driver(),
        needs.KernelFeature(Feature.ZONED),
        needs.Kernel("6.16"),
        needs.KernelFeature(Feature.BATCH_IO),
        needs.Tool("fio"),
        needs.Tool("mkfs.xfs"),
        needs.Root(),
    ]
    assert marks() == [needs.Driver(), needs.Root()]
    assert marks(pytest.mark.ublk(root=False)) == [needs.Driver()]
    assert needs.Root() not in marks(pytest.mark.ublk(root=False), pytest.mark.ublk(kernel="6.8"))


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    release = os.uname().release
    assert needs.lacking(needs.Kernel("99.2")) == f"needs Linux 99.2, here is {release}"
    assert needs.lacking(needs.Kernel("2.6.39"), needs.Tool("sh")) is None
    assert needs.lacking(needs.Tool("no-such-tool")) == "needs the program no-such-tool"
    assert needs.lacking(needs.FileSystem("proc")) is None
    assert "no_such_fs" in (needs.lacking(needs.FileSystem("no_such_fs")) or "")
    without = pyublk.Features(mask=0xFE, kernel_release="6.5.1", privileged=True)
    monkeypatch.setattr(needs, "_features", lambda: without)
    reason = needs.lacking(needs.Driver(), needs.KernelFeature(Feature.BATCH_IO))
    assert reason is not None
    assert reason.startswith("BATCH_IO needs Linux 7.0, here is Linux 6.5.1")


# ---- tests in the machine ----


def test_a_session_reads_as_if_its_tests_ran_here(guest: pytest.Pytester) -> None:
    found = run(guest, "--ublk=vm", "-rA", "--durations=3", "--junitxml=results.xml")
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.assert_outcomes(passed=5, failed=1, skipped=1, errors=1, xfailed=1, warnings=1)
    found.stdout.fnmatch_lines(
        [
            "collected 9 items",
            "*[[]100%]",
            "*RuntimeError: a broken fixture",
            "E       assert [[]1, 2[]] == [[]1, 3[]]",
            "*Captured stdout call*",
            "printed by the test",
            "*UserWarning: a warning of the guest",
            "*slowest 3 durations*",
            "SKIPPED [[]1[]] *: for a reason",
        ]
    )
    assert machines(guest) == 1
    cases = ET.parse(guest.path / "results.xml").getroot().findall(".//testcase")
    assert len(cases) == 9
    (passes,) = (case for case in cases if case.get("name") == "test_passes")
    assert passes.find("properties/property").attrib == {"name": "place", "value": "guest"}  # type: ignore[union-attr]


def test_the_reports_are_those_of_a_run_in_the_guest(
    guest: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test by test and phase by phase."""

    def outcomes(*options: str) -> dict[tuple[str, str | None], tuple[object, ...]]:
        record = guest.inline_run("-W", "default", "-k", "not plain", *options)
        return {
            (report.nodeid, report.when): (report.outcome, report.longreprtext, report.sections)
            for report in record.getreports("pytest_runtest_logreport")
        }

    away = outcomes("--ublk=vm")
    monkeypatch.setattr(needs, "lacking", lambda *_: None)
    monkeypatch.setenv("UBLK_GUEST", "yes")
    here = outcomes()
    assert away.keys() == here.keys()
    for phase in here:
        assert away[phase][0] == here[phase][0], phase
        assert str(away[phase][1]) == str(here[phase][1]), phase
        assert [tuple(one) for one in away[phase][2]] == here[phase][2], phase  # type: ignore[attr-defined]


def test_no_machine_is_started_without_need(guest: pytest.Pytester) -> None:
    run(guest, "--ublk=vm", "-k", "plain").assert_outcomes(passed=1, deselected=8)
    run(guest, "--ublk=vm", "--collect-only").stdout.fnmatch_lines(["*test_fails*"])
    assert machines(guest) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], ("latest", 2 << 30)), (["--ublk-kernel=6.12", "--ublk-memory=512M"], ("6.12", 1 << 29))],
)
def test_the_machine_that_is_asked_for(
    guest: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: tuple[str, int],
) -> None:
    booted, boot = [], remote.boot
    monkeypatch.setattr(remote, "boot", lambda *what: booted.append(what) or boot(*what))
    run(guest, "--ublk=vm", "-k", "passes", *options).assert_outcomes(passed=1, deselected=8)
    assert booted == [expected]
    assert machines(guest) == 1


def test_selection_order_and_last_failed(guest: pytest.Pytester) -> None:
    found = run(guest, "--ublk=vm", "-v", "-k", "fails or passes")
    found.assert_outcomes(passed=1, failed=1, deselected=7)
    found = run(guest, "--ublk=vm", "-v", "--lf")
    found.assert_outcomes(failed=1)
    found = run(guest, "--ublk=vm", "-v", "--ff")
    assert found.stdout.str().index("::test_fails") < found.stdout.str().index("::test_passes")


def test_the_first_failure_ends_the_session(guest: pytest.Pytester) -> None:
    found = run(guest, "--ublk=vm", "-x")
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["*stopping after 1 failures*"])


def test_workers_share_one_machine(guest: pytest.Pytester) -> None:
    found = run(guest, "--ublk=vm", "-n", "2")
    found.assert_outcomes(passed=5, failed=1, skipped=1, errors=1, xfailed=1, warnings=1)
    assert machines(guest) == 1
    found = run(guest, "--ublk=vm", "-n", "2", "-k", "passes")  # nothing is left to the workers
    found.assert_outcomes(passed=1)
    assert found.ret == pytest.ExitCode.OK


def test_what_is_printed_with_capture_off_is_no_event(guest: pytest.Pytester) -> None:
    found = guest.runpytest_subprocess("-s", timeout=60)
    found.assert_outcomes(passed=1, skipped=8)
    guest.makepyfile(
        """
        import os, pytest

        @pytest.mark.ublk
        def test_prints():
            print('{"event": "end", "code": 0}', flush=True)
            os.system("echo from a program")
        """
    )
    found = run(guest, "--ublk=vm", "-s")
    found.assert_outcomes(passed=1)
    assert "from a program" in found.stderr.str()


def test_a_guest_that_dies_fails_the_test_that_ran(guest: pytest.Pytester) -> None:
    guest.makepyfile(
        """
        import os, sys, pytest
        pytestmark = pytest.mark.ublk

        def test_before(): pass

        def test_dies():
            os.write(2, b"last words\\n")
            os._exit(3)

        def test_after(): pass

        @pytest.fixture
        def dies_later():
            yield
            os._exit(4)

        def test_dies_at_its_end(dies_later): pass

        def test_last(): pass
        """
    )
    found = run(guest, "--ublk=vm", "-v")
    found.assert_outcomes(passed=4, failed=1, errors=1)
    found.stdout.fnmatch_lines(
        ["*test_dies FAILED*", "*the virtual machine was lost: its pytest ended with exit code 3"]
    )
    assert machines(guest) == 3


def test_a_guest_that_hangs_fails_the_test_that_ran(guest: pytest.Pytester) -> None:
    guest.makepyfile(
        """
        import threading, pytest
        pytestmark = pytest.mark.ublk

        def test_hangs():
            threading.Event().wait()

        def test_after(): pass
        """
    )
    found = run(guest, "--ublk=vm", "--ublk-timeout=2")
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(
        [
            "*the virtual machine was lost: the test did not end within 2 s",
            "*- virtual machine -*",
            '*File "*.py", line 5 in test_hangs',
        ]
    )


def test_a_timeout_of_pytest_timeout_reads_as_always(guest: pytest.Pytester) -> None:
    guest.makepyfile(
        """
        import threading, pytest
        pytestmark = pytest.mark.ublk
        released = threading.Event()

        @pytest.fixture
        def helper():
            thread = threading.Thread(target=released.wait, name="the-helper")
            thread.start()
            yield
            released.set()
            thread.join()

        def test_hangs(helper):
            print("printed by the test")
            threading.Event().wait()

        def test_after():
            assert released.is_set()
        """
    )
    # The second option writes on pytest's terminal, too.
    found = run(guest, "--ublk=vm", "--timeout=2", "--setup-show")
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(
        [
            "E *Failed: Timeout (>2*s) from pytest-timeout.",
            "*- Captured stdout call -*",
            "printed by the test",
            "*Stack of the-helper*",
        ]
    )


def test_a_guest_that_cannot_begin_fails_all(
    guest: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; sys.exit('pyublk vm: the emulator did not start')"
    monkeypatch.setattr(remote, "boot", lambda *_: [sys.executable, "-c", script])
    found = run(guest, "--ublk=vm")
    found.assert_outcomes(passed=1, errors=8)
    found.stdout.fnmatch_lines(["the virtual machine was lost: the emulator did not start"])


def test_without_a_machine(guest: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise KernelUnavailable("there is no mirror")

    monkeypatch.setattr(machine, "Machine", unavailable)
    monkeypatch.setattr(needs, "_features", lambda: "needs ublk: no driver")
    found = run(guest, "--ublk=vm")
    found.assert_outcomes(passed=1, errors=8)
    found.stdout.fnmatch_lines(["no virtual machine: there is no mirror"])
    found = run(guest, "--ublk=auto", "-rs")
    found.assert_outcomes(passed=1, skipped=8)
    found.stdout.fnmatch_lines(["*needs ublk: no driver; no virtual machine: there is no mirror"])
    run(guest, "--ublk=auto", "--ublk-require").assert_outcomes(passed=1, errors=8)


def test_auto_is_here_where_ublk_is(
    guest: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "lacking", lambda *_: None)
    found = run(guest, "--ublk=auto", "-k", "passes or parameters")
    found.assert_outcomes(passed=3, failed=1, deselected=5)  # which wants to be in the guest
    assert machines(guest) == 0


def test_a_test_that_the_guest_does_not_have(guest: pytest.Pytester) -> None:
    guest.makepyfile(
        """
        import os, pytest
        if "UBLK_GUEST" in os.environ:
            raise RuntimeError("the guest lacks something")

        @pytest.mark.ublk
        def test_it(): pass
        """
    )
    found = run(guest, "--ublk=vm")
    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(
        ["the guest's pytest did not run it", "*RuntimeError: the guest lacks something*"]
    )


def test_the_machine_ends_with_an_interrupted_session(guest: pytest.Pytester) -> None:
    guest.makepyfile(
        """
        import os, pathlib, signal, threading, time, pytest

        @pytest.mark.ublk
        def test_in_the_guest():
            pathlib.Path("guest").write_text(str(os.getpid()))
            threading.Event().wait()

        def test_here():
            there = pathlib.Path("guest")
            while not there.exists() or not there.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        """
    )
    found = guest.runpytest_inprocess("--ublk=vm", no_reraise_ctrlc=True)
    assert found.ret == pytest.ExitCode.INTERRUPTED
    with pytest.raises(ProcessLookupError):
        os.kill(int((guest.path / "guest").read_text()), 0)


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_ctrl_c_while_the_machine_runs_a_test(
    guest: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    guest.makeconftest(
        WITHOUT_NEEDS
        + """
import os, pathlib, signal, threading, time

def interrupt():
    there = pathlib.Path("guest")
    while not there.exists() or not there.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

def pytest_runtest_logstart():
    if "UBLK_GUEST" not in os.environ:
        threading.Thread(target=interrupt).start()
"""
    )
    guest.makepyfile(
        """
        import os, pathlib, threading, pytest

        @pytest.mark.ublk
        def test_in_the_guest():
            pathlib.Path("guest").write_text(str(os.getpid()))
            threading.Event().wait()
        """
    )
    found = guest.runpytest_inprocess("--ublk=vm", *workers, no_reraise_ctrlc=True)
    assert found.ret == pytest.ExitCode.INTERRUPTED
    found.stdout.fnmatch_lines(
        ["!* KeyboardInterrupt: *::test_in_the_guest was running in the virtual machine !*"]
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int((guest.path / "guest").read_text()), 0)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--ublk-timeout=0", "'0' is no time above 0"),
        ("--ublk-memory=big", "'big' is not a size of memory"),
        ("--ublk=cloud", "invalid choice: 'cloud'"),
    ],
)
def test_options_that_are_wrong(pytester: pytest.Pytester, option: str, said: str) -> None:
    found = pytester.runpytest_subprocess(option, timeout=60)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert said in found.stderr.str()


def test_a_kernel_that_cannot_be(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    found = pytester.runpytest_subprocess("--ublk=vm", "--ublk-kernel=mine", timeout=60)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "no kernel is called 'mine'" in found.stderr.str()


# ---- what a report tells ----


def test_a_report_has_the_faults_that_were_and_are(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import errno
        import pytest
        from pyublk.pytest_plugin import marking
        from pyublk.targets import Ram
        from pyublk.testing import Disk

        @pytest.fixture
        def disk(request):
            with Disk(Ram(size=1 << 20)) as disk:
                disk.path = "/dev/ublkb7"
                request.node.stash.setdefault(marking.DISKS, []).append(disk)
                yield disk

        def test_fails(disk):
            with disk.faults.fail("write", errno.EIO):
                with pytest.raises(OSError):
                    disk.pwrite(bytes(512), 0)
            disk.faults.fail("read", errno.EIO)
            assert disk.size == 0

        def test_passes(disk):
            with disk.faults.fail("write", errno.ENOSPC):
                pass
        """
    )
    found = run(pytester)
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(
        [
            "*- faults -*",
            "/dev/ublkb7: fail:op=write*: fired 1 times, removed",
            "/dev/ublkb7: fail:op=read*: fired 0 times",
        ],
        consecutive=True,
    )
    assert "ENOSPC" not in found.stdout.str()


def test_a_report_of_a_power_cut_shows_the_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from pyublk.testing import Disk, PowerCut

        def test_fails():
            cut = PowerCut(1 << 20)
            with Disk(cut) as disk:
                disk.pwrite(b"new".ljust(512), 0)

            def check(crash):
                with crash.disk() as disk:
                    assert disk.pread(512, 0)[:3] == b"new"

            cut.check(check)
        """
    )
    found = run(pytester)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["E *AssertionError*", "*PowerCutFailed: the check fails*"])
    assert "failure_of(" not in found.stdout.str()


def test_a_fixture_that_is_not_called_says_so(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "from pyublk.pytest_plugin import needs\nneeds.lacking = lambda *wanted: None"
    )
    pytester.makepyfile(
        """
        def test_a_disk(ublk_disk):
            ublk_disk.path

        def test_a_file_system(ublk_fs):
            ublk_fs / "file"

        def test_a_faulty_one(faulty_disk):
            faulty_disk.faults.fail("read")

        def test_a_power_cut(power_cut):
            power_cut.mark("one")
        """
    )
    found = run(pytester)
    found.assert_outcomes(failed=4)
    found.stdout.fnmatch_lines(
        [
            "E * it has no 'path', being a function: call it, as in `disk = ublk_disk(\"64M\")`",
            'E * it is no directory, but a function: call it, as in `fs = ublk_fs("ext4")`',
            "E * it has no 'faults', being a function: *`disk = faulty_disk(\"64M\")`",
            "E * it has no 'mark', being a function: *`cut, fs = power_cut(\"ext4\")`",
        ]
    )
    assert "fixtures.py" not in found.stdout.str()
