"""The emulator's process, its channels to this one, and its end."""

import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyublk.vm import qemu
from pyublk.vm.errors import GuestFailed

CONTROL, INPUT, OUTPUT, ERRORS = range(1, 5)
"""Numbers of the guest's ports."""


class Emulator:
    """Files and sockets of one machine; removed and closed when the stack is.

    Args:
        stack: owner of what is made here.

    Attributes:
        ports: this process's end of every port, by its number.
        console: file of what the guest's kernel writes to its console.
        initramfs: where to put the guest's initial file system.
    """

    def __init__(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyublk-vm-")))
        self.console = directory / "console"
        self.console.touch()
        self.initramfs = directory / "initramfs"
        self.ports: dict[int, socket.socket] = {}
        self._theirs: dict[int, socket.socket] = {}
        for number in (CONTROL, INPUT, OUTPUT, ERRORS):
            ours, theirs = socket.socketpair()
            self.ports[number] = stack.enter_context(ours)
            self._theirs[number] = stack.enter_context(theirs)

    def channels(self) -> qemu.Channels:
        """Return what the emulator's command line says about the channels."""
        descriptors = {number: end.fileno() for number, end in self._theirs.items()}
        return qemu.Channels(descriptors, self.console)

    @contextmanager
    def running(self, command: Sequence[str]) -> Iterator[None]:
        """Run the emulator as long as the context lasts, and kill it then in any case.

        Raises:
            GuestFailed: as raised inside, with what the emulator complained about added.
        """
        with (
            tempfile.TemporaryFile() as complaints,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=[end.fileno() for end in self._theirs.values()],
                # A Ctrl-C is for the command in the guest, not for the emulator.
                start_new_session=True,
            ) as process,
        ):
            try:
                # The emulator's copies are the only ones now: when it dies, ours tell.
                for end in self._theirs.values():
                    end.close()
                yield
            except GuestFailed as error:
                process.kill()
                process.wait()
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").splitlines()
                serious = [line for line in said if line.strip() and "warning:" not in line]
                if serious:
                    message = f"{error}; the emulator said: {serious[-1]}"
                    raise type(error)(message, error.console) from error
                raise
            finally:
                process.kill()
