"""Real boots of the virtual machine. Each test boots once; a boot takes about five seconds."""

import hashlib
import os
import pty
import resource
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pyublk.vm import (
    GuestFailed,
    GuestTimeout,
    KernelUnavailable,
    Machine,
    MissingProgram,
    accelerators,
    architecture,
    machine,
)
from pyublk.vm.session import Patience

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
LIMIT = 60
"""Seconds within which anything here must have happened."""


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    try:
        Machine()
    except (KernelUnavailable, MissingProgram) as reason:
        pytest.skip(str(reason))


def emulator_of(process: int) -> int:
    """Return the pid of the emulator that a process has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text() for child in children}
    return next(child for child, name in names.items() if name.startswith("qemu"))


@contextmanager
def command_line(*argv: str, **options: object) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `python -m pyublk.vm` on a command; it is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "pyublk.vm", "--timeout", "30", "--", *argv],
        **{"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE, **options},  # type: ignore[call-overload]
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_files_streams_and_exit_code_pass_both_ways(tmp_path: Path) -> None:
    every_byte = bytes(range(256)) * 4096
    there = tmp_path / "there"
    there.write_bytes(every_byte)
    script = """
        echo from-here >made-in-guest
        echo changed >there-copy && cp there-copy there
        cat
        printf '%s|%s|%s|%s' "$PWD" "$MARK" "$(id -u)" "$(ulimit -l)" >&2
        test -c /dev/ublk-control || exit 1
        exit 7
    """
    done = Machine().run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "MARK": "a b'\"$\n"},
        input=every_byte,
        stdout=PIPE,
        stderr=PIPE,
        timeout=LIMIT,
    )
    assert done.stderr == f"{tmp_path}|a b'\"$\n|0|unlimited".encode()
    assert done.returncode == 7
    assert done.stdout is not None
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(every_byte).digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
    assert there.read_bytes() == every_byte
    assert done.boot_time > 0


def test_only_the_output_directory_is_written_and_leftover_programs_do_not_hold(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out, put"
    output.mkdir()
    script = """
        sleep 1000 &
        dd if=/dev/urandom of="$1/result" bs=1M count=3 2>/dev/null
        sha256sum <"$1/result"
        modprobe null_blk nr_devices=1 && mkfs.ext4 -q /dev/nullb0 2>/dev/null
        modprobe xfs && grep -w xfs /proc/filesystems >&2
    """
    done = Machine(outputs=[output]).run(
        ["sh", "-c", script, "sh", str(output)],
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        timeout=LIMIT,
    )
    result = (output / "result").read_bytes()
    assert done.stdout is not None
    assert done.stdout.split()[0].decode() == hashlib.sha256(result).hexdigest()
    assert len(result) == 3 << 20
    assert done.stderr is not None
    assert done.stderr.split() == [b"xfs"]


PROMISE = 10.0
"""Seconds in which a command is there on two processors, emulated ones too."""


def test_a_command_is_there_in_time() -> None:
    """A busy host keeps no time: what the promise bounds is the processors' time, and the waiting
    that was not for a processor."""

    def processors_time() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def somebody_waited() -> float:
        """Seconds so far in which a thread of this host had no processor."""
        return int(pressure.read_text().split()[4].removeprefix("total=")) / 1e6

    pressure = Path("/proc/pressure/cpu")
    if not pressure.exists():
        pytest.skip("this host's kernel does not tell how busy it is (CONFIG_PSI)")
    used, waited = processors_time(), somebody_waited()
    done = Machine(cpus=2).run(["true"], stdin=DEVNULL, timeout=LIMIT)
    assert done.returncode == 0
    assert processors_time() - used < 2 * PROMISE  # the end of the machine included
    assert done.boot_time - (somebody_waited() - waited) < PROMISE


def test_a_command_that_is_not_there() -> None:
    done = Machine().run(["no-such-command"], stdin=DEVNULL, stderr=PIPE, timeout=LIMIT)
    assert done.returncode == 127
    assert b"no-such-command" in (done.stderr or b"")


def test_counting_repeats_itself() -> None:
    """A guest that counts instructions finds the same distance between two points."""
    script = (
        "import time\n"
        "def measure():\n"
        "    a = time.perf_counter_ns(); sum(range(10**5)); b = time.perf_counter_ns()\n"
        "    return b - a\n"
        "print(*(measure() for _ in range(15)))"
    )
    done = Machine(count_instructions=True).run(
        [sys.executable, "-S", "-c", script],
        stdin=DEVNULL,
        stdout=PIPE,
        timeout=LIMIT,
    )
    assert done.accelerator == "count"
    # Those that the guest's timer, and its other processes, did not interrupt. There are tens of
    # instructions in each turn of the loop, and each is a nanosecond: no clock of a machine that is
    # emulated at full speed would find the same so often.
    found = sorted(map(int, (done.stdout or b"").split()))[:4]
    assert len(found) == 4
    assert 5e5 < found[0] < 5e7
    assert found[-1] - found[0] < found[0] * 0.005, found


def test_a_panic_is_reported_with_the_kernels_log() -> None:
    with pytest.raises(GuestFailed, match="kernel panicked") as caught:
        Machine().run(["sh", "-c", "echo c >/proc/sysrq-trigger"], stdin=DEVNULL, timeout=LIMIT)
    assert "sysrq triggered crash" in caught.value.console


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(GuestTimeout, match=r"did not end within 0\.5 s") as caught:
        Machine().run(["sleep", "1000"], stdin=DEVNULL, timeout=0.5)
    assert "Show Blocked State" in caught.value.console


def test_a_guest_that_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PATIENCE", Patience(LIMIT, 0.2, 2, 2))
    ours, theirs = os.pipe()
    # The first output shows that the guest runs; then its processors stop.
    with os.fdopen(ours), os.fdopen(theirs, "w"):
        freezer = subprocess.Popen(
            [sys.executable, "-c", FREEZE, str(os.getpid())], stdin=ours, stdout=DEVNULL
        )
        with pytest.raises(GuestFailed, match="no sign of life for 2 s"):
            Machine().run(["sh", "-c", "echo; sleep 1000"], stdin=DEVNULL, stdout=theirs)
        assert freezer.wait(LIMIT) == 0


FREEZE = """
import os, pathlib, signal, sys
os.read(0, 1)
parent = sys.argv[1]
for child in pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
    if pathlib.Path(f"/proc/{child}/comm").read_text().startswith("qemu"):
        os.kill(int(child), signal.SIGSTOP)
