# SPDX-License-Identifier: MIT
"""Memory of an idle server, start of a huge RAM disk: `python -m benchmarks.memory`.

A server of 4 queues, depth 128 and requests up to 1 MiB reserves 512 MiB of addresses for its
buffers; what it holds of them before requests came is what is wanted to be small. Needs root and a
kernel with ublk; `--vm` brings one, in which times are longer than on silicon.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from pyublk.vm import Machine
from pyublk.vm.errors import VMError

MIB = 1 << 20
QUEUES, DEPTH, MAX_IO_SIZE = 4, 128, MIB
WANTED_RESIDENT = 60 * MIB
WANTED_START = 1.0

_ROOT = Path(__file__).parent.parent
_STARTED = """
import time
import pyublk
from pyublk.targets import Ram
began = time.monotonic()
with pyublk.Device(Ram(size=1 << 40)):
    print(time.monotonic() - began)
"""


def resident(pid: int) -> int:
    """Bytes of a process that are in memory (VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def children(pid: int) -> list[int]:
    """Processes that a process has started; a server's only one is its guardian."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for one in lists for child in one.read_text().split()]


def idle_server() -> tuple[int, int]:
    """Bytes of an idle server in memory, and of its guardian."""
    size = ("--size", str(1 << 30), "--max-io-size", str(MAX_IO_SIZE))
    shape = ("--queues", str(QUEUES), "--depth", str(DEPTH))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server", "handle", *shape, *size],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            if not server.stdout.readline():
                raise RuntimeError("the server did not start: its own words are above")
            return resident(server.pid), sum(map(resident, children(server.pid)))
        finally:
            server.terminate()


def start_of_a_tebibyte() -> float:
    """Seconds from making a sparse 1 TiB `ram` disk to its being usable."""
    done = subprocess.run(
        [sys.executable, "-c", _STARTED], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


def main() -> int:
    """Print what was found; returns 1 when more is needed than is wanted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--vm", action="store_true", help="measure in the virtual machine")
    if parser.parse_args().vm:
        try:
            line = [sys.executable, "-m", "benchmarks.memory"]
            return Machine(cpus=QUEUES).run(line, cwd=_ROOT, forward_signals=True).returncode
        except VMError as error:
            sys.exit(f"Error: {error}")
    server, guardian = idle_server()
    print(
        f"idle server, {QUEUES} queues × {DEPTH} × {MAX_IO_SIZE // MIB} MiB: "
        f"{server / MIB:.1f} MiB resident (wanted: under {WANTED_RESIDENT // MIB}), "
        f"its guardian {guardian / MIB:.1f} MiB"
    )
    seconds = start_of_a_tebibyte()
    print(f"sparse 1 TiB ram disk: usable after {seconds:.2f} s (wanted: {WANTED_START:g} s)")
    return 0 if server < WANTED_RESIDENT and seconds <= WANTED_START else 1


if __name__ == "__main__":
    sys.exit(main())
