# SPDX-License-Identifier: MIT
"""Programs that a benchmark needs, found where administrators' programs are too."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds for a program to be ready.
_PATIENCE = 60.0


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


def end(process: "subprocess.Popen[str]") -> None:
    """Ask a process to end; kill it after half a minute."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def nbdkit(socket: Path, *arguments: str) -> Iterator[int]:
    """nbdkit behind a socket, while the block runs: its process. Raises Unavailable with its last
    words."""
    line = [find("nbdkit", "nbdkit"), "--foreground", "--unix", str(socket), *arguments]
    server = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with server:
        try:
            until = time.monotonic() + _PATIENCE
            while not socket.exists() and server.poll() is None:
                if time.monotonic() > until:
                    raise Unavailable(f"{socket} was not there within {_PATIENCE:g} s")
                time.sleep(0.02)
            if server.poll() is not None and server.stderr is not None:
                told = server.stderr.read().strip() or server.returncode
                raise Unavailable(f"nbdkit ended: {told}")
            yield server.pid
        finally:
            end(server)
