"""What the tools of a release decide: names, compilers' arguments, what is wrong with a wheel."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.coverage import cython, rooms
from tools.coverage.rooms import Lines
from tools.wheels import building, checking, compiler, debian, targets, trying
from tools.wheels.targets import Target

X86 = Target("3.12", "x86_64")
ARM_WITHOUT_GIL = Target("3.14", "aarch64", gil=False)


def test_names_of_targets() -> None:
    assert X86.suffix == ".cpython-312-x86_64-linux-gnu.so"
    assert X86.triple == "x86_64-linux-gnu.2.17"
    assert ARM_WITHOUT_GIL.suffix == ".cpython-314t-aarch64-linux-gnu.so"
    assert (ARM_WITHOUT_GIL.python_tag, ARM_WITHOUT_GIL.abi_tag) == ("cp314", "cp314t")
    assert len(set(map(str, targets.TARGETS))) == len(targets.TARGETS) == 10


def test_targets_are_chosen_by_words() -> None:
    assert targets.chosen([]) == targets.TARGETS
    assert targets.chosen(["cp312-x86_64"]) == [X86]
    assert {target.machine for target in targets.chosen(["aarch64"])} == {"aarch64"}
    with pytest.raises(ValueError, match="no wheel has 'cp310' in its name: there are cp311-x86"):
        targets.chosen(["cp311", "cp310"])


def test_the_compiler_sees_the_targets_headers_only() -> None:
    given = ["-O2", "-fno-semantic-interposition", "-Isrc", "-I/own", "-c", "a.c", "-o", "a.o"]
    said = compiler.translated(given, ["/target"], "/own")
    assert said == ["-I/target", "-O2", "-Isrc", "-c", "a.c", "-o", "a.o", "-g0"]
    link = ["-shared", "-L/own/lib", "-Wl,-rpath,/own/lib", "a.o", "-Wl,-z,now"]
    assert compiler.translated(link, [], "/own") == ["-shared", "a.o", "-Wl,-z,now", "-Wl,-s"]


READELF = """\
  Machine:                           AArch64
 0x0000000000000001 (NEEDED)             Shared library: [libpthread.so.0]
     3: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND PyList_New
     4: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND pread@GLIBC_2.17 (2)
     5: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND __gmon_start__
  0x0010:   Name: GLIBC_2.17  Flags: none  Version: 2
