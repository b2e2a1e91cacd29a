"""Machines: boot a kernel, run a command on the caller's files, throw everything away."""

import os
import secrets
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyublk.vm import (
    accelerators,
    guest_scripts,
    initramfs,
    programs,
    qemu,
    roots,
    signals,
)
from pyublk.vm.apt import Progress
from pyublk.vm.emulator import CONTROL, ERRORS, INPUT, OUTPUT, Emulator
from pyublk.vm.errors import BootFailed, VMError, WrongUsage
from pyublk.vm.kernels import check_name, find_kernel, quiet
from pyublk.vm.session import Patience, Session
from pyublk.vm.streams import Input, Output, Sink

GIB = 1 << 30

# Where the guest mounts something of its own over the host's directory.
_GUEST_OWN = ("/dev", "/proc", "/run", "/sys")
# An emulated machine now and then stops in its kernel's first seconds, or panics: a processor meets
# the breakpoint by which the kernel changes its own code after the change is over (an `int3` oops).
_BOOTS = 3
#: Seconds; more is a mistake, and too much for a clock.
LONGEST = 1e9
_PATIENCE = Patience(boot=60, ping_interval=10, ping_answer=60, output=10)
# A guest that counts instructions runs ten to twenty times slower than the clock on the wall.
_PATIENCE_COUNTING = Patience(boot=600, ping_interval=60, ping_answer=300, output=60)


@dataclass(frozen=True)
class Completed:
    """A command that ended in a machine.

    Attributes:
        args: the command.
        returncode: its exit code; 128 + n when signal n ended it, 127 when it was not found.
        stdout: what it wrote, with `stdout=PIPE`; else None.
        stderr: the same for its errors.
        console: what the guest's kernel wrote to its console: warnings and worse.
        boot_time: seconds from the start of the machine to the start of the command.
        accelerator: `kvm`, `tcg` or `count`.
        release: the kernel's release.
    """

    args: tuple[str, ...]
    returncode: int
    stdout: bytes | None
    stderr: bytes | None
    console: str
    boot_time: float
    accelerator: str
    release: str


