# SPDX-License-Identifier: MIT
"""Programs that a benchmark needs, found where administrators' programs are too."""

import os
import platform
import shutil
import subprocess


class Unavailable(Exception):
    """A contender cannot take part here; the message is one sentence."""


def find(program: str, package: str) -> str:
    """The path of a program. Raises Unavailable, naming its Debian `package`."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    if found is None:
        raise Unavailable(f"{program} is not installed (Debian package {package})")
    return found


def run(*line: str) -> str:
    """Run a program to its end; what it printed. Raises Unavailable with its last words."""
    # The clock of the guest that counts instructions jumps ahead while it waits for the host's
    # files: what limits a run there is the machine's own limit.
    done = subprocess.run(line, capture_output=True, text=True, timeout=24 * 3600, check=False)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        last = words[-1] if words else f"exit code {done.returncode}"
        raise Unavailable(f"{os.path.basename(line[0])} failed: {last}")
    return done.stdout


def load_module(name: str, *parameters: str) -> None:
    """Load a kernel module, unless it is there. Raises Unavailable when it is not to be had."""
    if os.path.isdir(f"/sys/module/{name}"):
        return
    try:
        run(find("modprobe", "kmod"), name, *parameters)
    except Unavailable as error:
        raise Unavailable(
            f"the kernel {platform.release()} does not load {name} ({error}); "
            "the guest of --count-instructions does"
        ) from None