"""


def test_a_file_that_fits_its_target() -> None:
    assert list(checking.complaints(READELF, ARM_WITHOUT_GIL)) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (READELF.replace("AArch64", "RISC-V"), ["is for RISC-V"]),
        (READELF.replace("GLIBC_2.17", "GLIBC_2.34"), ["needs glibc 2.34"]),
        (READELF.replace("libpthread.so.0", "libssl.so.3"), ["needs libssl.so.3"]),
        (READELF.replace("PyList_New", "gettid"), ["has gettid from nowhere"]),
        (
            READELF + " 0x1d (RUNPATH)            Library runpath: [/root/lib]\n",
            ["looks for libraries in /root/lib"],
        ),
    ],
)
def test_a_file_that_does_not_fit(text: str, told: list[str]) -> None:
    assert list(checking.complaints(text, ARM_WITHOUT_GIL)) == told


def packed(path: Path, names: list[str], owner: str, when: int) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.uname, member.mtime, member.size = owner, when, len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def test_a_source_distribution_depends_on_its_files_alone(tmp_path: Path) -> None:
    one = packed(tmp_path / "one.tar.gz", ["p/a", "p/b"], "anne", 5)
    other = packed(tmp_path / "other.tar.gz", ["p/b", "p/a"], "bert", 7)
    assert one.read_bytes() != other.read_bytes()
    results = []
    for path in (one, other):
        building.repeatable(path, tmp_path / "result", 86400)
        results.append((tmp_path / "result").read_bytes())
    assert results[0] == results[1]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(results[0]))) as archive:
        assert archive.getnames() == ["p/a", "p/b"]
        assert {member.mtime for member in archive} == {86400}


def test_no_compiler_is_left_in_a_path(tmp_path: Path) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("cc", "x86_64-linux-gnu-gcc-12", "ld.bfd", "clang-15", "mkfs", "gccgo-tool"):
        (place / name).touch()
    kept = trying.without_compiler(f"{place}:/nowhere", tmp_path / "programs")
    assert sorted(path.name for path in kept.iterdir()) == ["gccgo-tool", "mkfs"]


GENERATED = """\
  /* "src/pyublk/a.pxi":7
 *     x = y
 */
  __pyx_v_x = __pyx_v_y;
  if (unlikely(!__pyx_v_x)) __PYX_ERR(0, 7, __pyx_L1_error)

  /* "src/pyublk/a.pxi":8
 *     never()
 */
  __pyx_f_never();
  return;
  __pyx_L1_error:;
}
static int unrelated(void) {
  return 1;
""".splitlines()


def test_a_root_whose_packages_are_older_than_merged_directories(tmp_path: Path) -> None:
    for name in (
        "usr/bin/env",
        "usr/lib/arm/libc.so.6",
        "usr/lib/ld.so",
        "lib/arm/libreadline.so.8.2",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "lib/arm/libreadline.so.8").symlink_to("libreadline.so.8.2")
    debian.merge_usr(tmp_path)
    debian.merge_usr(tmp_path)  # changes no more
    assert [(tmp_path / name).readlink() for name in ("bin", "lib")] == [
        Path("usr/bin"),
        Path("usr/lib"),
    ]
    assert not (tmp_path / "sbin").is_symlink()
    assert (tmp_path / "lib/ld.so").read_text() == "usr/lib/ld.so"
    assert (tmp_path / "usr/lib/arm/libc.so.6").exists()
    assert (tmp_path / "usr/lib/arm/libreadline.so.8").read_text() == "lib/arm/libreadline.so.8.2"


def test_a_root_has_users_and_authorities(tmp_path: Path) -> None:
    debian.set_up(tmp_path)  # it has no such packages
    assert list(tmp_path.iterdir()) == []
    for name in (
        "base-passwd/passwd.master",
        "base-passwd/group.master",
        "ca-certificates/mozilla/b.crt",
        "ca-certificates/mozilla/a.crt",
    ):
        file = tmp_path / "usr/share" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{file.name}\n")
    debian.set_up(tmp_path)
    etc = tmp_path / "etc"
    assert [(etc / name).read_text() for name in ("passwd", "group")] == [
        "passwd.master\n",
        "group.master\n",
    ]
    assert (etc / "ssl/certs/ca-certificates.crt").read_text() == "a.crt\nb.crt\n"


def test_generated_lines_become_statements() -> None:
    ran = cython.map_back(GENERATED, {4: 3, 5: 1, 10: 0, 11: 9, 14: 5, 15: 5})
    assert ran == {"src/pyublk/a.pxi": {7: 3, 8: 0}}


def test_a_statement_without_code_is_not_counted() -> None:
    assert cython.map_back(GENERATED, {5: 1}) == {"src/pyublk/a.pxi": {7: 1}}


def test_a_table_of_rooms() -> None:
    files = {
        "src/pyublk/errors.py": Lines(10, 9),
        "src/pyublk/cli/a.py": Lines(3, 0),
        "src/pyublk/cli/b.py": Lines(3, 2),
        "src/pyublk/_binding/io.pxi": Lines(8, 8),
        "src/pyublk/_core/ring.c": Lines(1000, 999),
    }
    lines = [line.split() for line in rooms.table(files)]
    assert lines[1:] == [
        ["C", "_core/", "1000", "999", "99"],
        ["Cython", "_native", "8", "8", "100"],
        ["Python", "cli/", "6", "2", "33"],
        ["Python", "errors", "10", "9", "90"],
        [],
        ["C", "all", "1000", "999", "99"],
        ["Cython", "all", "8", "8", "100"],
        ["Python", "all", "16", "11", "68"],
        ["total", "1024", "1018", "99"],
    ]
    with pytest.raises(ValueError, match="is not a file of the package"):
        rooms.room_of("tests/unit/test_ring.py")
