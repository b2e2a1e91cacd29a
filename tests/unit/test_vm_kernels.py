"""Choosing, unpacking and caching kernels; no network, no guest."""

import fcntl
import gzip
import lzma
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyublk.vm import apt, kernels, modules, vmlinux
from pyublk.vm.decompress import NotDecompressed, decompress
from pyublk.vm.errors import KernelUnavailable

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(payload: bytes, *, protocol: int = 0x20F, sectors: int = 4) -> bytes:
    """Make the part of a bzImage that the boot protocol describes."""
    header = bytearray((sectors + 1) * 512)
    header[0x1F1] = sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, protocol)
    offset = 64
    struct.pack_into("<II", header, 0x248, offset, len(payload))
    return bytes(header) + bytes(offset) + payload + b"what follows"


def raw_zstd(data: bytes) -> bytes:
    """Make a zstd frame of one stored block (RFC 8878), for which no compressor is needed."""
    block = struct.pack("<I", len(data) << 3 | 1)[:3]
    return b"\x28\xb5\x2f\xfd" + b"\xa0" + struct.pack("<I", len(data)) + block + data


def module(*, depends: str = "", aliases: tuple[str, ...] = ()) -> bytes:
    """Make what counts of a kernel module."""
    info = [f"depends={depends}", *(f"alias={alias}" for alias in aliases), "license=GPL"]
    return ELF + b"".join(f"{line}\0".encode() for line in ["", *info])


# --- the mirror -----------------------------------------------------------------------------


def test_the_mirror_is_that_of_the_machines_own_release() -> None:
    targets = [
        "http://security.example/debian-security/|bookworm-security|main|/keys/security.gpg",
        "http://mirror.example/debian/|bookworm|contrib|",
        "http://mirror.example/debian/|bookworm|main|$(SIGNED_BY)",
        "http://other.example/debian/|bookworm|main|",
    ]
    mirror = apt.choose_mirror(targets, "bookworm", "/keys/debian.gpg")
    assert mirror == apt.Mirror("http://mirror.example/debian/", "bookworm", "/keys/debian.gpg")
    assert mirror.sources(["sid"]) == (
        "deb [signed-by=/keys/debian.gpg] http://mirror.example/debian/ sid main\n"
    )


def test_the_keyring_a_source_names_is_used() -> None:
    targets = ["http://mirror.example/debian/|trixie|main|/keys/own.gpg"]
    assert apt.choose_mirror(targets, "trixie", "/keys/debian.gpg").keyring == "/keys/own.gpg"


def test_a_machine_without_a_debian_mirror_is_told_what_to_do() -> None:
    with pytest.raises(KernelUnavailable, match=r"serves Debian's noble.*use --kernel host"):
        apt.choose_mirror(["http://ubuntu.example/|jammy|main|"], "noble", "/keys/debian.gpg")


NAMES = (
    "linux-image-6.12.95+deb12-amd64-unsigned",
    "linux-image-6.12.95+deb12-amd64",
    "linux-image-6.12.95+deb12-amd64-dbg",
    "linux-image-6.12.95+deb12-cloud-amd64",
    "linux-image-6.12.95+deb12-rt-amd64",
    "linux-image-6.12.117+deb13-amd64",
    "linux-image-6.12.117+deb13-arm64",
    "linux-image-6.1.0-28-amd64",
    "linux-image-6.18.9+deb13-amd64",
    "linux-image-6.18.15+deb13-amd64",
    "linux-image-7.2.13+deb14-amd64-unsigned",
    "linux-image-7.3~rc1-amd64",
    "linux-image-amd64",
)


def test_only_generic_released_images_count_and_signed_ones_first() -> None:
    images = apt.parse_images(NAMES, "amd64")
    assert [image.package for image in images] == [
        "linux-image-6.12.95+deb12-amd64",
        "linux-image-6.12.117+deb13-amd64",
        "linux-image-6.18.9+deb13-amd64",
        "linux-image-6.18.15+deb13-amd64",
        "linux-image-7.2.13+deb14-amd64-unsigned",
    ]
    assert images[-1].release == "7.2.13+deb14-amd64"


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("6.12", "6.12.117+deb13-amd64"),
        ("6.18", "6.18.15+deb13-amd64"),
        ("latest", "7.2.13+deb14-amd64"),
    ],
)
def test_the_newest_of_a_series_is_chosen(name: str, release: str) -> None:
    assert apt.choose_image(apt.parse_images(NAMES, "amd64"), name).release == release


