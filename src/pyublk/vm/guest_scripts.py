"""The two per-run shell files the guest reads: its settings, and the command as a script."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyublk.vm.kernels import Kernel
from pyublk.vm.roots import Root


def settings(
    kernel: Kernel, root: Root, end: str, outputs: Sequence[Path], *, terminal: bool
) -> bytes:
    """Return the shell assignments that the guest's own scripts start with.

    Args:
        kernel: the kernel that runs.
        root: whose files the guest has.
        end: mark that ends the command's output.
        outputs: directories to be mounted writable.
        terminal: whether the command gets a terminal instead of pipes.
    """
    values = {
        "busybox": str(root.busybox),
        "release": kernel.release,
        "modules": str(root.in_guest(kernel.modules)),
        "end": end,
        "terminal": str(int(terminal)),
        "outputs": str(len(outputs)),
    }
    values |= {f"output_{number}": str(path) for number, path in enumerate(outputs)}
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    return os.fsencode("".join(lines))


def job(
    argv: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    terminal: os.terminal_size | None = None,
) -> bytes:
    """Return the script that turns into the command.

    The environment is set by env, which takes names that a shell does not.

    Args:
        argv: the command and its arguments.
        cwd: its working directory.
        environment: all of its environment.
        terminal: size of its terminal, if it has one.
    """
    directory = shlex.quote(str(cwd))
    words = [f"{name}={value}" for name, value in environment.items()]
    lines = ["echo $$ >/run/pyublk-vm/job.group", "echo 0 >/proc/$$/oom_score_adj"]
    if terminal is not None:
        lines += ["tty >/run/pyublk-vm/job.tty", "stty sane"]
        # A terminal may not know its size; then it says zero, which stty does not take.
        if terminal.lines and terminal.columns:
            lines.append(f"stty rows {terminal.lines} cols {terminal.columns}")
    lines += [
        "echo ready >&3",
        "exec 3>&-",
        f"cd -- {directory} || exit 126",
        f"exec /usr/bin/env -i {shlex.join([*words, *argv])}",
    ]
    return os.fsencode("\n".join([*lines, ""]))
