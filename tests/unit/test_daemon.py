"""Daemons that do not get as far as a disk: what is said, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyublk import errors
from pyublk.openers import start_time
from pyublk.service import daemon, logs
from pyublk.service.channel import ChannelError
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
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
        daemon.start(DiskSpec(target="nul"))
    assert list(run_dir.iterdir()) == []


def test_a_class_whose_code_fails(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import pyublk\nclass Broken(pyublk.Target):\n    def __init__(self):\n        {}['key']\n"
    )
    with pytest.raises(TargetFailed, match=r"KeyError: 'key' \(broken.py, line 4\)"):
        daemon.start(DiskSpec(target="broken.py:Broken"))
    assert list(run_dir.iterdir()) == []


def test_a_server_that_dies_without_a_word(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, sys\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(errors.DeviceLost, match="ended by signal 9 before the disk") as caught:
        daemon.start(DiskSpec(target="dying.py:Any"))
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
        daemon.start(DiskSpec(target="beside:Beside", options={"place": "note"}))


def test_an_interrupt_while_waiting_leaves_nothing(tmp_path: Path, run_dir: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    (tmp_path / "slow.py").write_text(
        "import os, threading\n"
        "with open('told', 'w') as told: told.write(str(os.getpid()))\n"
        "threading.Event().wait(100)\n"
    )
    program = (
        "from pyublk.service import daemon, plan\n"
        "daemon.start(plan.DiskSpec(target='slow.py:Slow'))"
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


def test_a_log_is_in_use_as_long_as_somebody_may_write_to_it(run_dir: Path) -> None:
    log, name = logs.begin()
    assert logs.abandoned() == []
    writer = subprocess.Popen(["sleep", "60"], stdout=log)
    os.close(log)
    Path(name).rename(run_dir / "3.log")
    assert logs.abandoned() == []
    writer.kill()
    writer.wait()
    assert logs.abandoned() == [run_dir / "3.log"]
    other, _ = logs.begin()
    assert not (run_dir / "3.log").exists()
    os.close(other)


def test_only_a_log_that_is_too_long_is_cut_and_its_newest_lines_stay(run_dir: Path) -> None:
    log, name = logs.begin()
    line = b"x" * 99 + b"\n"
    os.write(log, line * (logs.LIMIT // 100))
    logs.trim(log)
    assert Path(name).stat().st_size == logs.LIMIT // 100 * 100
    os.write(log, line * 2 + b"the last\n")
    logs.trim(log)
    first, *lines = Path(name).read_bytes().splitlines(keepends=True)
    assert first == b"(older lines were removed)\n"
    assert logs.KEPT - 200 < Path(name).stat().st_size < logs.KEPT + 100
    assert set(lines) == {line, b"the last\n"}
    os.write(log, b"goes on at the end\n")
    assert Path(name).read_bytes().endswith(b"the last\ngoes on at the end\n")
    os.close(log)


def test_links_and_directories_are_nobodys_logs(run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "1.log").symlink_to("/etc/passwd")
    (run_dir / "2.log").mkdir()
    assert run_dir / "1.log" not in logs.abandoned()
    os.close(logs.begin()[0])
    assert (run_dir / "2.log").is_dir()


def test_a_server_of_several_that_gets_no_disk_ends(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import pyublk\nclass Broken(pyublk.Target):\n    def __init__(self):\n        {}['key']\n"
    )
    with pytest.raises(ValueError, match=r"there is no target 'nul'.*did you mean 'null'"):
        daemon.start(DiskSpec(target="nul"), server="lab")
    with pytest.raises(TargetFailed, match=r"KeyError: 'key' \(broken.py, line 4\)") as caught:
        daemon.start(DiskSpec(target="broken.py:Broken"), server="lab")
    assert "broken.py" in str(caught.value.__cause__), "the traceback of the server"
    until = time.monotonic() + 30
    while any(run_dir.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    assert list(run_dir.iterdir()) == []


def test_a_server_of_several_that_dies_is_told_with_its_last_words(
    tmp_path: Path, run_dir: Path
) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, sys\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(ChannelError, match="ended before it answered") as caught:
        daemon.start(DiskSpec(target="dying.py:Any"), server="lab")
    assert caught.value.__notes__[-1] == "last words"
    with pytest.raises(ValueError, match="there is no target"):
        daemon.start(DiskSpec(target="nul"), server="lab")


def test_a_server_of_several_that_ends_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There will be another, as for one that says that it is ending."""

    class Ending:
        def __enter__(self) -> "Ending":
            return self

        def __exit__(self, *_exception: object) -> None:
            pass

        def ask(self, *_request: object, **_arguments: object) -> dict[str, int]:
            raise ChannelError("the server ended before it answered")

    class Next(Ending):
        def ask(self, *_request: object, **_arguments: object) -> dict[str, int]:
            return {"id": 3}

    servers: list[Ending] = [Ending(), Next()]
    monkeypatch.setattr(daemon, "_server_of", lambda _name: servers.pop(0))
    assert daemon._ask_to_serve("lab", DiskSpec(target="null"), None) == 3
