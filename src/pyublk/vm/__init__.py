"""A disposable virtual machine with a ublk kernel, for machines whose kernel has none.

`Machine` boots a Debian kernel in QEMU and runs a command on the caller's own files; what the
command writes stays in the guest's memory. `find_kernel` fetches kernels through apt. This room
uses nothing else of pyublk but `launch`, and no native code of its own.
"""

from pyublk.vm.errors import (
    GuestFailed,
    GuestTimeout,
    Interrupted,
    KernelUnavailable,
    MissingProgram,
    VMError,
    WrongUsage,
)
from pyublk.vm.kernels import Kernel, find_kernel
from pyublk.vm.machine import Completed, Machine

__all__ = (
    "Completed",
    "GuestFailed",
    "GuestTimeout",
    "Interrupted",
    "Kernel",
    "KernelUnavailable",
    "Machine",
    "MissingProgram",
    "VMError",
    "WrongUsage",
    "find_kernel",
)
