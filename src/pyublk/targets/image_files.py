# SPDX-License-Identifier: MIT
"""What the files of a virtual machine's image are, told by their headers, and by qemu-img.

A format is never guessed from what a guest could have written: an image is what its first bytes
say, but `raw` only if its owner says so, and a backing file is what the image on top says. Names in
an image that QEMU would take for something other than a file here are refused.
"""

import errno
import json
import os
import re
import shutil
import stat
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyublk.files import Identity, about
from pyublk.uapi import SECTOR_SIZE

FORMATS = ("qcow2", "vmdk", "vhdx", "vdi", "raw")

#: Bytes of a file in which every format says what it is.
HEAD = 4096
#: More images than these, one on top of the other, are taken for a mistake.
DEEPEST = 64
#: Seconds for qemu-img.
PATIENCE = 120.0

_QCOW2 = b"QFI\xfb"
_VMDK = b"KDMV"
_VHDX = b"vhdxfile"
_VDI = (0x40, b"\x7f\x10\xda\xbe")
_CORRUPT, _EXTERNAL_DATA = 2, 4
_BACKING_FORMAT = 0xE2792ACA
_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]+:")
_MAP_LINE = re.compile(r"(0x[0-9a-f]+|0) +(0x[0-9a-f]+|0) +(0x[0-9a-f]+|0) +(.+)")


class Unmapped(Exception):
    """The image's bytes are not all found, as they are, in a file: the message says why."""


#: In the flags of a VMDK: its grains are compressed (streamOptimized).
_COMPRESSED = 1 << 16


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of an image; `backing` is the one below it. `written_once`: what has been written
    cannot be written again."""

    path: Path
    format: str
    backing: "ImageFile | None"
    written_once: bool = False

    def chain(self) -> "list[ImageFile]":
        """It, and those below."""
        return [self, *(self.backing.chain() if self.backing else ())]

    def node(self, *, direct: bool = False) -> dict[str, Any]:
        """It as QEMU's option `blockdev`, which leaves nothing to be guessed."""
        kind = "host_device" if self.path.is_block_device() else "file"
        file: dict[str, Any] = {
            "driver": kind,
            "filename": str(self.path),
            "cache": {"direct": direct},
        }
        if self.format == "raw":
            return {"driver": "raw", "file": file}
        node: dict[str, Any] = {"driver": self.format, "file": file}
        if self.format in ("qcow2", "vmdk"):
            node["backing"] = self.backing.node(direct=direct) if self.backing else None
        return node

    def alone(self) -> "ImageFile":
        """It without those below."""
        return replace(self, backing=None)

    def filename(self) -> str:
        """Its `node` as a file's name for qemu-img."""
        return "json:" + json.dumps(self.node())


def examine(
    path: Path, format: str | None = None, *, above: tuple[Identity, ...] = ()
) -> ImageFile:
    """The image, with those below it. Raises OSError and ValueError that say what it is instead."""
    path = Path(os.path.abspath(path))
    head = _head(path)
    identity = about(path).identity
    if identity in above or len(above) > DEEPEST:
        raise ValueError(f"{path} lies, by its backing files, on top of itself")
    found = format_of(path, head) if format is None else format
    if found not in FORMATS:
        raise ValueError(f"format is {format!r}: it must be one of {', '.join(FORMATS)}")
    if found != "raw" and (actual := _by_magic(head)) != found:
        raise ValueError(f"{path} is not a {found} image{f', but {actual}' if actual else ''}")
    below: tuple[str, str] | None = None
    written_once = False
    if found == "qcow2":
        below = _qcow2(path, head)
    elif found == "vmdk":
        below = _vmdk(path, head)
        written_once = bool(struct.unpack_from("<I", head, 8)[0] & _COMPRESSED)
    if below is None:
        return ImageFile(path, found, None, written_once)
    name, backing_format = below
    if _PROTOCOL.match(name):
        raise ValueError(
            f"the backing file of {path} is {name!r}, which QEMU would not take for a file's name: "
            "only files are opened; qemu-img rebase -u names another"
        )
    backing = examine(path.parent / name, backing_format, above=(*above, identity))
    return ImageFile(path, found, backing, written_once)


