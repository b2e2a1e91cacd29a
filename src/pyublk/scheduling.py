# SPDX-License-Identifier: MIT
"""When and where things run: a disk's requests in the kernel, and the threads that serve them.

Two of the kernel's choices do not suit a disk whose requests a process serves. Together they cost a
small request a quarter more (docs/tuning.md has the figures); to undo one alone changes little.

- A disk of one queue gets the I/O scheduler mq-deadline. It sorts for heads that move, and a worker
  of the kernel's hands its requests over. With "none", the client's own system call does.
- A server is woken by every request, and a thread that is woken may interrupt the one that runs:
  the client, about to send its next request. So requests would be served one by one. A thread under
  SCHED_BATCH does not interrupt: requests gather until the client waits, or another CPU is free.
"""

import errno
import logging
import os
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pyublk._native import WriteInChild, name_thread, write_in_child
from pyublk.arguments import whole

log = logging.getLogger("pyublk.scheduling")

#: What the kernel keeps of a thread's name (TASK_COMM_LEN, without the 0 at its end).
_NAME_BYTES = 15

Affinity = Literal["auto"] | Sequence[Iterable[int]] | None


class NamedThread(threading.Thread):
    """A thread whose name the kernel knows, too, for `ps -L`, tracing and `pyublk info`."""

    def run(self) -> None:
        name_thread(self.name)
        super().run()


def queue_thread_name(device: int, queues: Collection[int]) -> str:
    """What a thread that serves these queues of a device is called: ublk3-q0, or ublk3-q0-2.

    The kernel keeps 15 bytes of a name: one that would be cut into another's names no queue.
    """
    first, last = min(queues), max(queues)
    name = f"ublk{device}-q{first}" if first == last else f"ublk{device}-q{first}-{last}"
    return name if len(name) <= _NAME_BYTES else f"ublk{device}-serve"


def queue_threads(pid: int, device: int, proc: Path = Path("/proc")) -> dict[int, list[int]]:
    """The threads of a process that serve each queue of a device, by their names.

    A thread that was started by one of them and has no name of its own has theirs.
    """
    found: dict[int, list[int]] = {}
    for task in sorted((proc / f"{pid}/task").glob("[0-9]*"), key=lambda task: int(task.name)):
        try:
            match = re.fullmatch(
                rf"ublk{device}-q(\d+)(?:-(\d+))?", (task / "comm").read_text().strip()
            )
        except OSError:  # it has ended, or is not ours to look at
            continue
        if match is not None:
            for queue in range(int(match[1]), int(match[2] or match[1]) + 1):
                found.setdefault(queue, []).append(int(task.name))
    return found


def checked_affinity(
    affinity: Affinity, queues: int | None
) -> Literal["auto"] | list[frozenset[int]] | None:
    """A set of CPUs for each queue (None: however many there are). Raises ValueError when it is
    none of what `Device` takes."""
    if affinity is None or affinity == "auto":
        return affinity
    sized = not isinstance(affinity, str) and hasattr(affinity, "__len__")
    if not sized or queues not in (None, len(affinity)):
        each = "each queue" if queues is None else f"each of the {queues} queues"
        raise ValueError(f"affinity must be 'auto', None, or a set of CPUs for {each}")
    try:
        sets = [frozenset(whole("a CPU", cpu, least=0) for cpu in cpus) for cpus in affinity]
    except TypeError:
        raise ValueError(
            f"affinity must have a set of CPUs for each queue, not {affinity!r}"
        ) from None
    if frozenset() in sets:
        queue = sets.index(frozenset())
        raise ValueError(f"affinity must name at least one CPU for queue {queue}")
    return sets


def parse_affinity(text: str) -> list[list[int]]:
    """The CPUs of each queue, as the kernel writes CPUs, with colons between the queues: 0-3,8:4-7.

    Raises ValueError.
    """
    return [_parse_cpus(part) for part in text.split(":")]


def _parse_cpus(text: str) -> list[int]:
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{text!r} is not a list of CPUs such as 0-3,8")
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(cpus)


def keep_to(cpus: frozenset[int]) -> None:
    """Keeps the calling thread to these CPUs. Raises OSError that names them."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a queue's thread cannot be kept to CPUs {sorted(cpus)}: {error.strerror}; this "
            f"process may use {sorted(os.sched_getaffinity(0))}",
        ) from None


def never_interrupt() -> None:
    """From now on the calling thread does not interrupt others when it is woken (SCHED_BATCH).

    A policy that the process was given (chrt, a service manager) is left alone.
    """
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError as error:  # a container's filter
            log.info("a queue's thread stays under SCHED_OTHER: %s", error.strerror)


def _place(disk: str) -> Path:
    return Path("/sys/block") / os.path.basename(disk) / "queue/scheduler"


def io_scheduler(disk: str) -> str | None:
    """The I/O scheduler of a disk such as /dev/ublkb0; None where the kernel does not tell."""
    return _parsed(_place(disk))[0]


def _parsed(place: Path) -> tuple[str | None, list[str]]:
    """The one in use, which stands in brackets, and all that there are."""
    try:
        words = place.read_text().split()
    except OSError:
        return None, []
    used = [word[1:-1] for word in words if word.startswith("[")]
    return (used[0] if used else None), [word.strip("[]") for word in words]


def choose_io_scheduler(disk: str, name: str, deadline: float) -> None:
    """Gives a disk the I/O scheduler of that name.

    Raises:
        ValueError: this kernel has none of that name.
        OSError: the kernel refuses, or `deadline` seconds are over.
    """
    place = _place(disk)
    current, offered = _parsed(place)
    if name == current:
        return
    # One that is not offered may be in a module, which the kernel loads when its name is written.
    result = write_in_child(str(place), name, deadline=deadline) if name.strip() else -errno.EINVAL
    if result == 0:
        return
    if result == -errno.EINVAL:
        raise ValueError(f"io_scheduler must be one of {', '.join(offered)}, not {name!r}")
    number = errno.ETIMEDOUT if result is None else -result
    raise OSError(
        number, f"{disk} cannot have the I/O scheduler {name}: {_reason(result)}", str(place)
    )


def _reason(result: int | None) -> str:
    return "requests are in flight" if result is None else os.strerror(-result)


#: Seconds that a disk's start waits for a switch that nobody asked for by name: the kernel waits
#: for all requests in flight first, of which the partition scan may have some.
PATIENCE = 1.0


class SchedulerRemoval:
    """Takes a disk's I/O scheduler away, beside whatever else is done meanwhile.

    The kernel takes ten to fifty milliseconds for it, most of that in grace periods of RCU. It
    waits for the requests in flight, and holds the others back.
    """

    def __init__(self, disk: str) -> None:
        place = _place(disk)
        self._disk = disk
        self._current, _ = _parsed(place)
        self._write = None if self._current == "none" else WriteInChild(str(place), "none")

    def finish(self, deadline: float = 0.0) -> None:
        """Waits for its end, at most so many seconds, and calls it off after them."""
        if self._write is None:
            return
        result = self._write.finish(deadline=deadline)
        if result != 0:
            log.info(
                "%s kept the I/O scheduler %s: %s",
                self._disk,
                self._current or "of the kernel",
                _reason(result),
            )
