"""The machine's parts that need no guest: streams, scripts, archives, sentences."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyublk.vm import (
    accelerators,
    architecture,
    attached,
    guest_scripts,
    machine,
    programs,
    qemu,
)
from pyublk.vm.errors import (
    BootFailed,
    GuestFailed,
    GuestTimeout,
    Interrupted,
    MissingProgram,
    VMError,
    WrongUsage,
)
from pyublk.vm.initramfs import Archive
from pyublk.vm.kernels import Kernel
from pyublk.vm.machine import Machine
from pyublk.vm.roots import Root
from pyublk.vm.session import Patience, Session
from pyublk.vm.streams import EndMark, Input, Output, Sink

KERNEL = Kernel("6.12.1-test", Path("/cache/6.12.1-test"))
ROOT = Root(Path("/"), architecture.native(), Path("/bin/busybox"), Path("/cache"))

# --- output and input -----------------------------------------------------------------------


@given(st.lists(st.binary(max_size=6)), st.binary(max_size=4), st.binary(min_size=1, max_size=3))
def test_the_end_mark_is_found_however_the_bytes_arrive(
    chunks: list[bytes], rest: bytes, mark: bytes
) -> None:
    stream = b"".join(chunks) + mark + rest
    expected = stream[: stream.find(mark)]
    for step in (1, 2, 3, len(stream)):
        end = EndMark(mark)
        pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
        assert b"".join(end.feed(piece) for piece in pieces) == expected
        assert end.found


def test_bytes_are_held_back_only_while_they_may_be_the_mark() -> None:
    end = EndMark(b"abcabd")
    assert end.feed(b"xxabc") == b"xx"
    assert end.feed(b"abc") == b"abc"
    assert end.feed(b"abd") == b""
    assert end.found


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(20)
        yield ours, theirs


def test_input_ends_where_its_source_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb", buffering=0) as pipe:
        source = Input(ours, reader, b"go\n")
        assert source.source is None
        source.push()
        assert source.source == reader
        pipe.write(b"data")
        assert source.pull() == b"data"
        source.push()
        pipe.close()
        assert source.pull() == b""
        source.push()
    assert theirs.recv(100) == b"go\ndata"
    assert theirs.recv(100) == b""
    # The other direction stays open.
    theirs.send(b"x")
    assert ours.recv(1) == b"x"


def test_input_waits_for_a_port_that_is_full(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    data = bytes(range(256)) * 16384
    source = Input(ours, None, data)
    received = b""
    while len(received) < len(data):
        source.push()
        received += theirs.recv(1 << 20)
    assert received == data
    source.push()
    assert theirs.recv(1) == b""


# --- the run --------------------------------------------------------------------------------


class Guest:
    """The guest's end of a session: what a real one says, said by the test."""

    def __init__(
        self, directory: Path, *, boot: float = 20, answer: float = 20, raw: bool = False
    ) -> None:
        self.control, control = socket.socketpair()
        self.output, output = socket.socketpair()
        self.input, source = socket.socketpair()
        self.console = directory / "console"
        self.console.write_text("")
        self.sink = Sink(subprocess.PIPE)
        self.session = Session(
            control,
            [Output(output, "MARK", self.sink)],
            Input(source, None, b"go\n"),
            self.console,
            Patience(boot, 0.01 if answer < 20 else 20, answer, 20),
            None,
            raw=raw,
        )
        self.sockets = (self.control, control, self.output, output, self.input, source)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    for end in made.sockets:
        end.close()


def test_output_may_come_after_the_exit_code(guest: Guest) -> None:
    guest.control.send(b"ready\nexi")
    guest.control.send(b"t 7\n")
    guest.output.send(b"late MARKand not this")
    assert guest.session.run() == 7
    assert guest.sink.content() == b"late "
    assert guest.control.recv(100) == b"go\n"


def test_a_machine_that_stops_early_is_told_from_one_that_stops_late(guest: Guest) -> None:
    guest.control.close()
    with pytest.raises(BootFailed, match="stopped before it could start the command"):
        guest.session.run()


def test_a_machine_that_stops_late(guest: Guest) -> None:
    guest.control.send(b"ready\n")
    guest.control.close()
    with pytest.raises(GuestFailed, match="stopped before the command ended") as caught:
        guest.session.run()
    assert not isinstance(caught.value, BootFailed)  # the command may have done things already


def test_a_panic_is_told_by_the_console(guest: Guest) -> None:
    guest.console.write_text("[1.0] Kernel panic - not syncing: test")
    guest.control.close()
    with pytest.raises(GuestFailed, match="kernel panicked") as caught:
        guest.session.run()
    assert "not syncing: test" in caught.value.console


def test_a_guest_that_never_starts_the_command(tmp_path: Path) -> None:
    guest = Guest(tmp_path, boot=0.05)
    with pytest.raises(GuestFailed, match=r"did not start the command within 0\.05 s"):
        guest.session.run()
    for end in guest.sockets:
        end.close()


