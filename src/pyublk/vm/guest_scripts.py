"""The two per-run shell files the guest reads: its settings, and the command as a script."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyublk.vm.kernels import Kernel


def settings(
    kernel: Kernel,
    busybox: Path,
    end: str,
    terminal: os.terminal_size | None,
    outputs: Sequence[Path],
) -> bytes:
    """Return the shell assignments that the guest's own scripts start with.

    Args:
        kernel: the kernel that runs.
        busybox: its path on the host, which is its path in the guest.
        end: mark that ends the command's output.
        terminal: size of the command's terminal, or None when it gets pipes.
        outputs: directories to be mounted writable.
    """
    values = {
        "busybox": str(busybox),
        "release": kernel.release,
        "modules": str(kernel.modules),
        "end": end,
        "terminal": str(int(terminal is not None)),
        "rows": str(terminal.lines if terminal else 0),
        "columns": str(terminal.columns if terminal else 0),
        "outputs": str(len(outputs)),
    }
    values |= {f"output_{number}": str(path) for number, path in enumerate(outputs)}
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    return os.fsencode("".join(lines))


def job(argv: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> bytes:
    """Return the script that turns into the command.

    The environment is set by env, which takes names that a shell does not.
    """
    directory = shlex.quote(str(cwd))
    words = [f"{name}={value}" for name, value in environment.items()]
    command = shlex.join([*words, *argv])
    return os.fsencode(
        'echo "${group:-$$}" >/run/pyublk/job.group\n'
        "echo 0 >/proc/$$/oom_score_adj\n"
        "echo ready >&3\n"
        "exec 3>&-\n"
        f"cd -- {directory} || exit 126\n"
        f"exec /usr/bin/env -i {command}\n"
    )
