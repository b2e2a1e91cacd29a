"""What happened between two samples of a disk, and what `pyublk top` shows of it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fcntl import ioctl
from pathlib import Path
from struct import pack

import pytest
from click.testing import CliRunner, Result
from samples import FakeObserver, foreign, histogram, sample, silent

from pyublk.cli import main
from pyublk.cli.failures import ExitCode
from pyublk.cli.watching import COLUMNS, Row, View, columns_for
from pyublk.service.observing import Sample, activity
from pyublk.stats import QueueStats

KIB = 1024
FAST, SLOW = histogram((100_000, 90)), histogram((100_000, 90), (4_000_000, 10))
BEFORE = [
    sample(0, counters=QueueStats(reads=1000, bytes_read=1000 * KIB), latency={"read": FAST}),
    sample(1, target="examples/rot13.py:Rot13"),
    silent(2),
    foreign(3),
]
NOW = [
    sample(
        0,
        time=2.0,
        counters=QueueStats(
            reads=1200, writes=100, bytes_read=5000 * KIB, bytes_written=800 * KIB, errors=3, held=7
        ),
        latency={
            "read": FAST + histogram((100_000, 190), (4_000_000, 10)),
            "write": histogram((8_000_000, 1)),
        },
        restarts=1,
    ),
    sample(
        1,
        target="examples/rot13.py:Rot13",
        time=2.0,
        counters=QueueStats(writes=8000, bytes_written=8000 * 64 * KIB, held=64),
        latency={"write": histogram((50_000, 8000))},
    ),
    silent(2, time=2.0),
    foreign(3, time=2.0, counters=QueueStats(reads=20, bytes_read=80 * KIB)),
]


# ---- what happened ----


def test_rates_and_latencies_of_the_interval() -> None:
    found = activity(BEFORE[0], NOW[0])
    assert found is not None
    assert (found.seconds, found.iops, found.read_iops, found.write_iops) == (2, 150, 100, 50)
    assert (found.bytes_read, found.bytes_written) == (2000 * KIB, 400 * KIB)
    assert found.latency == histogram((100_000, 190), (4_000_000, 10), (8_000_000, 1))


@pytest.mark.parametrize(
    "before",
    [None, sample(0, cookie=7), silent(0), sample(0, time=2.0)],
    ids=["none", "another disk", "silent", "at the same time"],
)
def test_what_cannot_be_compared_says_nothing(before: Sample | None) -> None:
    assert activity(before, NOW[0]) is None


def test_a_new_server_counts_from_nothing() -> None:
    """Restarted between the samples: its counters are smaller, and its own."""
    before = sample(0, counters=QueueStats(reads=10**6, bytes_read=1 << 40), latency={"read": SLOW})
    now = sample(
        0, time=1.0, server_pid=999, counters=QueueStats(reads=5, bytes_read=20480),
        latency={"read": histogram((100_000, 5))},
    )  # fmt: skip
    found = activity(before, now)
    assert found is not None
    assert (found.iops, found.bytes_read, found.latency.count) == (5, 20480, 5)


# ---- how it is shown ----


def rows() -> list[Row]:
    return [Row(now, activity(before, now)) for before, now in zip(BEFORE, NOW, strict=True)]


def screen(view: View, width: int, height: int = 24) -> list[str]:
    from rich.console import Console

    console = Console(width=width, height=height, color_system=None)
    with console.capture() as captured:
        console.print(view.frame(width, height))
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.fixture
def view() -> View:
    made = View()
    made.show(rows())
    return made


def test_a_wide_screen(view: View) -> None:
    lines = screen(view, 120)
    assert len(lines) == 24
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  disks: 4  4160 IOPS, read 1.99MiB/s, write 250MiB/s", lines[0]
    )
    titles = "  ID TARGET                    IOPS  READ/S WRITE/S     P50     P99   P99.9 DEPTH"
    assert lines[1] == f"{titles} ERRORS RST"
    assert lines[2].split() == [
        "0", "ram", "150", "1.95MiB", "400KiB", "100µs", "4.00ms", "8.00ms", "7", "3", "1",
    ]  # fmt: skip
    assert lines[3].split()[:4] == ["1", "examples/rot13.py:Rot13", "4000", "0B"]
    assert lines[4].split() == ["2", "silent", "0", "0B", "0B", "-", "-", "-", "0", "-", "0"]
    assert lines[5].split() == ["3", "-", "10", "40.0KiB", "0B", "-", "-", "-", "0", "-", "-"]
    assert lines[-2] == "/dev/ublkb2 does not tell: the server did not answer"
    assert lines[-1].startswith("q quit")


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 200])
def test_no_line_is_longer_than_the_screen(view: View, width: int) -> None:
    lines = screen(view, width)
    assert len(lines) == 24
    assert max(map(len, lines)) <= width
    assert len(lines[1].split()) == len(columns_for(width))


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (40, ["ID", "IOPS", "READ/S", "WRITE/S", "P99"]),
        (80, [column.title for column in COLUMNS]),
    ],
)
def test_what_there_is_room_for(view: View, width: int, titles: list[str]) -> None:
    assert screen(view, width)[1].split() == titles


@pytest.mark.parametrize(
    ("key", "numbers"),
    [("i", "1032"), ("r", "0312"), ("w", "1023"), ("l", "0123"), ("d", "1023"), ("e", "0123"),
     ("n", "0123"), ("x", "0123")],
)  # fmt: skip
def test_keys_sort(view: View, key: str, numbers: str) -> None:
    view.press(key)
    assert "".join(line.split()[0] for line in screen(view, 80)[2:6]) == numbers


def test_the_space_bar_pauses(view: View) -> None:
    view.press(" ")
    before = screen(view, 80)
    assert before[0].startswith("PAUSED")
    view.show([])
    assert screen(view, 80) == before
    view.press(" ")
    assert "there are no disks" in screen(view, 80)


def test_arrows_scroll_through_more_disks_than_there_are_lines() -> None:
    view = View()
    view.show([Row(sample(number), None) for number in range(30)])

    def first_and_last() -> tuple[str, str]:
        lines = screen(view, 80, 10)[2:-2]
        return lines[0].split()[0], lines[-1].split()[0]

    assert first_and_last() == ("0", "5")
    for key, seen in [
        ("down", ("1", "6")), ("page down", ("7", "12")), ("up", ("6", "11")),
        ("page up", ("0", "5")), ("up", ("0", "5")),
        *[("page down", None)] * 9, ("up", ("23", "28")),
    ]:  # fmt: skip
        view.press(key)
        assert seen in (None, first_and_last()), key


def test_a_disk_that_is_not_live_is_told() -> None:
    view = View()
    view.show([Row(sample(0, state="quiesced"), None)])
    assert screen(view, 80)[2].split()[:3] == ["0", "quiesced", "-"]


# ---- the command ----


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sees BEFORE and then NOW."""
    monkeypatch.setattr("pyublk.cli.top.open_controller", nullcontext)
    monkeypatch.setattr("pyublk.cli.top.Observer", FakeObserver(BEFORE, NOW))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["top", "--interval", "0.1", *arguments], prog_name="pyublk", catch_exceptions=False
    )