def test_a_reader_of_the_output_that_pauses_is_not_the_guests_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest answers while our reader makes us wait: that is heard only afterwards."""
    guest = Guest(tmp_path, answer=2)
    guest.control.send(b"ready\n")
    guest.output.send(b"a page")
    deliver = guest.sink.deliver
    pauses = 0

    def pause(data: bytes) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 2:  # a question has gone out meanwhile
            time.sleep(2.5)
            guest.control.send(b"pong\nexit 0\n")
            guest.output.send(b"MARK")
        deliver(data)

    monkeypatch.setattr(guest.sink, "deliver", pause)
    tell = guest.session.tell

    def ask(line: str) -> None:
        tell(line)
        if line == "ping":
            guest.output.send(b", another page")

    monkeypatch.setattr(guest.session, "tell", ask)
    assert guest.session.run() == 0
    assert guest.sink.content() == b"a page, another page"
    for end in guest.sockets:
        end.close()


def test_an_interrupt_during_the_boot_ends_the_machine(guest: Guest) -> None:
    with pytest.raises(Interrupted):
        guest.session.interrupt()


@pytest.mark.parametrize(
    ("failure", "tries"), [(BootFailed("it panicked", ""), 3), (GuestFailed("it panicked", ""), 1)]
)
def test_only_a_boot_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failure: GuestFailed, tries: int
) -> None:
    commands: list[object] = []

    def attempt(_machine: Machine, command: object, *_: object) -> None:
        commands.append(command)
        raise failure

    monkeypatch.setattr(machine, "find_kernel", lambda *_, **__: KERNEL)
    monkeypatch.setattr(programs, "find", lambda *_: "/bin/sh")
    monkeypatch.setattr(Machine, "_attempt", attempt)
    with pytest.raises(GuestFailed) as caught:
        Machine().run(["true"])
    assert caught.value is failure
    assert commands == [["true"]] * tries


def test_a_timeout_that_is_none() -> None:
    command = [sys.executable, "-m", "pyublk.vm", "--timeout", "0", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: --timeout must be above 0 seconds, not 0\n")


# --- scripts and archives -------------------------------------------------------------------


def shell(script: bytes) -> bytes:
    return subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout


def test_settings_survive_the_shell() -> None:
    outputs = [Path("/a b/c'd"), Path('/e"f/$HOME')]
    script = guest_scripts.settings(KERNEL, ROOT, "mark", outputs, terminal=True)
    shown = shell(
        script + b'printf "%s\\n" "$release" "$terminal" "$outputs" "$output_0" "$output_1"'
    )
    assert shown.decode().splitlines() == [
        "6.12.1-test",
        "1",
        "2",
        "/a b/c'd",
        '/e"f/$HOME',
    ]


def run_job(argv: list[str], directory: Path, environment: dict[str, str]) -> bytes:
    """Run a job outside a guest, where its directory and its control port are missing."""
    job = guest_scripts.job(argv, directory, environment)
    own = job.replace(b"/run/pyublk-vm/job.group", b"/dev/null").replace(
        b"0 >/proc", b"0 >/dev/null#"
    )
    return shell(b"exec 3>/dev/null\n" + own)


def test_the_job_becomes_the_command(tmp_path: Path) -> None:
    argv = ["sh", "-c", 'printf "%s|" "$PWD" "$@"', "sh", os.fsdecode(b"no utf-8 \xff"), "'\"$(x)"]
    shown = run_job(argv, tmp_path, {"PATH": os.environ["PATH"]})
    assert shown == os.fsencode(tmp_path) + b"|no utf-8 \xff|'\"$(x)|"


def test_the_job_has_only_the_environment_it_is_given(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "ODD.NAME": "a\nb", "QUOTES": "'\"$(x)"}
    shown = run_job(["env", "-0"], tmp_path, environment)
    variables = dict(item.split("=", 1) for item in shown.decode().split("\0") if item)
    assert variables == environment


@pytest.mark.parametrize("script", ["init.sh", "session.sh"])
def test_the_guests_scripts_are_shell(script: str) -> None:
    path = Path(guest_scripts.__file__).parent / "guest" / script
    subprocess.run(["sh", "-n", path], check=True)


def test_the_archive_unpacks(tmp_path: Path) -> None:
    busybox = programs.shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    archive = Archive()
    archive.directory("empty")
    archive.file("a/b/program", b"#!/bin/sh\n", 0o755)
    archive.file("a/b/odd-length", b"12345")
    subprocess.run(
        [busybox, "cpio", "-i", "-d"], input=archive.finish(), cwd=tmp_path, check=True, stderr=-3
    )
    assert (tmp_path / "empty").is_dir()
    assert (tmp_path / "a/b/odd-length").read_bytes() == b"12345"
    assert (tmp_path / "a/b/program").stat().st_mode & 0o777 == 0o755


# --- the emulator's command line --------------------------------------------------------------


def emulator_command(accelerator: str, outputs: list[Path], root: Root = ROOT) -> str:
    channels = qemu.Channels({1: 11}, Path("/tmp/console"))
    return " ".join(
        qemu.command(
            root,
            accelerator,
            KERNEL,
            Path("/tmp/initramfs"),
            channels,
            cpus=1,
            memory=3 << 30,
            outputs=outputs,
        )
    )


@pytest.fixture
def _emulator() -> None:
    native = architecture.native()
    try:
        programs.find(native.qemu, native.package)
    except MissingProgram as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("_emulator")
def test_the_root_is_read_only_and_outputs_are_not() -> None:
    command = emulator_command("tcg", [Path("/a,b")])
    assert "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on" in command
    assert "local,id=output0,path=/a,,b,security_model=none,multidevs=remap -device" in command
    assert "-m 3072M" in command
    assert "virtserialport,bus=ports.0,nr=1" in command
    assert "--pdeathsig KILL" in command


@pytest.mark.usefixtures("_emulator")
def test_counting_is_the_designs_mode() -> None:
    command = emulator_command("count", [])
    for part in ("tcg,thread=single", "shift=0,sleep=off", "-cpu max,-erms,-fsrm", "-smp 1"):
        assert part in command


def test_a_root_of_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own emulator, machine and processor; QEMU takes no other's properties."""
    monkeypatch.setattr(programs, "find", lambda name, _package: f"/usr/bin/{name}")
    directory = Path("/roots/arm64")
    arm = architecture.KNOWN["aarch64"]
    root = Root(directory, arm, Path("/usr/bin/busybox"), directory / "var/cache")
    command = emulator_command("tcg", [], root)
    assert "qemu-system-aarch64 -machine virt,gic-version=max -accel tcg" in command
    assert "-cpu neoverse-n1 -smp" in command
    assert "console=ttyAMA0" in command
    assert "local,id=host,path=/roots/arm64,security_model=none" in command
    assert "-accel kvm -cpu host" in " ".join(accelerators.options("kvm", arm))
    kernel = Kernel("7.3", directory / "var/cache/7.3")
    script = guest_scripts.settings(kernel, root, "mark", [], terminal=False)
    assert shell(script + b'echo "$busybox $modules"') == (
        b"/usr/bin/busybox /var/cache/7.3/modules\n"
    )


