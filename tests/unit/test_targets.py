"""Names and options of targets, and the file target's own cases; test_disk.py moves the bytes."""

import enum
import gc
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import pyublk
from pyublk import targets
from pyublk.testing import Disk


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


class Picky(pyublk.Target):
    def __init__(
        self,
        path: Path,
        count: int = 1,
        *,
        size: int = 4096,
        ratio: float = 0.5,
        quick: bool = False,
        mode: Literal["left", "right"] = "left",
        colour: Colour = Colour.RED,
        note: str | None = None,
    ) -> None:
        super().__init__(size=size)
        self.got = (path, count, ratio, quick, mode, colour, note)

    def read(self, offset: int, buffer: memoryview) -> None:
        pass

    def write(self, offset: int, data: memoryview) -> None:
        pass


def test_options_are_converted_as_the_signature_says() -> None:
    options = {
        "count": "2K",
        "size": "1M",
        "ratio": "0.25",
        "quick": "yes",
        "mode": "right",
        "colour": "green",
        "note": "hello",
    }
    made = targets.build(Picky, options, ["disk.img"])
    assert isinstance(made, Picky)
    assert made.got == (Path("disk.img"), 2048, 0.25, True, "right", Colour.GREEN, "hello")
    assert made.size == 1 << 20


def test_what_is_given_beside_the_options_is_passed_on_unless_none() -> None:
    made = targets.build(Picky, {"path": "x"}, size=8192, block_size=None)
    assert made.size == 8192


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"path": "x", "cuont": "1"},
            [],
            r"Picky has no option 'cuont' \(did you mean 'count'\?\)",
        ),
        ({"path": "x", "count": "many"}, [], "option count is 'many': it must be a whole number"),
        ({"path": "x", "ratio": "half"}, [], "option ratio is 'half': it must be a number"),
        ({"path": "x", "quick": "maybe"}, [], "option quick is 'maybe': it must be yes or no"),
        ({"path": "x", "mode": "up"}, [], "option mode is 'up': it must be one of left, right"),
        (
            {"path": "x", "colour": "blue"},
            [],
            "option colour is 'blue': it must be one of red, green",
        ),
        ({}, [], "Picky needs path: write Picky PATH, or give it as an option"),
        ({"path": "x"}, ["y"], "path is given twice"),
        ({"path": "x", "size": "1M"}, [], "size is given twice"),
        ({}, ["x", "1", "2"], r"Picky takes 2 argument\(s\) \(path, count\), not 3"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(
    options: dict[str, str], arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        targets.build(Picky, options, arguments, size=4096 if "size" in options else None)


class Bare(pyublk.Target):
    """As README's first class is written: without annotations."""

    def __init__(self, note, size, block_size, read_only):  # type: ignore[no-untyped-def]
        super().__init__(size=size, block_size=block_size, read_only=read_only)
        self.note = note

    read = write = Picky.read


def test_names_that_every_target_has_need_no_annotation() -> None:
    made = targets.build(Bare, {"read_only": "yes"}, ["1G", "64M", "4K"])
    assert (made.note, made.size, made.block_size, made.read_only) == ("1G", 64 << 20, 4096, True)
    with pytest.raises(ValueError, match="option size is 'extra': it must be a whole number, or"):
        targets.build(Bare, {"read_only": "yes"}, ["x", "extra", "512"])


class Several(pyublk.Target):
    """Annotations of many kinds, and none."""

    def __init__(
        self,
        hosts: list[str],
        ports: tuple[int, ...] = (1,),
        *,
        sizes: Sequence[int] | None = None,
        offset: int = 0,
        raw: bytes = b"",
        place: os.PathLike[str] | None = None,
        anything: Any = None,
        noted: Annotated[int, "a note"] = 0,
        count=3,  # type: ignore[no-untyped-def]
        share=0.5,
        quick=False,
        colour=Colour.RED,
        names=("a",),
        unknown=None,
        table: dict[str, int] | None = None,
        lock: Colour | threading.Event | None = None,
        event: threading.Event | None = None,
    ) -> None:
        super().__init__(size=4096)
        self.got = {name: value for name, value in locals().items() if name != "self"}

    read = write = Picky.read


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("hosts", "one,two", ["one", "two"]),
        ("hosts", "one", ["one"]),
        ("hosts", "", []),
        ("ports", "80,8K", (80, 8192)),
        ("sizes", "1K,2K", (1024, 2048)),
        ("offset", "-5", -5),
        ("raw", "\u00e4", "\u00e4".encode()),
        ("place", "/x", Path("/x")),
        ("anything", "7", "7"),
        ("noted", "7", 7),
        ("count", "7", 7),
        ("share", "0.25", 0.25),
        ("quick", "yes", True),
        ("colour", "green", Colour.GREEN),
        ("names", "x,y", ("x", "y")),
        ("unknown", "7", "7"),
    ],
)
def test_several_values_and_types_that_only_defaults_tell(
    option: str, text: str, value: object
) -> None:
    made = targets.build(Several, {"hosts": "h"} | {option: text})
    assert isinstance(made, Several)
    assert made.got[option] == value
    assert type(made.got[option]) is type(value)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("ports", "80,many", "option ports is 'many': it must be a whole number"),
        ("offset", "--5", "option offset is '--5': it must be a whole number"),
        ("count", "x", "option count is 'x': it must be a whole number"),
        ("quick", "x", "option quick is 'x': it must be yes or no"),
        ("table", "a=1", r"option table has the type dict\[str, int\], which cannot be given"),
        ("event", "x", "option event has the type Event, which cannot be given as text"),
    ],
)
def test_texts_that_are_no_such_value(option: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets.build(Several, {"hosts": "h"} | {option: text})


def test_targets_are_found_by_name_module_and_file(tmp_path: Path) -> None:
    assert targets.resolve("ram") is targets.Ram
    assert targets.resolve("pyublk.targets.null:Null") is targets.Null
    source = tmp_path / "mine.py"
    source.write_text(
        "import pyublk\nclass Mine(pyublk.Target):\n    def read(self, o, b): pass\nthing = 1\n"
    )
    assert targets.resolve(f"{source}:Mine").__name__ == "Mine"
    with pytest.raises(ValueError, match=r"has no 'Mien' \(did you mean 'Mine'\?\); its targets"):
        targets.resolve(f"{source}:Mien")
    with pytest.raises(pyublk.InvalidTarget, match=r":thing is not a subclass of pyublk\.Target"):
        targets.resolve(f"{source}:thing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rma",
            r"there is no target 'rma' \(did you mean 'ram'\?\); the targets are .*file, .*ram",
        ),
        ("nowhere.at.all:X", "there is no module 'nowhere.at.all'"),
        ("missing.py:X", r"there is no file 'missing\.py'"),
        ("missing.py", "'missing.py' names a file, but no class: write missing.py:Class"),
        (":X", "':X' names no module: write package.module:Class or file.py:Class"),
        (":", "':' names no module"),
        (".mine:X", "'.mine:X' names no module"),
        ("a..b:X", "'a..b:X' names no module"),
        ("disk.img:X", "there is no module 'disk.img'"),
        ("my disks:X", "'my disks:X' names no module"),
        (
            "pyublk.targets.null:",
            "'pyublk.targets.null:' names no class of pyublk.targets.null; its",
        ),
        ("pyublk.targets.null:Nlul", r"has no 'Nlul' \(did you mean 'Null'\?\)"),
    ],
)
def test_unknown_targets_are_told_with_what_is_near(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets.resolve(text)


# ---- the file target ----


def test_a_file_is_made_and_its_content_stays(
    tmp_path: Path, open_disk: Callable[..., Disk]
) -> None:
    path = tmp_path / "disk.img"
    disk = open_disk(targets.File(path, size=1 << 20))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    disk.pwrite(b"kept" + bytes(508), 4096)
    disk.close()
    assert path.read_bytes()[4096:4100] == b"kept"
    again = open_disk(targets.File(path))
    assert again.size == 1 << 20
    assert again.pread(512, 4096)[:4] == b"kept"


def test_discard_and_write_zeroes_give_blocks_back(
    tmp_path: Path, open_disk: Callable[..., Disk]
) -> None:
    path = tmp_path / "disk.img"
    disk = open_disk(targets.File(path, size=1 << 20))
    disk.pwrite(b"x" * (1 << 20), 0)
    disk.flush()
    full = path.stat().st_blocks
    disk.discard(0, 512 << 10)
    assert path.stat().st_blocks <= full - (512 << 10) // 512
    disk.write_zeroes(512 << 10, 256 << 10)
    assert path.stat().st_blocks <= full - (768 << 10) // 512
    disk.write_zeroes(768 << 10, 128 << 10, unmap=False)
    assert disk.pread((1 << 20) - (128 << 10), 0) == bytes((1 << 20) - (128 << 10))
    assert disk.pread(128 << 10, 896 << 10) == b"x" * (128 << 10)


def test_a_discard_that_is_no_command_of_its_device_punches_a_hole(
    tmp_path: Path, open_disk: Callable[..., Disk]
) -> None:
    """A file passed off as a device: like those of kernels before 6.12, it has no such command."""

    class Device(targets.File):
        def make_layout(self, files: list[tuple[int, bool, bool]]) -> pyublk._native.Layout:
            return super().make_layout([(files[0][0], False, True)])

    path = tmp_path / "disk.img"
    disk = open_disk(Device(path, size=1 << 20), depth=4, max_io_size=65536)
    disk.pwrite(b"x" * (1 << 20), 0)
    disk.flush()
    full = path.stat().st_blocks
    disk.discard(0, 512 << 10)
    disk.discard(768 << 10, 128 << 10)
    assert path.stat().st_blocks <= full - (640 << 10) // 512
    gone, kept = bytes(512 << 10), b"x" * (128 << 10)
    assert disk.pread(1 << 20, 0) == gone + kept + kept + bytes(128 << 10) + kept
    assert disk.stats().total.errors == 0


def test_a_read_only_file_is_a_read_only_disk(
    tmp_path: Path, open_disk: Callable[..., Disk]
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"fixed" + bytes(1019))
    disk = open_disk(targets.File(path, read_only=True))
    assert disk.pread(512, 0)[:5] == b"fixed"
    with pytest.raises(PermissionError, match="read-only"):
        disk.pwrite(bytes(512), 0)


def test_direct_io_round_trips(open_disk: Callable[..., Disk]) -> None:
    folder = Path(__file__).parent  # tmp_path may be on a file system without direct I/O
    path = folder / f"direct-{os.getpid()}.img"
    try:
        disk = open_disk(targets.File(path, size=1 << 20, direct=True))
        data = os.urandom(64 << 10)
        disk.pwrite(data, 8192)
        disk.write_zeroes(8192, 4096, unmap=False)
        assert disk.pread(64 << 10, 8192) == bytes(4096) + data[4096:]
    finally:
        path.unlink(missing_ok=True)


def test_file_errors_are_told_and_leave_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing.img"
    with pytest.raises(
        FileNotFoundError, match=r"missing\.img does not exist: give a size to make it"
    ):
        targets.File(missing).open()
    for other in (
        targets.File(missing, size=4096, read_only=True),  # which a size does not make
        targets.Linear(missing, missing, size=4096),
        targets.Slice(missing, size=4096),
    ):
        with pytest.raises(FileNotFoundError, match=r"missing\.img does not exist$"):
            other.open()
    with pytest.raises(
        FileNotFoundError, match=r"/none, where a\.img is to be made, does not exist$"
    ):
        targets.File(tmp_path / "none" / "a.img", size=4096).open()
    with pytest.raises(ValueError, match="is neither a regular file nor a block device"):
        targets.File(tmp_path).open()
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="has 1000 bytes: a disk needs a positive multiple of its"):
        targets.File(odd).open()
    with pytest.raises(ValueError, match=r"size 2048 is more than .*odd\.img has, 1000 bytes"):
        targets.File(odd, size=2048, read_only=True).open()
    half_made = tmp_path / "half.img"
    with pytest.raises(ValueError, match="a positive multiple of its block size, 4096"):
        targets.File(half_made, size=5000, block_size=4096).open()
    assert not half_made.exists()


