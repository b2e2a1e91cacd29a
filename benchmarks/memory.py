# SPDX-License-Identifier: MIT
"""Memory of servers and of what is beside them, and starts: `python -m benchmarks.memory`.

A server of 4 queues, depth 128 and requests up to 1 MiB reserves 512 MiB of addresses for its
buffers; what it holds of them before requests came is what is wanted to be small. So is what the
helper process takes: beside 250 disks in a process, and beside a target that has written all of its
300 MiB since, and what large requests leave in a server's buffers, without `trim_after` and with
it. Needs root and a kernel with ublk; `--vm` brings one, in which times are longer than
on silicon.
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
DISKS, LARGE = 250, 300

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


_MANY = """
import resource, sys, time
import pyublk
from pyublk.targets import Null
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
disks = []
for _ in range(int(sys.argv[1])):
    disks.append(pyublk.Device(Null(size=1 << 20), depth=4, max_io_size=4096))
    began = time.monotonic()
    disks[-1].start()
print(time.monotonic() - began, flush=True)
sys.stdin.read()
for disk in disks:
    disk.stop()
"""
_LARGE = """
import sys
import pyublk
class Memory(pyublk.Target):
    def read(self, offset, buffer):
        buffer[:] = data[offset : offset + len(buffer)]
data = bytearray(b"1") * (int(sys.argv[1]) << 20)
with pyublk.Device(Memory(size=len(data), read_only=True)):
    data[:] = b"2" * len(data)
    print("written", flush=True)
    sys.stdin.read()
"""
_USED = """
import os, sys, time
import pyublk
class Blank(pyublk.Target):
    def read(self, offset, buffer):
        buffer[:] = bytes(len(buffer))
options = {"trim_after": 1} if int(sys.argv[1]) else {}
with pyublk.Device(Blank(size=64 << 20, read_only=True), max_io_size=1 << 20, **options) as disk:
    pid = os.posix_spawn("/usr/bin/fio", [
        "fio", "--name=read", f"--filename={disk.path}", "--rw=read", "--bs=1m", "--direct=1",
        "--ioengine=libaio", "--iodepth=64", "--loops=4", "--output=/dev/null",
    ], os.environ)
    os.waitpid(pid, 0)
    time.sleep(4)
    print("idle again", flush=True)
    sys.stdin.read()
"""


def proportional(pid: int) -> int:
    """Bytes of memory of a process, pages that it shares in parts (PSS)."""
    match = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(match[1]) * 1024 if match else 0


def beside(server: int) -> list[int]:
    """A server's helper processes: those that watch it."""
    found = []
    for about in Path("/proc").glob("[0-9]*/fdinfo"):
        try:
            told = [info.read_text() for info in about.iterdir()]
        except OSError:  # ended meanwhile
            continue
        pid = int(about.parent.name)
        if pid != server and any(f"Pid:\t{server}\n" in one for one in told):
            found.append(pid)
    return found


def with_helper(program: str, argument: int) -> tuple[str, int, int]:
    """What a server says once it serves, its bytes of memory, and those of what is beside it."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(argument)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        memory = proportional(server.pid), sum(map(proportional, beside(server.pid)))
        server.communicate()
    return said, *memory


def idle_server() -> tuple[int, int]:
    """Bytes of an idle server in memory, and of its helper."""
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
            return resident(server.pid), sum(map(proportional, beside(server.pid)))
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
    server, helper = idle_server()
    print(
        f"idle server, {QUEUES} queues × {DEPTH} × {MAX_IO_SIZE // MIB} MiB: "
        f"{server / MIB:.1f} MiB resident (wanted: under {WANTED_RESIDENT // MIB}), "
        f"its helper {helper / MIB:.1f} MiB"
    )
    took, many, helper = with_helper(_MANY, DISKS)
    print(
        f"{DISKS} disks in a process: {many / MIB:.1f} MiB, and {helper / MIB:.1f} MiB beside it; "
        f"the last started in {float(took) * 1000:.0f} ms"
    )
    _, large, helper = with_helper(_LARGE, LARGE)
    print(
        f"a target of {LARGE} MiB, written since its start: {large / MIB:.1f} MiB, "
        f"and {helper / MIB:.1f} MiB beside it"
    )
    kept, trimmed = (with_helper(_USED, trims)[1] for trims in (0, 1))
    print(
        f"after 1 MiB reads, 64 at once: {kept / MIB:.1f} MiB, "
        f"with trim_after {trimmed / MIB:.1f} MiB"
    )
    seconds = start_of_a_tebibyte()
    print(f"sparse 1 TiB ram disk: usable after {seconds:.2f} s (wanted: {WANTED_START:g} s)")
    return 0 if server < WANTED_RESIDENT and seconds <= WANTED_START else 1


if __name__ == "__main__":
    sys.exit(main())