# --- the accelerator's answer -----------------------------------------------------------------


def test_an_answer_holds_for_one_boot_and_one_emulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "pyublk").mkdir()
    assert accelerators.remembered("boot", "qemu") is None
    accelerators.remember("boot", "qemu", "kvm")
    assert accelerators.remembered("boot", "qemu") == "kvm"
    assert accelerators.remembered("next boot", "qemu") is None
    assert accelerators.remembered("boot", "other") is None
    (tmp_path / "pyublk/accelerator.json").write_text("[damaged")
    assert accelerators.remembered("boot", "qemu") is None


# --- what a user is told ----------------------------------------------------------------------


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(MissingProgram, match="apt-get install some-package"):
        programs.find("no-such-program", "some-package")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"cpus": 0}, "1 to 255 processors, not 0"),
        ({"cpus": 2, "count_instructions": True}, "takes one processor, not 2"),
        ({"memory": 1 << 20}, "at least 256 MiB of memory, not 1048576 bytes"),
        ({"outputs": ["/no/such/directory"]}, "/no/such/directory is not a directory: make it"),
    ],
)
def test_a_machine_that_cannot_be(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(VMError, match=sentence):
        Machine(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1kb", 1024)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert attached.memory_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.5G", "1T"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(VMError, match="write 512M or 4GiB"):
        attached.memory_size(text)


def test_the_environment_is_chosen() -> None:
    source = {"PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "src", "SECRET": "x", "WANTED": "y"}
    assert attached.environment(["WANTED", "SET=a=b"], source) == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "PYTHONPATH": "src",
        "WANTED": "y",
        "SET": "a=b",
    }
    with pytest.raises(VMError, match="'UNSET' cannot be passed on: it is not set here"):
        attached.environment(["UNSET"], source)


def test_a_wrong_argument_has_the_exit_code_of_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert attached.report(WrongUsage("no")) == 2
    assert capsys.readouterr().err == "pyublk vm: no\n"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e10])
def test_a_timeout_that_is_none_is_refused_before_anything_boots(timeout: float) -> None:
    made = object.__new__(Machine)
    with pytest.raises(WrongUsage, match="timeout must be above 0 and at most 1e\\+09 s, not "):
        made.run(["true"], timeout=timeout)


def test_exit_codes_by_kind_of_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert attached.report(VMError("no kernel")) == 125
    assert attached.report(GuestFailed("it panicked", "[1.0] the log\n")) == 125
    assert attached.report(GuestTimeout("too long", "")) == 124
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "pyublk vm: no kernel",
        "--- the guest kernel's log",
        "[1.0] the log",
        "---",
        "pyublk vm: it panicked",
        "pyublk vm: too long",
    ]
