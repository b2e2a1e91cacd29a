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
        emulated: argument of QEMU's `-cpu` where the processor is emulated.
        console: the kernel's name of the first serial port.
    """

    debian: str
    qemu: str
    package: str
    machine: str
    emulated: str
    console: str


KNOWN = {
    "x86_64": Architecture(
        debian="amd64",
        qemu="qemu-system-x86_64",
        package="qemu-system-x86",
        machine="q35",
        # Emulated processors do not have the fast string instructions: with them every byte
        # copied is an instruction.
        emulated="max,-erms,-fsrm",
        console="ttyS0",
    ),
    "aarch64": Architecture(
        debian="arm64",
        qemu="qemu-system-aarch64",
        package="qemu-system-arm",
        # The default has at most 8 processors, and does not start under every host's KVM.
        machine="virt,gic-version=max",
        # Of the processors with atomic instructions, one that signs no pointers: `max` spends
        # more time on that than on the rest.
        emulated="neoverse-n1",
        console="ttyAMA0",
    ),
}


def native() -> Architecture:
    """Return this machine's architecture.

    Raises:
        VMError: the architecture is none of x86-64 and arm64.
    """
    name = platform.machine()
    try:
        return KNOWN[name]
    except KeyError:
        raise VMError(
            f"the virtual machine knows {' and '.join(KNOWN)}, and this processor is {name}"
        ) from None
