# SPDX-License-Identifier: MIT
"""The server that has a disk, as its next server sees it."""

from contextlib import suppress

from pyublk import errors
from pyublk.service.channel import ChannelError, Client
from pyublk.service.records import Record, socket_place

#: Seconds for it to greet: nobody waits for the disk yet, and it may be very busy.
_GREETING = 60.0

#: Seconds for a process that has closed its channel to be gone.
_ENDING = 10.0


class Predecessor:
    """Hands its disk over by its channel (`service.requests.hand_over`), and takes it back if this
    process ends, or the connection, before `dismiss`."""

    def __init__(self, device: int) -> None:
        record = Record.load(device)
        if record is None:
            raise errors.DeviceLost(f"/dev/ublkb{device} has no record: its server cannot be asked")
        self._record = record
        self._client: Client | None = None

    def ask(self) -> None:
        """Returns when it does not serve the disk any more, because it has handed it over, or has
        died meanwhile. Raises what kept it from that."""
        place = socket_place(self._record.id)
        process = self._record.server.open()
        if process is None:
            return
        with process:
            self._client = client = Client(place, timeout=_GREETING)
            if client.server_pid != self._record.server.pid:
                raise errors.DeviceBusy(
                    f"{self._record.path} got another server meanwhile, process {client.server_pid}"
                )
            if "hand_over" not in client.greeting["capabilities"]:
                raise ChannelError(
                    f"the server of {self._record.path} is of pyublk {client.greeting['pyublk']}, "
                    "which cannot hand over a disk: stop the disk and add it again"
                )
            try:
                client.ask("hand_over", timeout=None)
            except ChannelError:
                if not process.wait(_ENDING):
                    raise

    def dismiss(self) -> None:
        """Tells it that this process has the disk. Not being told so, it sees that."""
        if self._client is not None:
            with suppress(ChannelError, OSError), self._client:
                self._client.ask("held")
