"""Which way of running a guest works on this machine.

/dev/kvm may be there and still not run a stock kernel: under some hypervisors the emulator
stops at its first register, under others the guest never gets anywhere. So a tiny guest is
tried once per boot of the host, and the answer is kept.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyublk.vm import programs
from pyublk.vm.architecture import Architecture, native
from pyublk.vm.initramfs import Archive
from pyublk.vm.kernels import Kernel, cache_directory

# Counting is `icount`: one instruction is one nanosecond of the guest's time.
_OPTIONS = {
    "kvm": ("-accel", "kvm"),
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512"),
    "count": ("-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"),
}

_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# KVM that needs longer for the little that is tried is no better than emulation.
_PATIENCE = 15
_ALIVE = "pyublk: alive"
_INIT = f"""#!/bin/busybox sh
echo "{_ALIVE}"
/bin/busybox poweroff -f
"""


def options(way: str, architecture: Architecture) -> list[str]:
    """Return the emulator's options for a way of running a guest.

    Args:
        way: `kvm`, `tcg` or `count`.
        architecture: of the guest.
    """
    return [*_OPTIONS[way], "-cpu", "host" if way == "kvm" else architecture.emulated]


def _answer_file() -> Path:
    return cache_directory() / "accelerator.json"


def remembered(boot: str, emulator: str) -> str | None:
    try:
        known = json.loads(_answer_file().read_text())
        if known["boot"] == boot and known["emulator"] == emulator:
            return str(known["accelerator"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def remember(boot: str, emulator: str, accelerator: str) -> None:
    file = _answer_file()
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(
        json.dumps({"boot": boot, "emulator": emulator, "accelerator": accelerator}) + "\n"
    )
    fresh.rename(file)


def boots(
    options: Sequence[str], kernel: Kernel, busybox: Path, architecture: Architecture
) -> bool:
    """Tell whether a guest gets as far as saying a word, in a few seconds.

    Args:
        options: the emulator's options that choose accelerator and processor.
        kernel: the kernel to try.
        busybox: the host's busybox.
        architecture: of the guest.
    """
    archive = Archive()
    archive.directory("dev")
    archive.device("dev/console", 5, 1)
    archive.program("bin/busybox", busybox)
    archive.file("init", _INIT.encode(), 0o755)
    with tempfile.NamedTemporaryFile(prefix="pyublk-vm-") as file:
        file.write(archive.finish())
        file.flush()
        command = [
            *(programs.find("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
            *(programs.find(architecture.qemu, architecture.package), *options),
            *("-machine", architecture.machine, "-smp", "2", "-m", "512M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
            *("-no-reboot", "-kernel", str(kernel.image), "-initrd", file.name),
            *("-append", f"console={architecture.console} quiet panic=-1"),
        ]
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PATIENCE,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return _ALIVE.encode() in result.stdout


def choose(kernel: Kernel, busybox: Path, architecture: Architecture) -> str:
    """Return `kvm` where it boots a kernel, else `tcg`.

    Args:
        kernel: the kernel to try.
        busybox: the host's busybox.
        architecture: of the guest.
    """
    if architecture != native() or not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "tcg"
    emulator = programs.find(architecture.qemu, architecture.package)
    boot = _BOOT_ID.read_text().strip()
    known = remembered(boot, emulator)
    if known is None:
        kvm = options("kvm", architecture)
        known = "kvm" if boots(kvm, kernel, busybox, architecture) else "tcg"
        remember(boot, emulator, known)
    return known
