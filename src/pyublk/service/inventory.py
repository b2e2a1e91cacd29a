# SPDX-License-Identifier: MIT
"""The disks of this machine, each with what the kernel, the run directory and its users tell."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyublk.control import Controller, DeviceInfo
from pyublk.openers import command_name
from pyublk.params import Params
from pyublk.scheduling import io_scheduler, queue_threads
from pyublk.service.channel import ChannelError, ask
from pyublk.service.records import Record, memory_place, record_trouble
from pyublk.service.sysfs import Sysfs
from pyublk.service.usage import Use, uses
from pyublk.uapi import DeviceStatus

#: Seconds for a server to tell of its disk.
PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class DiskCounters:
    """What a disk's clients did since it was started, by the kernel's own counters."""

    reads: int
    writes: int
    discards: int
    flushes: int
    bytes_read: int
    bytes_written: int
    bytes_discarded: int


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A hardware queue: the CPUs whose requests it gets, and the threads that serve it, where they
    can be told by their names."""

    id: int
    cpus: tuple[int, ...]
    threads: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEntry:
    """One ublk device.

    `record` is there when `pyublk add` made it, and `record_trouble` says why what lies in its
    place is not believed; `params` None if none were set; `size` in bytes,
    0 while there is no block device; `io_scheduler` is the kernel's, None without a block device;
    `queues` are those of a disk that is live;
    `server_name` None when there is no server; `told` is what a server of `pyublk add` tells by its
    channel (the request `status`), and `silence` why it does not. `shared_memory` is where clients
    find theirs.
    """

    device: DeviceInfo
    params: Params | None
    record: Record | None
    record_trouble: str | None
    size: int
    uses: tuple[Use, ...]
    served: DiskCounters | None
    io_scheduler: str | None
    queues: tuple[QueueEntry, ...]
    server_name: str | None
    shared_memory: str | None
    told: dict[str, Any] | None
    silence: str | None

    @property
    def status(self) -> dict[str, Any] | None:
        """What the target says of itself."""
        return self.told and self.told.get("target_status")

    @property
    def failed(self) -> int | None:
        """How many requests the server has failed."""
        return None if self.told is None else int(self.told.get("failed_requests", 0))


def disk(
    controller: Controller | Sysfs, device: DeviceInfo, *, ask_server: bool = True
) -> DiskEntry:
    """All about one device. Raises OSError ENODEV when it was deleted meanwhile."""
    try:
        params = controller.get_params(device.id)
    except ValueError:  # none were set
        params = None
    name = f"ublkb{device.id}"
    record = Record.of(device)
    told, silence = _ask(record) if ask_server else (None, None)
    live = device.status is not DeviceStatus.DEAD
    return DiskEntry(
        device=device,
        params=params,
        record=record,
        record_trouble=record_trouble(device.id),
        size=size_of(name) if live else 0,
        uses=tuple(uses(name)),
        served=counters(name) if live else None,
        io_scheduler=io_scheduler(name) if live else None,
        queues=tuple(_queues(name, device)) if live else (),
        server_name=command_name(device.server_pid) if device.server_pid is not None else None,
        shared_memory=_shared_memory(device.id) if record is not None else None,
        told=told,
        silence=silence,
    )


def _ask(record: Record | None) -> tuple[dict[str, Any] | None, str | None]:
    if record is None:
        return None, None
    try:
        return ask(record, "status", timeout=PATIENCE), None
    except (ChannelError, OSError) as error:
        return None, str(error)
    except Exception as error:  # what the target's own `status` raised
        return None, f"{type(error).__name__}: {error}"


def _shared_memory(device: int) -> str | None:
    place = memory_place(device)
    return str(place) if place.exists() else None


def _queues(name: str, device: DeviceInfo, sys: Path = Path("/sys")) -> Iterator[QueueEntry]:
    threads = {}
    if device.server_pid is not None:
        threads = queue_threads(device.server_pid, device.id)
    places = (sys / "class/block" / name / "mq").glob("[0-9]*")
    for number in sorted(int(place.name) for place in places):
        try:
            cpus = (sys / "class/block" / name / f"mq/{number}/cpu_list").read_text()
        except OSError:
            continue
        yield QueueEntry(
            number,
            tuple(int(cpu) for cpu in cpus.split(",") if cpu.strip()),
            tuple(threads.get(number, ())),
        )


def size_of(name: str, sys: Path = Path("/sys")) -> int:
    """Bytes of a block device by the kernel's name; 0 if there is none."""
    try:
        return int((sys / "class/block" / name / "size").read_text()) * 512
    except FileNotFoundError:
        return 0


def counters(name: str, sys: Path = Path("/sys")) -> DiskCounters | None:
    """Those of a block device by the kernel's name; None if there is none."""
    # Documentation/block/stat.rst: counts of requests and of 512-byte sectors.
    try:
        fields = [int(field) for field in (sys / "class/block" / name / "stat").read_text().split()]
    except FileNotFoundError:
        return None
    return DiskCounters(
        reads=fields[0],
        writes=fields[4],
        discards=fields[11],
        flushes=fields[15],
        bytes_read=fields[2] * 512,
        bytes_written=fields[6] * 512,
        bytes_discarded=fields[13] * 512,
    )
