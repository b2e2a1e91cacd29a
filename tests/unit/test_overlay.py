"""Overlays: what a disk reads and writes, what their commands do, and what is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import pyublk
from pyublk import layers, overlays
from pyublk.cli import main
from pyublk.layers.identity import Identity, sample_offsets
from pyublk.layers.mapfile import MapFile
from pyublk.layers.overlay import Overlay
from pyublk.layers.overlay_record import BaseChanged
from pyublk.overlays.runs import common, rest_of, runs_of, whole_blocks
from pyublk.targets import File, Ram
from pyublk.targets.overlay import OverlayFile
from pyublk.testing import Disk

KIB = 1 << 10
SIZE = 256 * KIB


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def top(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "top.overlay"
    overlays.create(path, str(base))
    return path


def content(file: Path) -> bytes:
    with Disk(OverlayFile(file, read_only=True)) as disk:
        return disk.pread(disk.size, 0)


def write(file: Path, data: bytes, offset: int) -> None:
    with Disk(OverlayFile(file)) as disk:
        disk.pwrite(data, offset)
        disk.flush()


def later(path: Path, seconds: int = 5) -> None:
    """As if it had been written again that much later."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pyublk")


# ---- the disk ----


def test_it_reads_as_the_base_until_it_is_written(base: Path, top: Path) -> None:
    before = base.read_bytes()
    expected = bytearray(before)
    with Disk(OverlayFile(top)) as disk:
        assert disk.pread(SIZE, 0) == before
        for offset, length in ((0, 512), (5000 // 512 * 512, 9 * KIB), (SIZE - 512, 512)):
            data = os.urandom(length)
            disk.pwrite(data, offset)
            expected[offset : offset + length] = data
        disk.write_zeroes(64 * KIB, 8 * KIB)
        expected[64 * KIB : 72 * KIB] = bytes(8 * KIB)
        assert disk.pread(SIZE, 0) == bytes(expected)
        disk.flush()
    assert content(top) == bytes(expected)
    assert base.read_bytes() == before


def test_a_flush_makes_the_map_durable(top: Path) -> None:
    with Disk(OverlayFile(top)) as disk:
        disk.pwrite(b"f" * 4096, 12288)
        disk.flush()
        found = MapFile.read_durable(top)
        assert [*runs_of(found.bits, 4096, SIZE)] == [(12288, 4096)]


def test_a_discard_never_brings_the_base_back(top: Path, base: Path) -> None:
    with Disk(OverlayFile(top)) as disk:
        disk.pwrite(b"x" * 4096, 8192)
        disk.discard(8192, 4096)
        assert disk.pread(4096, 8192) in (bytes(4096), b"x" * 4096)
        disk.discard(16384, 4096)  # of the base's
        assert disk.pread(4096, 16384) in (bytes(4096), base.read_bytes()[16384:20480])


@pytest.mark.parametrize("extra", [4096, 512, 1 << 20])
def test_a_disk_larger_than_its_base(tmp_path: Path, base: Path, extra: int) -> None:
    with open(base, "ab") as file:
        file.write(os.urandom(1536))  # no whole block
    before = base.read_bytes()
    top = tmp_path / "top"
    overlays.create(top, str(base), size=len(before) + extra)
    assert content(top) == before + bytes(extra)
    write(top, b"y" * 512, len(before))
    overlays.commit(top)
    assert base.read_bytes() == content(top) == before + b"y" * 512 + bytes(extra - 512)


def test_as_a_layer(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "made.overlay"
    before = base.read_bytes()
    for turn in range(2):  # made, and taken up again
        with Disk(layers.build(f"overlay:file={file}", File(base))) as disk:
            assert disk.pread(512, 0) == (b"z" * 512 if turn else before[:512])
            disk.pwrite(b"z" * 512, 0)
            assert Disk(File(base, read_only=True)).target is not None
    assert base.read_bytes() == before
    later(base)
    with pytest.raises(BaseChanged, match="what is below it, has changed: it was last written to"):
        Disk(Overlay(File(base), file)).open()


class Said(Ram):
    """A source that says what it is."""

    said = "one"

    def identity(self) -> str:
        return self.said


def test_a_source_that_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "over"
    source = Said(size=SIZE)
    with Disk(Overlay(source, file)) as disk:
        disk.pwrite(b"1" * 512, 0)
    source.said = "two"
    with pytest.raises(BaseChanged, match="it said of itself 'one', and says 'two'"):
        Disk(Overlay(source, file)).open()
    source.said = "one"
    with Disk(Overlay(source, file)) as disk:
        assert disk.pread(512, 0) == b"1" * 512


class Plain(pyublk.Target):
    """A source that says nothing, with methods of its own."""

    def __init__(self, data: bytes) -> None:
        super().__init__(size=len(data))
        self.data = bytearray(data)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        raise AssertionError("a base is not written")


def test_a_source_of_python_is_sampled(tmp_path: Path) -> None:
    file = tmp_path / "over"
    source = Plain(os.urandom(SIZE))
    with Disk(Overlay(source, file)) as disk:
        assert disk.pread(SIZE, 0) == source.data
        disk.pwrite(b"1" * 512, 1024)
        expected = source.data[:1024] + b"1" * 512 + source.data[1536:]
        assert disk.pread(SIZE, 0) == expected
    source.data[65536] ^= 1
    with pytest.raises(BaseChanged, match="its bytes at 65536 are other ones"):
        Disk(Overlay(source, file)).open()


def test_many_over_one_base_at_once(tmp_path: Path, base: Path) -> None:
    tops = [tmp_path / f"top{number}" for number in range(5)]
    for top in tops:
        overlays.create(top, str(base))
    disks = [Disk(OverlayFile(top)) for top in tops]
    for number, disk in enumerate(disks):
        disk.open()
        disk.pwrite(bytes([number]) * 4096, 4096 * number)
    for number, disk in enumerate(disks):
        found = bytearray(base.read_bytes())
        found[4096 * number : 4096 * (number + 1)] = bytes([number]) * 4096
        assert disk.pread(SIZE, 0) == found
    with pytest.raises(OSError, match="is in use"):
        Disk(File(base)).open()  # to write it
    for disk in disks:
        disk.close()
    with Disk(File(base)):
        pass


def test_a_chain(tmp_path: Path, base: Path, top: Path) -> None:
    write(top, b"m" * 4096, 4096)
    third = tmp_path / "third"
    overlays.create(third, f"overlay:{top}")
    write(third, b"t" * 4096, 8192)
    before = base.read_bytes()
    expected = before[:4096] + b"m" * 4096 + b"t" * 4096 + before[12288:]
    assert content(third) == expected
    with Disk(OverlayFile(third)), pytest.raises(OSError, match="is in use"):
        Disk(OverlayFile(top)).open()
    assert overlays.squash(third) == 4096
    assert overlays.info(third).base == str(base)
    assert content(third) == expected
    write(top, b"n" * 4096, 4096)  # nobody's base any more
    assert content(third) == expected


def test_an_overlay_written_since_is_another_base(tmp_path: Path, top: Path) -> None:
    third = tmp_path / "third"
    overlays.create(third, f"overlay:{top}")
    write(top, b"n" * 4096, 4096)
    with pytest.raises(BaseChanged, match=r"top\.overlay, has changed: it said of itself"):
        content(third)


# ---- the base ----


def test_a_base_that_was_written_is_refused(base: Path, top: Path) -> None:
    later(base)
    with pytest.raises(BaseChanged, match=r"has changed: it was last written to at \d{4}-"):
        content(top)
    found = overlays.info(top)
    assert (found.state, found.why[:12]) == ("changed", "it was last ")
    commands: list[list[str | Path]] = [["commit"], ["diff", "--content"], ["rebase", base]]
    for command in commands:
        result = run("overlay", command[0], top, *command[1:])
        assert result.exit_code == 1
        assert "has changed: it was last written to" in result.output
    assert overlays.diff(top) == []  # that needs no base


def test_other_bytes_with_the_same_time_are_refused(base: Path, top: Path) -> None:
    stat = base.stat()
    with open(base, "r+b") as file:
        file.seek(64 * KIB)
        file.write(b"other")
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BaseChanged, match="its bytes at 65536 are other ones"):
        content(top)


def test_another_size_is_refused(base: Path, top: Path) -> None:
    os.truncate(base, SIZE // 2)
    with pytest.raises((BaseChanged, ValueError), match=r"had .*has|has .*had"):
        content(top)


def test_a_base_that_is_missing(base: Path, top: Path) -> None:
    base.rename(base.with_name("moved.img"))
    with pytest.raises(FileNotFoundError, match=r"base\.img does not exist"):
        content(top)
    found = overlays.info(top)
    assert (found.state, "base.img does not exist" in found.why) == ("missing", True)
    # Moved, it is the same; copied, it has been written at another time.
    overlays.rebase(top, str(base.with_name("moved.img")), trust="samples")
    assert overlays.info(top).state == "unchanged"
    shutil.copyfile(base.with_name("moved.img"), base)
    overlays.rebase(top, str(base), trust="samples")
    assert content(top) == base.read_bytes()


def test_a_copy_that_is_none(tmp_path: Path, base: Path, top: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"!" + base.read_bytes()[1:])
    result = run("overlay", "rebase", top, other, "--moved")
    assert result.exit_code == 1
    assert f"{other} is not a copy of {base}: its bytes at 0 are other ones" in result.output
    assert run("overlay", "rebase", top, other, "--unsafe").exit_code == 0
    assert content(top) == other.read_bytes()


def test_a_moved_directory_is_found_by_rebase(tmp_path: Path, base: Path, top: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (base, top, MapFile.path_of(top)):
        file.rename(moved / file.name)
    overlays.rebase(moved / top.name, str(moved / base.name), trust="samples")
    assert content(moved / top.name) == (moved / base.name).read_bytes()


def test_what_identities_tell_apart() -> None:
    one = Identity(size=4096, written=(1,), samples="00" * 8)
    assert one.difference(one) is None
    assert one.difference(Identity(size=4096, written=(2,), samples="00" * 8))
    assert one.content_difference(Identity(size=4096, written=(2,), samples="00" * 8)) is None
    assert one.content_difference(Identity(size=4096, samples="01" * 8), lambda at: False) is None
    assert Identity.from_record(json.loads(json.dumps(one.to_record()))) == one
    for size in (512, 4096, 10_000, 1 << 20, 1 << 40):
        offsets = sample_offsets(size)
        assert offsets[0] == 0
        assert offsets[-1] == (size - 1) // 4096 * 4096
        assert len(offsets) <= 34
        assert size <= 65536 or 65536 in offsets


# ---- the commands ----


def test_rebase_keeps_the_bytes(tmp_path: Path, base: Path, top: Path) -> None:
    write(top, b"o" * 512, 20480)
    before = content(top)
    other = tmp_path / "other.img"
    changed = bytearray(base.read_bytes()[: SIZE // 2 + 512])  # shorter, and no whole block
    changed[4096:4100] = b"else"
    other.write_bytes(changed)
    copied = overlays.rebase(top, str(other))
    assert content(top) == before
    assert copied == SIZE // 2 + 4096
    base.unlink()
    assert content(top) == before
    overlays.commit(top)
    assert other.read_bytes() == before


def test_rebase_to_a_larger_base(tmp_path: Path, base: Path, top: Path) -> None:
    large = tmp_path / "large.img"
    large.write_bytes(base.read_bytes() + b"more".ljust(512))
    result = run("overlay", "rebase", top, large)
    assert result.exit_code == 2
    assert "an overlay is at least as large as its base" in result.output


def test_an_image_without_a_base(tmp_path: Path, top: Path) -> None:
    write(top, b"o" * 512, 20480)
    whole = tmp_path / "whole.img"
    assert run("overlay", "squash", top, "--to", whole).exit_code == 0
    assert whole.read_bytes() == content(top)
    result = run("overlay", "squash", top, "--to", whole)
    assert "whole.img exists already: choose another name" in result.output
    assert result.exit_code == 6


def test_a_commit_is_refused_while_others_lie_over_the_base(
    tmp_path: Path, base: Path, top: Path
) -> None:
    other = tmp_path / "other"
    overlays.create(other, str(base))
    write(top, b"c" * 512, 0)
    result = run("overlay", "commit", top)
    assert result.exit_code == 2
    assert f"{other} also lies over {base}" in result.output
    assert run("overlay", "commit", top, "--force").exit_code == 0
    assert base.read_bytes()[:512] == b"c" * 512
    with pytest.raises(BaseChanged):
        content(other)


def test_a_commit_that_cannot_end(base: Path, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(top, b"c" * 4096, 8192)
    before = content(top)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "pwrite", full)
        result = run("overlay", "commit", top)
    assert (result.exit_code, "No space left on device" in result.output) == (1, True)
    assert overlays.info(top).committing
    for call in (lambda: content(top), lambda: overlays.squash(top)):
        with pytest.raises(ValueError, match="has not ended: run `pyublk overlay commit"):
            call()
    overlays.rebase(top, str(base), trust="everything")  # a way out
    assert content(top) == before
    overlays.commit(top)
    assert base.read_bytes() == before


def test_a_base_changed_in_the_middle_of_a_commit(
    base: Path, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(top, b"c" * 4096, 8192)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "flush", full)
        assert run("overlay", "commit", top).exit_code == 1
    with open(base, "r+b") as file:
        file.seek(SIZE - 4096)
        file.write(b"meanwhile")
    result = run("overlay", "commit", top)
    assert result.exit_code == 1
    assert f"was changed since a commit of {top} into it was begun" in result.output


def test_info_and_diff(base: Path, top: Path) -> None:
    write(top, b"c" * 4096, 8192)
    write(top, base.read_bytes()[:512], 0)  # the same as below
    assert overlays.diff(top) == [(0, 4096), (8192, 4096)]
    assert overlays.diff(top, content=True) == [(8192, 4096)]
    told = json.loads(run("overlay", "info", top, "--json").output)
    assert told["present"] == 8192
    assert told["base"] == str(base)
    assert told["state"] == "unchanged"
    assert run("overlay", "info", top).exit_code == 0
    assert json.loads(run("overlay", "diff", top, "--json").output) == [
        {"offset": 0, "length": 4096},
        {"offset": 8192, "length": 4096},
    ]


# ---- what is refused ----


def test_an_overlay_in_use(tmp_path: Path, base: Path, top: Path) -> None:
    with Disk(OverlayFile(top)):
        commands: list[list[str | Path]] = [["commit"], ["diff"], ["rebase", base], ["squash"]]
        for command in commands:
            result = run("overlay", command[0], top, *command[1:])
            assert "top.overlay is in use" in result.output, command
            assert result.exit_code in (2, 6)
            assert len(result.output.splitlines()) == 1
        assert overlays.info(top).state == "unchanged"


def test_a_base_in_use(base: Path, top: Path) -> None:
    with Disk(File(base)):
        with pytest.raises(OSError, match=r"base\.img is in use"):
            content(top)
        result = run("overlay", "commit", top)
        assert (result.exit_code, "base.img is in use" in result.output) == (6, True)
    assert not overlays.info(top).committing


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["create", "new"], "Missing option '--base'", 2),
        (["create", "new", "--base", "none.img"], "none.img does not exist", 1),
        (
            ["create", "new", "--base", "base.img", "--size", "1K"],
            "at least as large as its base",
            2,
        ),
        (["create", "new", "--base", "base.img", "--size", "300001"], "multiple", 2),
        (["create", "new", "--base", "base.img", "--granularity", "1000"], "power of two", 2),
        (["create", "new", "--base", "nonsense:x"], "'nonsense'", 2),
        (["create", "no/new", "--base", "base.img"], "no, where new is to be made", 1),
        (["create", "base.img", "--base", "base.img"], "base.img exists already", 6),
        (["create", "new", "--base", "base.img", "--clone"], "cannot be cloned as new", 1),
        (["info", "base.img"], "base.img is not an overlay, or its map is lost", 1),
        (["info", "none"], "none does not exist", 1),
        (["commit", "base.img"], "base.img is not an overlay, or its map is lost", 1),
        (["squash", "top.overlay"], "which is not an overlay: there is nothing to squash", 2),
        (["rebase", "top.overlay", "none.img"], "none.img does not exist", 1),
        (["rebase", "top.overlay", "base.img", "--moved", "--unsafe"], "exclude each other", 2),
        (["rebase", "top.overlay", "overlay:top.overlay"], "in use", 6),
    ],
)
def test_wrong_parameters(
    tmp_path: Path,
    top: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    result = run("overlay", *arguments)
    if "cannot be cloned" in said and result.exit_code == 0:
        pytest.skip("this file system clones files")
    assert said in result.output
    assert result.exit_code == code
    assert result.output.strip().count("\n") <= 3  # what click shows of the usage
    assert {file.name for file in tmp_path.iterdir()} == names


def test_damaged_files(tmp_path: Path, top: Path) -> None:
    place = MapFile.path_of(top)
    whole = place.read_bytes()
    for number, (damaged, said) in enumerate(
        [
            (whole[:100] + b"#" + whole[101:], "is damaged"),
            (whole[:5000], "is not the map of an overlay"),
            (whole[:9000], "is cut short"),
            (b"", "is not the map of an overlay"),
            (os.urandom(len(whole)), "is not the map of an overlay"),
        ]
    ):
        place.write_bytes(damaged)
        for call in (lambda: content(top), lambda: overlays.info(top), lambda: overlays.diff(top)):
            with pytest.raises(ValueError, match=said):
                call()
        assert run("overlay", "info", top).exit_code == 2, number
    place.write_bytes(whole)
    os.truncate(top, SIZE - 1)
    for call in (lambda: content(top), lambda: overlays.diff(top)):
        with pytest.raises(ValueError, match="was cut"):
            call()
    top.unlink()
    with pytest.raises(FileNotFoundError, match="is lost, and only its map"):
        overlays.diff(top)
    with pytest.raises(ValueError, match="is not there"):
        content(top)


def test_a_map_that_is_no_overlays(top: Path) -> None:
    found = MapFile.read(top)
    MapFile.new(size=found.size, record={"cache": 1}).write(top)
    with pytest.raises(ValueError, match="is not an overlay of this version"):
        content(top)
    assert run("overlay", "info", top).exit_code == 2


def test_a_layer_has_no_base_on_record(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "layer"
    with Disk(Overlay(File(base), file)) as disk:
        disk.pwrite(b"l" * 512, 0)
        disk.flush()
    with pytest.raises(ValueError, match="has no base on record"):
        content(file)
    assert overlays.info(file).state == "none"
    result = run("overlay", "commit", file)
    assert (result.exit_code, "has no base on record" in result.output) == (2, True)
    overlays.rebase(file, str(base), trust="everything")
    assert content(file) == b"l" * 512 + base.read_bytes()[512:]


def test_without_the_right_to_write_the_base(base: Path, top: Path) -> None:
    """A base that everybody may read is enough."""
    code = (
        "import os, sys\n"
        "from pyublk.targets import OverlayFile; from pyublk.testing import Disk\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "with Disk(OverlayFile(sys.argv[1])) as disk: disk.pwrite(bytes(512), 0)\n"
    )
    if os.getuid():
        pytest.skip("needs root, to be somebody else")
    base.chmod(0o444)
    directory = base.parent
    os.chown(directory, 65534, 65534)
    for file in (top, MapFile.path_of(top)):
        os.chown(file, 65534, 65534)
    for parent in (directory, *directory.parents):
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o005)
    done = subprocess.run(
        [sys.executable, "-c", code, top], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ---- maps ----


def test_runs_of_random_maps() -> None:
    chosen = random.Random(1)
    for blocks in (1, 7, 8, 9, 64, 300):
        for density in (0.0, 0.1, 0.5, 0.9, 1.0):
            size = blocks * 4096 - chosen.choice([0, 512])
            has = [chosen.random() < density for _ in range(blocks)]
            made = MapFile.new(size=size)
            for block, one in enumerate(has):
                if one:
                    made.set_present(block, block + 1)
            bits = made.bits
            found = [False] * blocks
            for offset, length in runs_of(bits, 4096, size):
                for at in range(offset, offset + length, 4096):
                    found[at // 4096] = True
            assert found == has
            own = [*runs_of(bits, 4096, size)]
            rest = [*rest_of(own, size)]
            assert sorted([*own, *rest]) == [*rest_of([], size)] or len(own) + len(rest) > 1
            assert [*common(own, rest)] == []
            assert [*common(own, [(0, size)])] == own
            again = MapFile.new(size=size)
            for offset, length in own:
                again.set_present(offset // 4096, -(-(offset + length) // 4096))
            assert again.bits == bits


def test_runs_in_whole_blocks() -> None:
    assert [*whole_blocks([(100, 10), (200, 8000), (20000, 1)], 4096, 20001)] == [
        (0, 12288),
        (16384, 3617),
    ]
