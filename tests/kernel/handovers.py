"""Servers that hand their disk over to the next one, which has been started already, hundreds of
times, and are killed in between: `./run soak --hand-overs 500`.

An upgrade without the start of an interpreter, which takes most of the time of `--upgrades`. No
request may be done twice by a hand-over: the history of the clients allows that for kills alone.
"""

import os
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clients import BLOCK, PATIENCE, Clients, values_in
from linear import History
from nursery import Child, Nursery, Wire
from report import Report
from servers import until

import pyublk
from pyublk.targets import File

#: All clients use the same few blocks, so that a write that comes late meets another one.
BLOCKS = 8
CLIENTS = 4
QUEUES = (1, 2, 4)
PATHS = ("auto", "copy", "user-copy")
#: Servers of a disk, of which every KILLED-th is killed.
SERVERS = 24
KILLED = 6


def serve(wire: Wire) -> None:
    """Makes the disk, or takes it over from one that serves it or is dead; then hands it over."""
    how = wire.hear()
    target = File(how["file"])
    options: Any = how["options"]
    if how["device"] is None:
        disk = pyublk.Device(target, **options)
    elif how["served"]:
        disk = pyublk.Device.take_over(how["device"], target, ask=lambda: _ask(wire))
    else:
        disk = pyublk.Device.take_over(how["device"], target)
    disk.start()
    disk.keep()
    wire.say({"done": disk.id})
    while wire.hear() == "hand over":
        gone = disk.hand_over(lambda: _ask(wire))
        wire.say({"done": gone})
        if gone:
            return


def _ask(wire: Wire) -> bool:
    """Tells that this server is so far, and waits until the other one is."""
    wire.say({"done": "so far"})
    return wire.hear() == "go on"


def hand_overs(count: int, seed: int, report: Report, tell: Callable[[str], Any]) -> None:
    """`count` of them, of disks with SERVERS servers each. Raises AssertionError when wrong."""
    number = 0
    with Nursery("handovers") as nursery:
        while report.events["hand-over"] < count:
            queues = QUEUES[number % len(QUEUES)]
            path = PATHS[number // len(QUEUES) % len(PATHS)]
            tell(f"disk {number}, {queues} queues, {path}")
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, ExitStack() as stack:
                handed = _Handed(nursery, Path(folder, "bytes"), stack, report)
                handed.live(seed + number, queues, path)
            report.lives[f"with {queues} queues"] += 1
            number += 1
            tell(str(report))


class _Handed:
    """A disk that goes from server to server."""

    def __init__(self, nursery: Nursery, file: Path, stack: ExitStack, report: Report) -> None:
        self._nursery, self._file, self._stack, self._report = nursery, file, stack, report
        self._device: int | None = None
        file.write_bytes(bytes(BLOCKS * BLOCK))

    def live(self, seed: int, queues: int, path: str) -> None:
        dice = random.Random(seed)
        history = History()
        server = self._begun(queues=queues, recovery="resend", path=path)
        device = self._device = server.outcome()
        controller = self._stack.enter_context(pyublk.Controller(deadline=PATIENCE))
        self._stack.callback(controller.delete, device)
        node = f"/dev/ublkb{device}"
        spans = [range(BLOCKS)] * CLIENTS
        with Clients(node, history, spans, seed=seed) as clients:
            for number in range(1, SERVERS):
                clients.goes_on(dice.choice([1, 3, 10]))
                clients.longest = 0.0
                if number % KILLED == 0:
                    history.note("a kill")
                    with history.resending():
                        server.kill()
                        server = self._begun()
                        server.outcome()
                        clients.goes_on(2)
                    self._report.pauses["killed, and taken over"].append(clients.longest)
                else:
                    history.note("a hand-over begins")
                    server = self._handed_over(server)
                    history.note("it is over")
                    clients.goes_on(2)
                    self._report.pauses["handed over"].append(clients.longest)
                    self._report.events["hand-over"] += 1
        self._report.operations += clients.done
        server.kill()
        content = self._file.read_bytes()
        called = history.reading()
        for number in range(BLOCKS):
            history.found(called, number, values_in(content[number * BLOCK :][:BLOCK]))
        history.check()
        self._report.checked += history.checked

    def _begun(self, *, served: bool = False, **options: Any) -> Child:
        server = self._stack.enter_context(self._nursery.start("handovers", "serve"))
        server.begin(
            {"file": str(self._file), "device": self._device, "served": served, "options": options}
        )
        return server

    def _handed_over(self, old: Child) -> Child:
        new = self._begun(served=True)
        assert new.outcome() == "so far"
        assert old.ask("hand over") == "so far"
        assert new.ask("go on") == self._device
        assert old.ask("go on") is True
        old.ended()
        until(lambda: not os.path.exists(f"/proc/{old.pid}"), what="the server before is gone")
        return new
