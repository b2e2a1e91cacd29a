# SPDX-License-Identifier: MIT
"""What keeps this machine from serving disks, or could go wrong with them: one function a check."""

import gzip
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pyublk._native import Ring
from pyublk.control import CONTROL_NODE, Controller, DeviceInfo
from pyublk.defects import defects_of
from pyublk.errors import OWN_DEV, kind_of_dev
from pyublk.files import trusted_owners
from pyublk.service import channel, logs, records
from pyublk.service.stopping import delete, has_server, may_be_starting
from pyublk.uapi import DeviceStatus

_CHAR_DEVICES = Path("/sys/class/ublk-char")
_ANOTHER_KERNEL = "use a kernel with CONFIG_BLK_DEV_UBLK, or `pyublk vm`, which runs one"


class Status(StrEnum):
    """What a check means for disks: none trouble, possible trouble, no disks."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """A thing looked at: what was found, and what to do unless it is ok."""

    name: str
    status: Status
    finding: str
    remedy: str | None = None


def examine() -> Iterator[Check]:
    """Makes every check in turn; changes nothing."""
    release = os.uname().release
    driver = check_driver(release)
    yield driver
    yield check_control_node()
    yield check_io_uring()
    yield check_open_files()
    yield check_locked_memory()
    yield check_nodes()
    if driver.remedy != _ANOTHER_KERNEL:  # else there is no driver that could have defects
        yield from check_kernel(release, in_pid_namespace=_in_pid_namespace())
    if os.access(CONTROL_NODE, os.R_OK | os.W_OK):
        yield from check_devices()
    yield from check_records()


# ---- the driver ----


def check_driver(release: str, root: Path = Path("/")) -> Check:
    """Whether the running kernel, `release`, has the ublk driver; `root` is where to look."""
    name = "driver"
    if (root / "sys/module/ublk_drv").exists():
        return Check(name, Status.OK, "ublk_drv is loaded")
    modules = root / "lib/modules" / release
    if any(modules.rglob("ublk_drv.ko*")):
        return Check(
            name,
            Status.FAILED,
            "ublk_drv is there, but not loaded",
            "modprobe ublk_drv; to load it at every boot: echo ublk_drv > "
            "/etc/modules-load.d/ublk.conf",
        )
    built = _kernel_option(release, root)
    if built == "y":
        return Check(name, Status.OK, "ublk_drv is part of the kernel")
    if built == "m":
        return Check(
            name,
            Status.FAILED,
            f"kernel {release} has ublk as a module, which is not in {modules}",
            f"install the package with the modules of kernel {release}",
        )
    finding = "is built without ublk" if built == "n" else "seems to have no ublk_drv"
    return Check(name, Status.FAILED, f"kernel {release} {finding}", _ANOTHER_KERNEL)


def _kernel_option(release: str, root: Path) -> str | None:
    """CONFIG_BLK_DEV_UBLK of the running kernel: "y", "m", "n", or None where nothing tells."""
    texts: list[Callable[[], str]] = [
        lambda: gzip.decompress((root / "proc/config.gz").read_bytes()).decode(),
        lambda: (root / "boot" / f"config-{release}").read_text(),
        lambda: (root / "lib/modules" / release / "config").read_text(),
    ]
    for text in texts:
        try:
            found = re.search(r"^CONFIG_BLK_DEV_UBLK=(.)", text(), re.MULTILINE)
        except OSError:
            continue
        return found[1] if found else "n"
    return None


def check_control_node() -> Check:
    """Whether the control node can be opened and answers."""
    try:
        with Controller(deadline=10) as controller:
            mask = controller.features().mask
            told = "unknown (before Linux 6.5)" if mask is None else f"{mask:#x}"
            return Check("control node", Status.OK, f"it answers; the driver's features: {told}")
    except OSError as error:
        return _failure("control node", error)


def check_io_uring() -> Check:
    """Whether a ring can be had, as the queues want it."""
    try:
        with Ring(8) as ring:
            ring.nop()
            ring.submit(wait=1)
            return Check("io_uring", Status.OK, "a ring could be opened and used")
    except OSError as error:
        return _failure("io_uring", error)


def _failure(name: str, error: OSError) -> Check:
    remedies = [
        note.removeprefix("What to do: ")
        for note in getattr(error, "__notes__", ())
        if note.startswith("What to do: ")
    ]
    return Check(name, Status.FAILED, error.strerror or str(error), " ".join(remedies) or None)


# ---- limits ----


def check_open_files() -> Check:
    """RLIMIT_NOFILE: a queue takes two or three descriptors, a target takes its own."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= 256:
        return Check("open files", Status.OK, f"limit {_limit(limit)}")
    return Check(
        "open files", Status.WARNING, f"limit {limit}: few queues fit in it", "ulimit -n 1024"
    )