def _head(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError(f"{path} is neither a regular file nor a block device")
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        why = (
            "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        )
        raise type(error)(error.errno, f"{path} {why}") from None


def _by_magic(head: bytes) -> str | None:
    for name, at, magic in (
        ("qcow2", 0, _QCOW2),
        ("vmdk", 0, _VMDK),
        ("vhdx", 0, _VHDX),
        ("vdi", *_VDI),
    ):
        if head[at : at + len(magic)] == magic:
            return name
    return None


def format_of(path: Path, head: bytes) -> str:
    """The format by the first bytes. Raises ValueError for none of them."""
    if (found := _by_magic(head)) is not None:
        return found
    if head.startswith((b"# Disk DescriptorFile", b"COWD")):
        raise ValueError(
            f"{path} is a VMDK of several files: make one of it by qemu-img convert -O qcow2"
        )
    raise ValueError(
        f"{path} is no image in the formats {', '.join(FORMATS[:-1])}: if it has a disk's bytes as "
        "they are, serve it by the target file"
    )


def _qcow2(path: Path, head: bytes) -> tuple[str, str] | None:
    """Its backing file's name and format. Raises ValueError for an image that is not served."""
    if len(head) < 72:
        raise ValueError(f"{path} is cut off: it has not even a whole header")
    version, at, length, _, _, encryption = struct.unpack_from(">IQIIQI", head, 4)
    incompatible = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
    if encryption:
        raise ValueError(
            f"{path} is encrypted: decrypt it by qemu-img convert, since keys are not taken"
        )
    if incompatible & _CORRUPT:
        raise ValueError(f"{path} is marked as corrupt: qemu-img check -r all repairs it")
    if incompatible & _EXTERNAL_DATA:
        raise ValueError(
            f"{path} keeps its data in another file: make one of it by qemu-img convert -O qcow2"
        )
    if not at:
        return None
    if not 0 < length <= 1023 or at + length > len(_read(path, at + length)):
        raise ValueError(f"{path} is damaged: the name of its backing file is not there")
    whole = _read(path, at + length)
    name = os.fsdecode(whole[at : at + length])
    start = struct.unpack_from(">I", head, 100)[0] if version >= 3 else 72
    backing_format = _backing_format(whole, start, at)
    if backing_format is None:
        raise ValueError(
            f"{path} does not say which format its backing file {name!r} has, and it is not "
            "guessed: qemu-img rebase -u -F FORMAT records it"
        )
    if backing_format not in FORMATS:
        raise ValueError(f"the backing file of {path} has the format {backing_format!r}: it must "
                         f"be one of {', '.join(FORMATS)}")  # fmt: skip
    return name, backing_format


def _backing_format(header: bytes, start: int, end: int) -> str | None:
    """What the extension of a qcow2 header says (docs/interop/qcow2.txt)."""
    while start + 8 <= end:
        kind, length = struct.unpack_from(">II", header, start)
        if kind == 0:
            return None
        if kind == _BACKING_FORMAT:
            return header[start + 8 : start + 8 + length].decode(errors="replace")
        start += 8 + -(-length // 8) * 8
    return None


def _vmdk(path: Path, head: bytes) -> tuple[str, str] | None:
    """Its parent's name and format. Raises ValueError for an image of other files."""
    if len(head) < 79:
        raise ValueError(f"{path} is cut off: it has not even a whole header")
    capacity, _, at, sectors = struct.unpack_from("<QQQQ", head, 12)
    description = _read(path, (at + min(sectors, 128)) * 512)[at * 512 :] if at else b""
    text = description.split(b"\0", 1)[0].decode(errors="replace")
    kind = re.search(r'^createType="(\w+)"', text, re.M)
    if not capacity or (kind and kind[1] not in ("monolithicSparse", "streamOptimized")):
        raise ValueError(
            f"{path} is a VMDK of several files: make one of it by qemu-img convert -O qcow2"
        )
    parent = re.search(r'^parentFileNameHint="(.*)"', text, re.M)
    return (parent[1], "vmdk") if parent else None


def _read(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(min(length, 1 << 20))


# ---- qemu's programs ----


def program(name: str, package: str) -> str:
    """The path of one of QEMU's programs. Raises OSError that says where it is had."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            errno.ENOENT,
            f"images are opened by QEMU's {name}, which is not installed: it is in the package "
            f"{package} of Debian and Ubuntu",
        )
    return found


def failure(path: Path, said: str) -> OSError:
    """What QEMU's error output means."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = re.sub(r"^[\w-]+: ", "", lines[-1]) if lines else "it said nothing"
    last = re.sub(r"^(--blockdev|Could not open) ['\"]?(json:|\{).*?\}['\"]?: ", "", last)
    if re.search(r"Failed to (get|lock)|Is another process using", said):
        return OSError(errno.EBUSY, f"{path} is in use by another program, which QEMU cannot share")
    return OSError(errno.EIO, f"QEMU cannot open {path}: {last}")


def ask(image: ImageFile, *words: str) -> str:
    """What qemu-img says of an image. Raises OSError, and Unmapped for what it cannot tell."""
    command = [program("qemu-img", "qemu-utils"), *words, image.filename()]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        env=os.environ | {"LC_ALL": "C"},
        check=False,
    )
    said = os.fsdecode(done.stderr)
    if done.returncode and "external, encrypted or compressed clusters" in said:
        raise Unmapped("some of its clusters are compressed, or not at a known place")
    if done.returncode:
        raise failure(image.path, said)
    return os.fsdecode(done.stdout)


def empty(path: Path) -> ValueError:
    """What is wrong with an image whose disk has no bytes."""
    return ValueError(f"{path} is the image of an empty disk: `qemu-img resize` makes it larger")


def virtual_size(image: ImageFile) -> int:
    """Bytes of the disk in an image."""
    return int(json.loads(ask(image.alone(), "info", "--output=json"))["virtual-size"])


#: A part of the disk that is a part of a file: first byte, bytes, file, first byte there.
Part = tuple[int, int, Path, int]


def parts(image: ImageFile, most: int) -> list[Part]:
    """Where the image's data is, in order; the rest is zeroes. Raises OSError, and Unmapped when
    it is not all found so, or in more than `most` parts."""
    files = {str(one.path): one.path for one in image.chain()}
    found: list[Part] = []
    lines = ask(image, "map").split("\n")[1:]
    if len(lines) > most:
        raise Unmapped(f"it is in more than {most} parts")
    for line in filter(None, lines):
        match = _MAP_LINE.fullmatch(line)
        if match is None or match[4] not in files:
            raise Unmapped("qemu-img names no file for some of its data")
        start, length, offset = (int(match[n], 16) for n in (1, 2, 3))
        if length := _within(files[match[4]], offset, length):
            found.append((start, length, files[match[4]], offset))
    return found


def _within(path: Path, offset: int, length: int) -> int:
    """What of it lies before the file's end, beyond which QEMU reads zeroes."""
    about_file = path.stat()
    if stat.S_ISBLK(about_file.st_mode):
        return length
    there = max(min(length, about_file.st_size - offset), 0)
    if there % SECTOR_SIZE or offset % SECTOR_SIZE:
        raise Unmapped(f"{path} does not end with a whole sector")
    return there