@pytest.mark.parametrize("name", ["6.1", "6.19"])
def test_a_series_that_is_not_there_lists_those_that_are(name: str) -> None:
    with pytest.raises(KernelUnavailable, match=rf"no kernel {name}; it has 6\.12, 6\.18, 7\.2$"):
        apt.choose_image(apt.parse_images(NAMES, "amd64"), name)


def test_a_point_release_of_debian_is_newer() -> None:
    names = ["linux-image-6.12.90+deb12.1-amd64", "linux-image-6.12.90+deb12-amd64"]
    assert apt.parse_images(names, "amd64")[-1].release == "6.12.90+deb12.1-amd64"


# --- the image ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(gzip.compress(ELF), id="gzip"),
        pytest.param(lzma.compress(ELF) + b"size", id="xz"),
        pytest.param(lzma.compress(ELF, format=lzma.FORMAT_ALONE) + b"size", id="lzma"),
        pytest.param(ELF + b"size", id="none"),
    ],
)
def test_the_kernel_is_taken_out_of_its_image(payload: bytes) -> None:
    assert vmlinux.extract(bzimage(payload)) == ELF


@pytest.mark.skipif(
    not Path("/usr/lib/apt/apt-helper").exists(), reason="apt-helper is not installed"
)
def test_zstd_is_undone_by_apt() -> None:
    assert vmlinux.extract(bzimage(raw_zstd(ELF) + b"size")) == ELF


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(4096), id="no boot protocol"),
        pytest.param(bzimage(gzip.compress(ELF), protocol=0x207), id="old protocol"),
        pytest.param(bzimage(gzip.compress(b"no kernel")), id="not ELF"),
        pytest.param(bzimage(lzma.compress(ELF)[:-64]), id="cut short"),
        pytest.param(bzimage(b"\x02\x21LZ4 data"), id="unknown compression"),
    ],
)
def test_an_image_that_cannot_be_unpacked_is_left_to_boot_itself(image: bytes) -> None:
    assert vmlinux.extract(image) is None


@pytest.mark.parametrize(
    "damage", [b"\x1f\x8bnonsense", lzma.compress(ELF)[:100], b"nothing known"]
)
def test_damaged_data_is_an_error(damage: bytes) -> None:
    with pytest.raises(NotDecompressed):
        decompress(damage)


# --- modules --------------------------------------------------------------------------------


def tree(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return directory


def test_modules_are_installed_with_all_they_need_and_an_index(tmp_path: Path) -> None:
    source = tree(
        tmp_path / "source",
        {
            "fs/9p/9p.ko.xz": module(depends="9pnet,netfs", aliases=("fs-9p",)),
            "net/9p/9pnet.ko.xz": module(),
            "fs/netfs/netfs.ko": module(depends="far-away"),
            "drivers/gpu/far-away.ko.xz": module(aliases=("pci:*",)),
            "drivers/gpu/unwanted.ko.xz": module(),
        },
    )
    installed = modules.install(source, tmp_path / "target")
    assert sorted(installed) == ["9p", "9pnet", "far_away", "netfs"]
    assert (tmp_path / "target/kernel/fs/9p/9p.ko").read_bytes().startswith(b"\x7fELF")
    index = (tmp_path / "target/modules.dep").read_text().splitlines()
    assert "kernel/fs/netfs/netfs.ko: kernel/drivers/gpu/far-away.ko" in index
    aliases = (tmp_path / "target/modules.alias").read_text().splitlines()
    assert sorted(aliases) == ["alias fs-9p 9p", "alias pci:* far_away"]
    order = [m.name for m in modules.in_order(modules.read_index(tmp_path / "target"), ["9p"])]
    assert order[-1] == "9p"
    assert order.index("far_away") < order.index("netfs")
    assert sorted(order) == ["9p", "9pnet", "far_away", "netfs"]


def test_order_of_loading() -> None:
    made = {
        name: modules.Module(f"kernel/{name}.ko", needs, ())
        for name, needs in {
            "top": ("left", "right"),
            "left": ("bottom",),
            "right": ("bottom", "built_in"),
            "bottom": (),
            "loop_a": ("loop_b",),
            "loop_b": ("loop_a",),
        }.items()
    }
    names = [found.name for found in modules.in_order(made, ["top", "built_in", "left"])]
    assert names == ["bottom", "left", "right", "top"]
    assert len(modules.in_order(made, ["loop_a"])) == 2


def test_a_damaged_module_is_named(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"fs/good.ko": module()})
    (source / "kernel/fs/bad.ko.xz").write_bytes(b"\xfd7zXZ\0nonsense")
    with pytest.raises(KernelUnavailable, match=r"module kernel/fs/bad\.ko\.xz cannot be read"):
        modules.install(source, tmp_path / "target")


