"""The emulator's command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyublk.vm import accelerators, programs
from pyublk.vm.kernels import Kernel
from pyublk.vm.roots import Root

MIB = 1 << 20

# A panic or an oops ends the machine instead of leaving it half alive. Warnings are shown, news
# are not: the serial port is slow. The same addresses every time let measurements repeat. The
# processors' clock is the host's: a busy host must not make the kernel doubt it, since the kernel
# then changes code that other processors run, and an emulated one may stumble over that (int3).
_KERNEL_ARGUMENTS = (
    "panic=-1 oops=panic loglevel=5 mitigations=off nokaslr audit=0 apparmor=0 8250.nr_uarts=1 "
    "tsc=reliable"
)


@dataclass(frozen=True)
class Channels:
    """Descriptors and files through which the emulator and this process talk.

    Attributes:
        ports: socket descriptor by the number of its port in the guest.
        console: file that receives what the kernel writes to its console.
    """

    ports: Mapping[int, int]
    console: Path


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


def _shared(directory: Path, name: str, *, writable: bool) -> list[str]:
    # multidevs: inode numbers of several host file systems are kept apart.
    readonly = "" if writable else ",readonly=on"
    return [
        "-fsdev",
        f"local,id={name},path={_escape(directory)},security_model=none,multidevs=remap{readonly}",
        "-device",
        f"virtio-9p-pci,fsdev={name},mount_tag={name}",
    ]


def _channel_options(channels: Channels) -> list[str]:
    options = [
        *("-chardev", f"file,id=console,path={_escape(channels.console)}"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-pci,id=ports"),
    ]
    for number, descriptor in channels.ports.items():
        options += [
            *("-chardev", f"socket,id=port{number},fd={descriptor}"),
            *("-device", f"virtserialport,bus=ports.0,nr={number},chardev=port{number}"),
        ]
    return options


def command(
    root: Root,
    accelerator: str,
    kernel: Kernel,
    initramfs: Path,
    channels: Channels,
    *,
    cpus: int,
    memory: int,
    outputs: Sequence[Path],
) -> list[str]:
    """Return the emulator's command line.

    Args:
        root: whose files the guest has.
        accelerator: `kvm`, `tcg`, or `count`.
        kernel: the kernel to be booted.
        initramfs: file with the guest's initial file system.
        channels: how the guest talks to this process.
        cpus: number of processors.
        memory: bytes of memory, used in whole MiB.
        outputs: host directories the guest may write to.

    Raises:
        MissingProgram: the emulator, or setpriv, is not installed.
    """
    architecture = root.architecture
    emulator = programs.find(architecture.qemu, architecture.package)
    arguments = f"console={architecture.console} {_KERNEL_ARGUMENTS}"
    shares = _shared(root.directory, "host", writable=False)
    for number, directory in enumerate(outputs):
        shares += _shared(directory, f"output{number}", writable=True)
    return [
        # The emulator dies with this process, however that dies.
        *(programs.find("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
        *(emulator, "-machine", architecture.machine),
        *accelerators.options(accelerator, architecture),
        *("-smp", str(cpus), "-m", f"{memory // MIB}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", arguments),
        *_channel_options(channels),
        *shares,
    ]