def check_locked_memory() -> Check:
    """RLIMIT_MEMLOCK, which only counts for registered memory and without CAP_IPC_LOCK."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= 8 << 20 or os.geteuid() == 0:
        return Check("locked memory", Status.OK, f"limit {_limit(limit)}")
    return Check(
        "locked memory",
        Status.WARNING,
        f"limit {limit} bytes: registering rings and buffers may be refused",
        "ulimit -l 65536, or LimitMEMLOCK= of the service",
    )


def _limit(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else str(value)


def check_nodes(root: Path = Path("/")) -> Check:
    """Whether device nodes appear in /dev by themselves."""
    kind = kind_of_dev(root / "proc")
    made = [*root.glob("sys/class/ublk-char/ublkc*"), *root.glob("sys/class/block/ublkb*")]
    if missing := sorted(one.name for one in made if not (root / "dev" / one.name).exists()):
        return Check(
            "device nodes",
            Status.FAILED,
            f"/dev is {kind}, and lacks nodes of devices that the kernel has made: "
            f"{', '.join(missing)}",
            OWN_DEV,
        )
    if kind == "devtmpfs":
        return Check("device nodes", Status.OK, "/dev is a devtmpfs")
    if (root / "run/udev/control").exists():
        return Check("device nodes", Status.OK, "udev makes them")
    return Check(
        "device nodes",
        Status.WARNING,
        "/dev is no devtmpfs and no udev runs: nodes of new disks may not appear",
        "mount -t devtmpfs devtmpfs /dev; for a container, pass the host's (`--volume /dev:/dev`)",
    )


# ---- the kernel ----


def check_kernel(release: str, *, in_pid_namespace: bool) -> Iterator[Check]:
    """Warns of what is known of kernels like `release`; the name is all that is looked at."""
    sound = True
    for defect in defects_of(release, in_pid_namespace=in_pid_namespace):
        sound = False
        finding = f"{release}: {defect.what} [{defect.source}]"
        yield Check("kernel", Status.WARNING, finding, defect.remedy)
    if sound:
        yield Check("kernel", Status.OK, release)


def _in_pid_namespace() -> bool:
    # The first namespace has this inode on every machine: include/linux/proc_ns.h.
    return os.readlink("/proc/self/ns/pid") != "pid:[4026531836]"


# ---- what was left behind ----


def orphans(controller: Controller) -> list[DeviceInfo]:
    """Our devices that have no server and never will: both it and its helper were killed."""
    return [device for device in _settled_devices(controller) if _is_orphan(device)]


def _settled_devices(controller: Controller) -> list[DeviceInfo]:
    """The devices, once none of them that looks like an orphan may just be starting."""
    found = controller.devices()
    while any(_is_orphan(device) and may_be_starting(device) for device in found):
        time.sleep(0.05)
        found = controller.devices()
    return found


def _is_orphan(device: DeviceInfo) -> bool:
    return device.ours and device.status is DeviceStatus.DEAD and not has_server(device)


def check_devices() -> Iterator[Check]:
    """Looks for orphaned devices, and for ours that wait for a server."""
    try:
        with Controller(deadline=10) as controller:
            devices = _settled_devices(controller)
    except OSError as error:
        yield _failure("devices", error)
        return
    troubled = False
    for device in devices:
        if _is_orphan(device):
            troubled = True
            yield Check(
                "devices",
                Status.WARNING,
                f"device {device.id} is an orphan: its server is gone",
                "pyublk doctor --repair",
            )
        elif device.status.awaits_server:
            troubled = True
            yield Check(
                "devices",
                Status.WARNING,
                f"device {device.id} is {device.status.name}: it waits for a new server",
                f"{_another_server(device)}, or give it up: pyublk del --force {device.id}",
            )
    if not troubled:
        yield Check("devices", Status.OK, f"{len(devices)} devices, none orphaned")


def _another_server(device: DeviceInfo) -> str:
    if device.ours:
        return f"pyublk recover {device.id}"
    return f"start its server again, or pyublk recover {device.id} TARGET"


def stale_records() -> list[Path]:
    """Records whose server is gone, with their logs and what their targets said last. What cannot
    be read may be the record of a server that is there, and is no stale one; but a file that is
    none at all, where there is no such device, is."""
    found = []
    for number in records.recorded_ids():
        try:
            record = records.Record.load(number)
        except records.GarbledRecord:
            if _CHAR_DEVICES.joinpath(f"ublkc{number}").exists():
                continue
        except (ValueError, OSError):
            continue
        else:
            if record is not None and record.may_be_recovered:
                continue
            server = record.server.open() if record is not None else None
            if server is not None:
                with server:
                    continue
            if record is not None and _waits_for_server(record):
                continue
        places = (
            records.place(number),
            records.log_place(number),
            records.socket_place(number),
            records.memory_place(number),
        )
        found += [place for place in places if place.exists() or place.is_symlink()]
    sockets = [
        place
        for place in sorted(records.run_directory().glob("*.sock"))
        if place not in found and channel.is_abandoned(place)
    ]
    return [*found, *(log for log in logs.abandoned() if log not in found), *sockets]


def _waits_for_server(record: records.Record) -> bool:
    """Whether its disk outlived the server: the record tells what the next one is to serve."""
    if not _CHAR_DEVICES.joinpath(f"ublkc{record.id}").exists():
        return False
    try:
        with Controller(deadline=10) as controller:
            device = controller.info(record.id)
    except OSError:
        return False
    return device.cookie == record.cookie and device.status is not DeviceStatus.DEAD


def check_records() -> Iterator[Check]:
    """Looks for records of servers that are gone, and for what is no record of ours."""
    directory = records.run_directory()
    stale = stale_records()
    troubles = list(_troubles_with_records(directory, stale))
    yield from troubles
    if not stale and not troubles:
        yield Check("records", Status.OK, f"{directory}: none left behind")
    for path in stale:
        yield Check(
            "records",
            Status.WARNING,
            f"{path} was left behind by a server that was killed",
            "pyublk doctor --repair",
        )


def _troubles_with_records(directory: Path, stale: list[Path]) -> Iterator[Check]:
    if directory.exists():
        found = directory.stat()
        if found.st_uid not in trusted_owners() or found.st_mode & 0o022:
            yield Check(
                "records",
                Status.WARNING,
                f"{directory}, with the records and logs of servers, can be changed by other users",
                f"chown root {directory}; chmod 755 {directory}; or another PYUBLK_RUN_DIR",
            )
    unreadable = False
    for number in records.recorded_ids():
        try:
            records.Record.load(number)
        except PermissionError:
            unreadable = True
        except (ValueError, OSError):
            if records.place(number) not in stale:
                yield Check(
                    "records",
                    Status.WARNING,
                    records.record_trouble(number) or "",
                    f"look at it, and remove it when there is no /dev/ublkb{number}",
                )
    if unreadable:
        yield Check(
            "records",
            Status.WARNING,
            f"the records in {directory} are for their owner's eyes only",
            "run pyublk doctor as root, or as that owner",
        )


def repair() -> Iterator[str]:
    """Removes stale records and deletes orphaned devices; tells of each in a sentence.

    Raises OSError when the driver does not let it.
    """
    for path in stale_records():
        path.unlink(missing_ok=True)
        yield f"{path} was removed"
    if os.path.exists(CONTROL_NODE):
        with Controller() as controller:
            for device in orphans(controller):
                delete(controller, device)
                yield f"device {device.id} was deleted"