# --- the cache ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "cache/pyublk/kernels"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes this machine seem to have installed a kernel with one module."""

    def install(name: str) -> None:
        source = tree(tmp_path / "lib", {f"drivers/block/{name}.ko.xz": module()})
        image = tmp_path / "vmlinuz"
        image.write_bytes(bzimage(gzip.compress(ELF)))
        monkeypatch.setattr(
            kernels, "host_files", lambda release: (image, source) if release else None
        )

    return install


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernels.cache_directory() == Path("/somewhere/pyublk")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert kernels.cache_directory() == Path("/home/someone/.cache/pyublk")


def test_the_hosts_kernel_is_stored_once(cache: Path, host: Callable[[str], None]) -> None:
    host("ublk_drv")
    kernel = kernels.find_kernel("host")
    assert kernel.image.name == "vmlinux"
    assert kernel.image.read_bytes() == ELF
    assert (kernel.modules / "kernel/drivers/block/ublk_drv.ko").exists()
    assert sorted(path.name for path in cache.iterdir()) == [".lock", kernel.release, "host"]
    before = kernel.image.stat().st_ino
    assert kernels.find_kernel("host").image.stat().st_ino == before
    assert kernels.find_kernel("host", refresh=True).image.stat().st_ino != before


def test_a_kernel_without_ublk_is_refused_and_leaves_nothing(
    cache: Path, host: Callable[[str], None]
) -> None:
    host("null_blk")
    with pytest.raises(KernelUnavailable, match=r"has no ublk driver.*choose another"):
        kernels.find_kernel("host")
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_host_without_its_kernels_files_is_told_which(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.platform, "release", lambda: "0.0.0-nowhere")
    with pytest.raises(KernelUnavailable, match=r"/boot/vmlinuz-0\.0\.0-nowhere is not there"):
        kernels.find_kernel("host")


@pytest.mark.skipif(not Path("/usr/bin/apt-get").exists(), reason="apt is not installed")
def test_a_failed_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = apt.Mirror(f"file:{cache}/no-mirror", "bookworm", "/nowhere.gpg")
    monkeypatch.setattr(kernels.apt, "machine_mirror", lambda: nowhere)
    with pytest.raises(KernelUnavailable, match=r"mirror lists no kernels; apt says: .+"):
        kernels.find_kernel("latest")
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.skipif(not Path("/usr/bin/apt-get").exists(), reason="apt is not installed")
def test_a_package_that_cannot_be_downloaded_says_what_apt_said(tmp_path: Path) -> None:
    archive = apt.Apt(tmp_path / "apt", apt.Mirror("file:/nowhere", "bookworm", "/nowhere.gpg"))
    with pytest.raises(KernelUnavailable, match=r"could not download.*no-such-package"):
        archive.download(["no-such-package"], tmp_path, kernels.quiet)


@pytest.mark.skipif(not Path("/usr/bin/dpkg-deb").exists(), reason="dpkg is not installed")
def test_a_partial_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.deb").write_bytes(b"!<arch>\ndebian-binary")
    with pytest.raises(KernelUnavailable, match=r"cut\.deb does not unpack"):
        apt.unpack(tmp_path / "cut.deb", tmp_path / "root")


def test_what_a_killed_fetch_left_is_removed(cache: Path, host: Callable[[str], None]) -> None:
    host("ublk_drv")
    (cache / "partial-killed").mkdir()
    (cache / "partial-killed/vmlinux").write_bytes(b"half")
    kernels.find_kernel("host")
    assert not (cache / "partial-killed").exists()


def test_two_fetches_wait_for_each_other(cache: Path, host: Callable[[str], None]) -> None:
    host("ublk_drv")
    waits = threading.Event()
    found: list[kernels.Kernel] = []

    def progress(what: str, _fraction: float | None) -> None:
        if what.startswith("waiting for another"):
            waits.set()

    def fetch() -> None:
        found.append(kernels.find_kernel("host", progress=progress))

    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=fetch)
        second.start()
        assert waits.wait(20)
        assert not found
    second.join(20)
    assert found[0].image.exists()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelUnavailable, match=r"kernel cache .*file/pyublk/kernels cannot be"):
        kernels.find_kernel("latest")


@pytest.mark.parametrize("name", ["newest", "6", "6.12.1", "../6.12", ""])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(KernelUnavailable, match="give latest, host, or a series such as"):
        kernels.find_kernel(name)
