"""What a machine does to boot the image: it has it served by a web server, over that a cache and an
overlay, which are on its own disk, and hands the mounted disk to process 1.

    python guest.py first|second PLACE IMAGE

PLACE has the machine's own disk, an ext4 file system in the file `disk`, and gets the result in
JSON. What it is doing goes to the standard error.
"""

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image import BOOTS

PORT = 8080
#: Seconds for which `url` tries a request again.
BUDGET = 45
#: Emulated machines keep no time.
PATIENCE = 600.0
#: Bytes that are fetched after the disk was handed over, when the web server is killed.
MIDDLE = 8 << 20
#: Where the machine's own disk is mounted; and the disk that is booted, until it is.
OWN = Path("/own")
ROOT = Path("/sysroot")
#: The same, once it is process 1's.
BOOTED = Path("/proc/1/root")


def until(true: Callable[[], object], what: str, *, pause: float = 0.2) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(pause)
    tell(what)


def tell(what: str) -> None:
    print(f"{time.monotonic():.0f} s: {what}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> str:
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE
    ).stdout.strip()


class Web:
    """The web server, a process that can be killed."""

    def __init__(self, image: Path) -> None:
        self.log = OWN / "requests"
        self.log.write_text("")
        self._command: list[str | Path] = [
            sys.executable,
            Path(__file__).with_name("web.py"),
            str(PORT),
            image,
        ]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([*self._command, self.log])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def answers(self) -> list[tuple[int, float]]:
        """Bytes of each, and when."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(size), float(when)) for size, when, _ in lines]

    def unasked(self, size: int) -> int:
        """The middle of the largest part of the image that nobody has asked for."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        places = sorted((int(at), int(at) + int(length)) for length, _, at in lines)
        begins = [0, *(end for _, end in places)]
        ends = [*(at for at, _ in places), size]
        gap, begin = max((end - at, at) for at, end in zip(begins, ends, strict=True))
        return (begin + gap // 2) // 4096 * 4096

    def fetched(self) -> int:
        """Bytes of the image; one byte is how `url` asks what there is."""
        return sum(size for size, _ in self.answers() if size > 1)


def add(web: Web) -> dict[str, Any]:
    """What `pyublk add` tells of the disk."""
    until(lambda: b":1F90" in Path("/proc/net/tcp").read_bytes(), "the web server listens")
    told = run(
        *(
            "pyublk",
            "add",
            "--json",
            "url",
            f"http://127.0.0.1:{PORT}/debian.img",
            "--root-storage",
        ),
        *("--option", f"retry_for={BUDGET}"),
        *("--layer", f"cache:file={OWN}/cache", "--layer", f"overlay:file={OWN}/mine.overlay"),
    )
    return dict(json.loads(told))


def waiting() -> bool:
    return any(map(int, Path("/sys/block/ublkb0/inflight").read_text().split()))


def is_begun() -> bool:
    """Whether process 1 is the systemd of the disk, and has read what it is to start."""
    runs = Path("/proc/1/comm").read_text() == "systemd\n"
    return runs and (BOOTED / "run/systemd/private").exists()


def boots_through_a_restart(web: Web) -> dict[str, Any]:
    """The web server is killed in the middle of the boot, which waits and then goes on."""
    before = web.fetched()
    until(is_begun, "systemd runs")
    until(lambda: web.fetched() > before + MIDDLE, "the boot fetches")
    web.kill()
    until(waiting, "a request of the boot waits")
    stands, fetched, since = len(web.answers()), web.fetched(), time.time()
    pause = time.monotonic()
    while time.monotonic() < pause + 5:
        assert waiting(), "something else answers"
        time.sleep(0.2)
    assert len(web.answers()) == stands
    web.start()
    until(lambda: len(web.answers()) > stands, "the boot goes on")
    return {"fetched before": fetched, "waited": round(web.answers()[stands][1] - since, 1)}


def systemctl(*words: str) -> str:
    # It is not in a chroot: process 1 has the same root.
    return subprocess.run(
        ["chroot", BOOTED, "systemctl", *words],
        env={**os.environ, "SYSTEMD_IGNORE_CHROOT": "1", "SYSTEMD_PAGER": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    ).stdout.strip()


def is_up() -> bool:
    return is_begun() and systemctl("is-active", "multi-user.target") == "active"


def read_directly(disk: str, offset: int) -> bytes:
    """A block of it, by one request."""
    buffer = mmap.mmap(-1, 4096)
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(descriptor, [buffer], offset)
    finally:
        os.close(descriptor)
    return buffer[:]


def fails_past_the_budget(web: Web, image: Path, disk: dict[str, Any]) -> dict[str, Any]:
    """What nobody has read yet cannot be read for longer than the budget: one clear error, and
    the machine goes on when the web server is there again."""
    log, path = Path(disk["log"]), disk["path"]
    place = web.unasked(image.stat().st_size)
    before = log.read_text()
    web.kill()
    began = time.monotonic()
    with pytest.raises(OSError, match=r"timed out|Input/output error") as failed:
        read_directly(path, place)
    took = time.monotonic() - began
    assert took >= BUDGET, took
    assert (BOOTED / BOOTS).read_text(), "what the machine has goes on"
    web.start()
    told = log.read_text().removeprefix(before).splitlines()
    until(lambda: b":1F90" in Path("/proc/net/tcp").read_bytes(), "the web server listens")
    with image.open("rb") as whole:
        whole.seek(place)
        assert read_directly(path, place) == whole.read(4096)
    return {"failed": failed.value.strerror, "after": round(took, 1), "told": told}


def main(which: str, place: Path, image: Path) -> None:
    for directory in (OWN, ROOT):
        directory.mkdir()
    run("mount", "-o", "loop", place / "disk", OWN)
    web = Web(image)
    disk = add(web)
    log = Path(disk["log"])
    tell(f"{disk['path']} is there")
    looked = web.fetched()
    began = time.monotonic()
    run("mount", disk["path"], ROOT)
    Path("/run/pyublk-vm/boot").write_text(f"{ROOT}\n")
    found: dict[str, Any] = {}
    if which == "first":
        found |= boots_through_a_restart(web)
    until(is_up, "the machine has booted", pause=3)
    found["booted"] = round(time.monotonic() - began, 1)
    found["units that failed"] = systemctl("list-units", "--failed", "--plain", "--no-legend")
    found["boots"] = (BOOTED / BOOTS).read_text().split()
    found["fetched"] = web.fetched()
    found["requests"] = len(web.answers())
    found["asked"] = web.log.read_text().splitlines()[:20]
    found["looked"] = looked
    found["kernel's errors"] = [
        line for line in run("dmesg").splitlines() if "error" in line.lower() and "ublk" in line
    ]
    found["log"] = log.read_text()
    if which == "first":
        found |= fails_past_the_budget(web, image, disk)
    (place / f"{which}.json").write_text(json.dumps(found))
    tell("it reboots")
    os.sync()
    systemctl("reboot")
    time.sleep(PATIENCE)  # until systemd kills all that is left


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
