# SPDX-License-Identifier: MIT
"""Many pyublk disks in one process: `python -m benchmarks.many_server KIND DISKS DIRECTORY`.

It prints a line of JSON before it starts them, when all serve, and when it has stopped them, and
waits for a line after each: the seconds of every start, stop and control command.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyublk
from pyublk import overlays
from pyublk.targets import File, Ram
from pyublk.targets.overlay import OverlayFile

from . import handlers

SIZE = 1 << 20


def _file(directory: Path, number: int) -> pyublk.Target:
    place = directory / f"disk-{number}"
    with place.open("wb") as made:
        made.truncate(SIZE)
    return File(place)


def _overlay(directory: Path, number: int) -> pyublk.Target:
    """All over one base."""
    base = directory / "base"
    if not base.exists():
        base.write_bytes(random.Random(1).randbytes(SIZE))
    place = directory / f"overlay-{number}"
    overlays.create(place, str(base))
    return OverlayFile(place)


TARGETS: dict[str, Callable[[Path, int], pyublk.Target]] = {
    "ram": lambda _directory, _number: Ram(size=SIZE),
    "file": _file,
    "overlay": _overlay,
    "methods": lambda _directory, _number: handlers.Methods(size=SIZE),
    "coroutines": lambda _directory, _number: handlers.Coroutines(size=SIZE),
}

#: The control commands of a disk's life, each a method of Controller.
COMMANDS = ("add", "set_params", "start", "stop", "delete")


def timed_commands() -> dict[str, list[float]]:
    """Where the seconds of every control command go from now on."""
    spent: dict[str, list[float]] = {name: [] for name in COMMANDS}

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(pyublk.Controller, name)

        def call(*args: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*args, **options)
            finally:
                spent[name].append(time.monotonic() - began)

        return call

    for name in COMMANDS:
        setattr(pyublk.Controller, name, timed(name))
    return spent


def each_timed(disks: list[pyublk.Device], step: Callable[[pyublk.Device], None]) -> list[float]:
    """The seconds that a step took for each disk, one after the other."""
    seconds = []
    for disk in disks:
        began = time.monotonic()
        step(disk)
        seconds.append(time.monotonic() - began)
    return seconds


def _say(**words: object) -> None:
    """One line; then waits for one."""
    print(json.dumps(words), flush=True)
    sys.stdin.readline()


def main() -> None:
    """Start one disk, then so many, then stop these; a line is said, and waited for, after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_server")
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("disks", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    make = TARGETS[options.kind]
    # What the first disk of a process brings along (helper, threads that watch) counts for none.
    with ExitStack() as opened:
        serve: Callable[[pyublk.Target], pyublk.Device] = pyublk.Device
        if options.threads:
            servers = opened.enter_context(pyublk.Servers(threads=options.threads))
            serve = partial(pyublk.Device, on=servers)
        opened.enter_context(serve(make(options.directory, options.disks)))
        disks = [serve(make(options.directory, n)) for n in range(options.disks)]
        _say()
        spent = timed_commands()
        starts = each_timed(disks, pyublk.Device.start)
        _say(starts=starts, paths=[disk.path for disk in disks])
        stops = each_timed(disks, pyublk.Device.stop)
        _say(stops=stops, commands=spent)


if __name__ == "__main__":
    main()
