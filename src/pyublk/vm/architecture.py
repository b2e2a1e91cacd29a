"""The few names that differ between the processor architectures."""

import platform
from dataclasses import dataclass

from pyublk.vm.errors import VMError


@dataclass(frozen=True)
class Architecture:
    """How Debian, QEMU and the kernel call one processor architecture.

    Attributes:
        debian: Debian's name, as in `linux-image-6.12.1-amd64`.
        qemu: the emulator's program.
        package: the Debian package of that program.
        machine: argument of QEMU's `-machine`.
        console: the kernel's name of the first serial port.
    """

    debian: str
    qemu: str
    package: str
    machine: str
    console: str


_KNOWN = {
    "x86_64": Architecture("amd64", "qemu-system-x86_64", "qemu-system-x86", "q35", "ttyS0"),
    "aarch64": Architecture("arm64", "qemu-system-aarch64", "qemu-system-arm", "virt", "ttyAMA0"),
}


def native() -> Architecture:
    """Return this machine's architecture.

    Raises:
        VMError: the architecture is none of x86-64 and arm64.
    """
    name = platform.machine()
    try:
        return _KNOWN[name]
    except KeyError:
        raise VMError(
            f"the virtual machine knows {' and '.join(_KNOWN)}, and this processor is {name}"
        ) from None