@pytest.mark.usefixtures("disks")
def test_once_as_json() -> None:
    result = run("--once", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    first, second, third, fourth = json.loads(result.stdout)
    assert first["latency"] == {"p50": 1e-4, "p99": 4e-3, "p99.9": 8e-3}
    assert (first["iops"], first["interval"], first["in_flight"], first["errors"]) == (150, 2, 7, 3)
    assert first["counters"]["reads"] == 1200
    assert (second["target"], second["restarts"]) == ("examples/rot13.py:Rot13", 0)
    assert (third["answers"], third["silence"]) == (False, "the server did not answer")
    assert (fourth["iops"], fourth["errors"], fourth["restarts"]) == (10, None, None)
    assert fourth["latency"] == {"p50": None, "p99": None, "p99.9": None}


@pytest.mark.usefixtures("disks")
def test_once_as_a_table() -> None:
    result = run("--once")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == [column.title for column in COLUMNS]
    assert len(lines) == 5
    assert result.stderr == "pyublk: /dev/ublkb2 does not tell: the server did not answer\n"


def test_no_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyublk.cli.top.open_controller", nullcontext)
    monkeypatch.setattr("pyublk.cli.top.Observer", FakeObserver([]))
    assert run("--once", "--json").stdout == "[]\n"
    result = run("--once")
    assert (result.stdout, result.stderr) == ("", "pyublk: there are no disks\n")


def test_an_interval_that_is_none() -> None:
    result = CliRunner().invoke(main, ["top", "--interval", "0"], prog_name="pyublk")
    assert result.exit_code == ExitCode.USAGE
    assert "0.0 is not in the range x>=0.1" in result.stderr


PROGRAM = """
import contextlib
from samples import FakeObserver
from test_observing import BEFORE, NOW
import pyublk.cli.top as top
top.open_controller = contextlib.nullcontext
top.Observer = FakeObserver(BEFORE, NOW)
from pyublk.cli import main
main()
"""
COMMAND = [sys.executable, "-c", PROGRAM, "top", "--interval", "0.1"]
HERE = Path(__file__).parent


def test_without_a_terminal_a_table_for_each_interval() -> None:
    """Until nobody reads them any more."""
    with subprocess.Popen(
        COMMAND, cwd=HERE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline().split()[:2] == ["ID", "TARGET"]
            assert [process.stdout.readline().split()[0] for _ in range(4)] == list("0123")
            assert process.stdout.readline() == "\n"
        process.stdout.close()
        assert process.wait(timeout=30) == ExitCode.FAILED


class Terminal:
    """A terminal of 80 columns with `pyublk top` in it, started by a command before it."""

    def __init__(self, before: list[str]) -> None:
        self.master, self.slave = os.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, pack("4H", 12, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        self.process = subprocess.Popen(
            [*before, *COMMAND], cwd=HERE, stdin=self.slave, stdout=self.slave, stderr=self.slave,
            start_new_session=True, env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def read_until(self, done: Callable[[str], object]) -> str:
        """What was shown since the last call, once it is enough."""
        end = time.monotonic() + 60
        while not done(self.shown.decode(errors="replace")):
            assert time.monotonic() < end, self.shown.decode(errors="replace")
            if select.select([self.master], [], [], 0.5)[0]:
                self.shown += os.read(self.master, 65536)
        shown, self.shown = self.shown.decode(errors="replace"), b""
        return shown

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """The exit code, when it has left the terminal as it was."""
        self.read_until(lambda text: self.process.poll() is not None and "\x1b[?1049l" in text)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.wait()


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    one = Terminal(getattr(request, "param", []))
    try:
        one.read_until(lambda text: "8.00ms" in text)
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        os.close(one.master)
        os.close(one.slave)


def test_q_ends(terminal: Terminal) -> None:
    assert termios.tcgetattr(terminal.slave) != terminal.before, "keys come one by one"
    terminal.press(b"q")
    assert terminal.end() == 0


def test_keys_act_at_once(terminal: Terminal) -> None:
    terminal.press(b" ")
    terminal.read_until(lambda text: "PAUSED" in text)
    terminal.press(b"w")  # the second disk comes first
    terminal.read_until(lambda text: re.search(r"   1 Rot13.*   0 ram ", text, re.S))
    terminal.press(b"\x1b[B")
    terminal.press(b"q")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=lambda one: str(one)
)
def test_signals_leave_the_terminal_as_it_was(
    terminal: Terminal, number: signal.Signals, code: int
) -> None:
    terminal.process.send_signal(number)
    assert terminal.end() == code


@pytest.mark.parametrize(
    "terminal", [["bash", "-c", 'set -m; "$@"; echo now it is stopped; fg', "bash"]], indirect=True
)
def test_ctrl_z_and_back(terminal: Terminal) -> None:
    """In a shell with jobs."""
    terminal.press(b"\x1a")
    shown = terminal.read_until(lambda text: "disks: 4" in text.partition("now it is stopped")[2])
    assert re.search(r"\x1b\[\?1049l.*now it is stopped.*\x1b\[\?1049h.*disks: 4", shown, re.S)
    terminal.press(b"q")
    assert terminal.end() == 0


def test_a_terminal_that_goes_away_ends_it(terminal: Terminal) -> None:
    os.close(terminal.slave)
    os.close(terminal.master)
    try:
        assert terminal.process.wait(timeout=30) != 0
    finally:
        terminal.master, terminal.slave = pty.openpty()
