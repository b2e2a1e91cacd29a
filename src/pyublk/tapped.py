# SPDX-License-Identifier: MIT
"""What a disk's queues do beside serving its target, whatever kind that is: measure, and record."""

import os
import threading

from pyublk.errors import DeviceBusy, DeviceClosed
from pyublk.files import about
from pyublk.lifecycle import DeviceState, Lifecycle
from pyublk.stats import DeviceStats
from pyublk.tracing import DEFAULT_MEGABYTES, Trace


class Tapped:
    """A `Device`, as far as its queues are concerned."""

    _life: Lifecycle
    _state: DeviceState
    _swap_lock: threading.Lock

    def _check_process(self) -> None:
        raise NotImplementedError

    def stats(self) -> DeviceStats:
        """The counters and latencies since the start; after the stop, their last values."""
        self._check_process()
        return self._life.stats()

    def trace(self, path: str | os.PathLike[str], *, megabytes: int = DEFAULT_MEGABYTES) -> Trace:
        """Records each request from now on, while the disk is used; `with` ends it, or `stop`.

        The records are blktrace's: one when a request arrives, one when it goes to the target, and
        one when it is answered, in the files `PATH.blktrace.0` and so on, one for each queue (or
        each thread of `threads`). They are kept in memory of so many `megabytes`, all queues
        together, and written at the end; when it is full, the others are only counted
        (`TraceSummary.lost`). The end of the disk ends it, too; a `swap` does not.

        Raises OSError when the files cannot be made, MemoryError, DeviceBusy when there is a trace
        already, and DeviceClosed unless the disk is live.
        """
        self._check_process()
        if self._state is not DeviceState.LIVE:
            raise DeviceClosed(f"the device is {self._state}, only a live one is traced")
        life = self._life
        # Of the node: the parameters that a server has set do not have the numbers.
        major, minor = about(life.disk().info.path).special.split(":")
        number = int(major) << 20 | int(minor)
        with self._swap_lock:  # the queues stay
            if life.trace is not None and not life.trace.is_over:
                disk, first = life.disk().info.path, life.trace.files[0]
                raise DeviceBusy(f"{disk} is traced already, to {first}")
            life.trace = Trace(path, life.session.queues(), megabytes=megabytes, device=number)
            return life.trace