class Machine:
    """A virtual machine that boots afresh for every command.

    The guest's root is the host's, read-only, under a file system in memory: the command sees
    all files at their places and may write anywhere, and nothing of that reaches the host. The
    exception are the directories in `outputs`. The command runs as root. There is no network.

    Args:
        kernel: `latest`, `host`, or a series such as `6.12`; fetched if need be.
        cpus: number of processors; counting instructions takes exactly one.
        memory: bytes; the guest's files in memory may take three quarters of it.
        count_instructions: run so that an instruction takes a nanosecond of the guest's time:
            measurements repeat within a tenth of a percent, and take ten to twenty times longer.
        outputs: directories of the host that the guest may write to.
        refresh: ask the mirror for a newer kernel of that name.
        progress: told what is being done to get the kernel.
        root: the root of the guest in place of the host's; it is read-only as well.

    Raises:
        WrongUsage: a value is out of range, or an output is no directory.
        KernelUnavailable: the kernel cannot be had.
        MissingProgram: QEMU or busybox is not installed.
    """

    def __init__(
        self,
        kernel: str = "latest",
        *,
        cpus: int | None = None,
        memory: int = 2 * GIB,
        count_instructions: bool = False,
        outputs: Sequence[str | os.PathLike[str]] = (),
        refresh: bool = False,
        progress: Progress = quiet,
        root: roots.Root | None = None,
    ) -> None:
        if count_instructions and cpus not in (None, 1):
            raise WrongUsage(
                f"counting instructions takes one processor, not {cpus}: leave out cpus"
            )
        limit = 255
        if cpus is not None and not 1 <= cpus <= limit:
            raise WrongUsage(f"a machine has 1 to {limit} processors, not {cpus}")
        if memory < GIB // 4:
            raise WrongUsage(f"a machine needs at least 256 MiB of memory, not {memory} bytes")
        if memory > (own := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise WrongUsage(
                f"memory must be at most this machine's own, {own} bytes, not {memory}"
            )
        check_name(kernel, root.architecture if root else None)
        self.cpus = 1 if count_instructions else (cpus or 2)
        self.memory = memory
        self.count_instructions = count_instructions
        self.outputs = tuple(Path(output).resolve() for output in outputs)
        for output in self.outputs:
            if not output.is_dir():
                raise WrongUsage(f"the output {output} is not a directory: make it first")
        self._root = root or roots.own()
        architecture = self._root.architecture
        programs.find(architecture.qemu, architecture.package)
        self.kernel = find_kernel(
            kernel,
            refresh=refresh,
            progress=progress,
            architecture=architecture,
            cache=self._root.kernels,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float | None = None,
        terminal: bool = False,
        forward_signals: bool = False,
    ) -> Completed:
        """Boot, run a command, throw the machine away.

        Args:
            argv: the command and its arguments.
            cwd: its working directory; this process's by default.
            env: its environment; this process's by default.
            input: what it reads from its standard input.
            stdin: descriptor it reads instead, or `subprocess.DEVNULL`; this process's own
                standard input by default.
            stdout: descriptor its output goes to, or `subprocess.PIPE` or `DEVNULL`; this
                process's own by default.
            stderr: the same for its errors.
            timeout: seconds it may take, not counting the boot.
            terminal: give it a terminal of the size of this process's own, to which its input
                and output belong; this process's terminal should be raw.
            forward_signals: pass SIGINT on to it, and end the machine on a second one within
                3 s, on SIGTERM and on SIGHUP. For the main thread only.

        Raises:
            GuestFailed: the guest panicked, hung, or stopped; holds the kernel's console.
            GuestTimeout: the command took longer than `timeout`.
            Interrupted: a forwarded signal ended the machine.
            WrongUsage: there is no command, or `timeout` is none.
            VMError: the emulator did not start.
        """
        _check_run(argv, timeout, terminal=terminal, forward_signals=forward_signals)
        directory = self._directory(Path.cwd() if cwd is None else Path(cwd).absolute())
        attempt = partial(
            self._attempt,
            argv,
            directory,
            os.environ if env is None else env,
            input,
            stdin,
            stdout,
            stderr,
            timeout,
            terminal,
            forward_signals,
        )
        for _ in range(_BOOTS - 1):
            # Nothing of the command has run then, and nothing of its input was read.
            with suppress(BootFailed):
                return attempt()
        return attempt()

    def _attempt(
        self,
        argv: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        input: bytes | None,
        stdin: int | None,
        stdout: int | None,
        stderr: int | None,
        timeout: float | None,
        terminal: bool,
        forward_signals: bool,
    ) -> Completed:
        accelerator = self._accelerator()
        mark = secrets.token_hex(16)
        with ExitStack() as stack:
            emulator = Emulator(stack)
            size = os.get_terminal_size(0) if terminal else None
            job = guest_scripts.job(argv, directory, environment, size)
            self._write_initramfs(emulator, mark, job, terminal=terminal)
            ports = emulator.ports
            out, err = Sink(1 if stdout is None else stdout), Sink(2 if stderr is None else stderr)
            descriptor = None if input is not None else _input_descriptor(stdin)
            source = Input(ports[INPUT], descriptor, b"go\n" + (input or b""))
            outputs = [Output(ports[OUTPUT], mark, out), Output(ports[ERRORS], mark, err)]
            session = Session(
                ports[CONTROL],
                outputs,
                source,
                emulator.console,
                _PATIENCE_COUNTING if self.count_instructions else _PATIENCE,
                timeout,
                raw=terminal,
            )
            command = qemu.command(
                self._root,
                accelerator,
                self.kernel,
                emulator.initramfs,
                emulator.channels(),
                cpus=self.cpus,
                memory=self.memory,
                outputs=self.outputs,
            )
            if forward_signals:
                stack.enter_context(signals.forwarded(session, terminal=terminal))
            with emulator.running(command):
                code = session.run()
            return Completed(
                tuple(argv),
                code,
                out.content(),
                err.content(),
                session.console(),
                session.boot_time,
                accelerator,
                self.kernel.release,
            )

    def _write_initramfs(
        self, emulator: Emulator, mark: str, job: bytes, *, terminal: bool
    ) -> None:
        settings = guest_scripts.settings(
            self.kernel, self._root, mark, self.outputs, terminal=terminal
        )
        busybox = self._root.on_host(self._root.busybox)
        emulator.initramfs.write_bytes(initramfs.build(self.kernel, busybox, settings, job))

    def _accelerator(self) -> str:
        if self.count_instructions:
            return "count"
        busybox = self._root.on_host(self._root.busybox)
        return accelerators.choose(self.kernel, busybox, self._root.architecture)

    def _directory(self, directory: Path) -> Path:
        """Check that the guest has this directory of the host."""
        resolved = directory.resolve()
        shared = any(resolved.is_relative_to(output) for output in self.outputs)
        for own in _GUEST_OWN:
            if resolved.is_relative_to(own) and not shared:
                raise VMError(
                    f"the working directory {resolved} is not in the machine, which has a {own} "
                    "of its own: choose another, or make it an output"
                )
        return directory


def _check_run(
    argv: Sequence[str], timeout: float | None, *, terminal: bool, forward_signals: bool
) -> None:
    if not argv:
        raise WrongUsage("no command was given")
    if timeout is not None and not 0 < timeout <= LONGEST:
        raise WrongUsage(f"timeout must be above 0 and at most {LONGEST:g} s, not {timeout:g}")
    if forward_signals and threading.current_thread() is not threading.main_thread():
        raise VMError("signals can be forwarded from the main thread only")
    if terminal:
        programs.find("script", "bsdutils")


def _input_descriptor(stdin: int | None) -> int | None:
    if stdin == subprocess.DEVNULL:
        return None
    descriptor = 0 if stdin is None else stdin
    try:
        os.fstat(descriptor)
    except OSError:
        # A process started without a standard input has none to pass on.
        return None
    return descriptor