"""


def test_ctrl_c_reaches_the_command() -> None:
    script = 'trap "echo caught; exit 5" INT; echo up; while :; do sleep 0.1; done'
    with command_line("sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT) == (b"caught\n", b"")
        assert process.returncode == 5


def test_ctrl_c_twice_ends_the_machine() -> None:
    script = 'trap "echo caught" INT; echo up; while :; do sleep 0.1; done'
    with command_line("sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert process.returncode == 128 + signal.SIGINT


def test_the_emulator_does_not_outlive_a_killed_caller() -> None:
    with command_line("sh", "-c", "echo up; sleep 1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        emulator = os.pidfd_open(emulator_of(process.pid))
        process.kill()
        with selectors.DefaultSelector() as selector, os.fdopen(emulator):
            selector.register(emulator, selectors.EVENT_READ)
            assert selector.select(LIMIT)


def test_a_reader_that_goes_away_ends_the_command() -> None:
    with command_line("yes") as process:
        assert process.stdout is not None
        start = process.stdout.read(2)
        assert start == b"y\n", process.communicate()
        process.stdout.close()
        assert process.wait(LIMIT) == 128 + signal.SIGPIPE


def talk(options: list[str], replies: dict[bytes, bytes]) -> tuple[bytes, int]:
    """Run `python -m pyublk.vm` on a terminal; returns what it showed, and the exit code.

    Each of `replies` is typed once, when what it answers to has been shown.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.environ["SHELL"] = "/bin/sh"
        os.execv(sys.executable, [sys.executable, "-m", "pyublk.vm", *options])
    seen, left = b"", dict(replies)
    with os.fdopen(terminal, "r+b", buffering=0) as stream, suppress(OSError):
        end = time.monotonic() + LIMIT
        # OSError is what a terminal says when the last program on it has ended.
        while select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            seen += stream.read(4096)
            for awaited in [awaited for awaited in left if awaited in seen]:
                stream.write(left.pop(awaited))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return seen, os.waitstatus_to_exitcode(status)


def test_a_terminal_is_a_terminal_in_the_guest() -> None:
    script = "stty size; tty; read line; echo got $line; kill -INT $$"
    seen, code = talk(["--", "sh", "-c", script], {b"/dev/pts/0": b"hello\r"})
    assert b"got hello" in seen
    assert code == 128 + signal.SIGINT


def test_without_a_command_there_is_the_callers_shell() -> None:
    """With a prompt, line editing by the terminal, and the code it exits with."""
    replies = {
        b"ready> ": b"tty; echo $0 sum=$((40 + 3))\x7f\x7f\x7f2)) $(id -u)\r",
        b"sum=42 0": b"test -c /dev/ublk-control && exit 9\r",
    }
    seen, code = talk(["--env", "PS1=ready> "], replies)
    assert b"/dev/pts/0" in seen
    assert b"/bin/sh sum=42 0" in seen
    assert code == 9, seen


def test_the_trial_of_an_accelerator() -> None:
    native = architecture.native()
    ready = Machine()
    busybox = Path("/bin/busybox")
    assert accelerators.boots(accelerators.options("tcg", native), ready.kernel, busybox, native)
    assert not accelerators.boots(("-accel", "nothing"), ready.kernel, busybox, native)
