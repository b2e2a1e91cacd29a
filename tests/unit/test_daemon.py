"""Daemons that do not get as far as a disk: what is said, and that nothing is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyublk import errors
from pyublk.service import daemon
from pyublk.service.plan import Plan
from pyublk.service.processes import ProcessId, start_time
from pyublk.service.records import remove_log
from pyublk.service.reports import TargetFailed


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(directory))
    monkeypatch.chdir(tmp_path)
    return directory


def test_a_wrong_target_is_told_as_if_it_had_been_served_here(run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no target 'nul'.*did you mean 'null'"):
        daemon.start(Plan(target="nul"))
    assert list(run_dir.iterdir()) == []


def test_a_class_whose_code_fails(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import pyublk\nclass Broken(pyublk.Target):\n    def __init__(self):\n        {}['key']\n"
    )
    with pytest.raises(TargetFailed, match=r"KeyError: 'key' \(broken.py, line 4\)"):
        daemon.start(Plan(target="broken.py:Broken"))
    assert list(run_dir.iterdir()) == []


def test_a_server_that_dies_without_a_word(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, sys\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(errors.DeviceLost, match="ended by signal 9 before the disk") as caught:
        daemon.start(Plan(target="dying.py:Any"))
    assert caught.value.__notes__ == ["last words"]
    assert list(run_dir.iterdir()) == []


def test_relative_paths_and_modules_mean_the_callers_directory(tmp_path: Path) -> None:
    """The class is found beside the caller, and so is what its constructor looks for."""
    (tmp_path / "beside.py").write_text(
        "import pyublk\n"
        "from pathlib import Path\n"
        "class Beside(pyublk.Target):\n"
        "    def __init__(self, place: Path):\n"
        "        raise ValueError(place.read_text())\n"
    )
    (tmp_path / "note").write_text("found it")
    with pytest.raises(ValueError, match=r"^found it$"):
        daemon.start(Plan(target="beside:Beside", options={"place": "note"}))


def test_an_interrupt_while_waiting_leaves_nothing(tmp_path: Path, run_dir: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    (tmp_path / "slow.py").write_text(
        "import os, threading\n"
        "with open('told', 'w') as told: told.write(str(os.getpid()))\n"
        "threading.Event().wait(100)\n"
    )
    program = (
        "from pyublk.service import daemon, plan\ndaemon.start(plan.Plan(target='slow.py:Slow'))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as caller:
        pid = int(told.read_text())
        started = start_time(pid)
        assert started is not None
        server = ProcessId(pid, started)
        assert os.getsid(pid) == pid, "the server has no session of its own"
        caller.send_signal(signal.SIGINT)
        _, shown = caller.communicate(timeout=30)
    assert b"KeyboardInterrupt" in shown
    assert server.open() is None
    assert list(run_dir.iterdir()) == []


def test_a_server_removes_no_log_but_its_own(run_dir: Path) -> None:
    """A disk made meanwhile may have got the id of the one that goes, and its log the name."""
    run_dir.mkdir(exist_ok=True)
    log = run_dir / "0.log"
    with log.open("w") as output:
        remove_log(output.fileno())
        assert not log.exists()
        log.write_text("another server's")
        remove_log(output.fileno())
        assert log.exists()
