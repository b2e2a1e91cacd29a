"""What can go wrong with a virtual machine, by where the cause lies."""


class VMError(Exception):
    """The machine could not be prepared, started, or kept running. The message is one sentence."""


class WrongUsage(VMError):
    """An argument is none that a machine can have. Nothing was begun."""


class MissingProgram(VMError):
    """A program the machine needs is not installed; the message names its package."""


class KernelUnavailable(VMError):
    """The named kernel is neither cached nor to be had, or holds no ublk driver."""


class NoSuchName(WrongUsage, KernelUnavailable):
    """No kernel can have that name."""


class GuestFailed(VMError):
    """The guest panicked, hung, or stopped without giving an exit code.

    Attributes:
        console: what the guest's kernel wrote to its console.
    """

    def __init__(self, message: str, console: str) -> None:
        super().__init__(message)
        self.console = console


class BootFailed(GuestFailed):
    """The guest did not come as far as the command."""


class GuestTimeout(GuestFailed):
    """The command ran longer than the caller allowed; the machine was ended."""


class Interrupted(VMError):
    """The machine was ended by a signal sent to this process.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"the machine was ended by signal {signal}")
        self.signal = signal