def test_direct_io_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    proc = Path("/proc/version")
    with pytest.raises((OSError, ValueError)):
        targets.File(proc, direct=True, read_only=True).open()


def test_a_file_cut_short_fails_reads_only_there(
    tmp_path: Path, open_disk: Callable[..., Disk]
) -> None:
    path = tmp_path / "disk.img"
    disk = open_disk(targets.File(path, size=8192))
    os.truncate(path, 4096)
    assert disk.pread(4096, 0) == bytes(4096)
    with pytest.raises(OSError, match="READ at 4096 failed"):
        disk.pread(4096, 4096)


def test_ram_is_sparse_and_keeps_its_bytes_between_servings() -> None:
    ram = targets.Ram(size=1 << 40)
    with Disk(ram) as disk:
        assert ram.resident() == 0
        disk.pwrite(b"y" * 4096, 1 << 39)
        assert ram.resident() == 4096
    with Disk(ram) as disk:
        assert disk.pread(4096, 1 << 39) == b"y" * 4096
        disk.discard(1 << 39, 4096)
        assert ram.resident() == 0


def test_ram_that_is_kept_is_there_for_the_next_server() -> None:
    first, second = targets.Ram(size=1 << 40), targets.Ram(size=1 << 40)
    assert not first.recoverable
    first.keep()
    assert first.recoverable
    with Disk(first) as disk:
        assert disk.pread(4096, 0) == bytes(4096)
        assert first.resident() == 0
        disk.pwrite(b"y" * 4096, 1 << 39)
        assert first.resident() == 4096
        second.keep(f"/proc/self/fd/{first.file}")
    with Disk(second) as disk:
        del first
        assert disk.pread(4096, 1 << 39) == b"y" * 4096
        disk.discard(1 << 39, 4096)
        assert second.resident() == 0
        assert second.file is not None
        # Who has it mapped is not to be killed for what others do.
        with pytest.raises(PermissionError):
            os.ftruncate(second.file, 4096)
    larger = targets.Ram(size=1 << 41)
    with pytest.raises(ValueError, match="the memory has 1099511627776 bytes, and the disk 2199"):
        larger.keep(f"/proc/self/fd/{second.file}")


def test_kept_memory_is_given_back_with_the_target() -> None:
    def memory_files() -> int:
        places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum("pyublk-ram" in os.readlink(place) for place in places if os.path.exists(place))

    gc.collect()
    before = memory_files()
    ram = targets.Ram(size=4096)
    ram.keep()
    with Disk(ram):
        assert memory_files() == before + 1
    del ram
    gc.collect()
    assert memory_files() == before


def test_importing_targets_runs_nothing_else() -> None:
    program = "import pyublk.targets, sys; print('numpy' in sys.modules, 'click' in sys.modules)"
    done = subprocess.run(
        [os.sys.executable, "-c", program],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]
