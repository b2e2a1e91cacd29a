"""An image of a Debian that boots: an ext4 file system, made from packages of apt's mirror."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pyublk.vm.apt import machine_mirror

PACKAGES = "systemd,systemd-sysv,udev,kmod"
SIZE = "512M"
#: A line for each boot.
BOOTS = "var/lib/boots"
FILES = {
    "etc/hostname": "booted\n",
    # Emulated machines keep no time.
    "etc/systemd/system.conf.d/patient.conf": """\
[Manager]
DefaultTimeoutStartSec=600
DefaultTimeoutStopSec=600
DefaultDeviceTimeoutSec=600
""",
    "etc/systemd/system/boots.service": f"""\
[Unit]
Description=Note that this machine has booted

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=sh -c 'cat /proc/sys/kernel/random/boot_id >>/{BOOTS} && sync /{BOOTS}'

[Install]
WantedBy=multi-user.target
""",
}
#: They begin with time, and then read files in one boot and not in the next.
TIMERS = ("apt-daily", "apt-daily-upgrade", "dpkg-db-backup", "e2scrub_all", "fstrim")


def debian() -> Path:
    """Returns the image, which is made once and kept in the user's cache."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyublk/boot"
    place.mkdir(parents=True, exist_ok=True)
    mirror = machine_mirror()
    state = hashlib.sha256(Path(__file__).read_bytes() + mirror.codename.encode()).hexdigest()
    image = place / f"debian-{state[:16]}.img"
    if not image.exists():
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            root, made = Path(scratch, "root"), Path(scratch, "image")
            _install(root, mirror.codename, mirror.sources([mirror.codename]))
            _configure(root)
            _format(root, made)
            made.rename(image)
    return image


def _install(root: Path, codename: str, sources: str) -> None:
    without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")]
    options = ["--quiet", "--mode=root", "--variant=minbase", f"--include={PACKAGES}"]
    subprocess.run(
        ["mmdebstrap", *options, *without, codename, root, "-"],
        input=sources,
        text=True,
        check=True,
        timeout=1800,
    )


def _configure(root: Path) -> None:
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    timers = [f"{name}.timer" for name in TIMERS]
    for command in (["mask", *timers], ["enable", "boots.service"]):
        subprocess.run(["systemctl", f"--root={root}", *command], check=True, timeout=60)


def _format(root: Path, image: Path) -> None:
    mke2fs = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    assert mke2fs, "mke2fs is missing: apt-get install e2fsprogs"
    # What is not initialized now, the kernel would write while the image is booted.
    now = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(
        [mke2fs, "-q", "-t", "ext4", "-E", now, "-d", root, image, SIZE], check=True, timeout=600
    )
