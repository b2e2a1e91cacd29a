"""The target rbd on a real cluster: `./run ceph`."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest

from pyublk.targets.rbd import Rbd
from pyublk.testing import Disk

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    if cluster.missing():
        pytest.fail(f"{', '.join(cluster.missing())} are not installed: use ./run ceph")
    folder = tmp_path_factory.mktemp("ceph")
    cluster.use_debians_binding(folder / "binding")
    with cluster.Cluster(folder) as running:
        running.rbd("create", "--size", "64M", "rbd/img")
        yield running


def rbd(ceph: cluster.Cluster, image: str = "rbd/img", **options: object) -> Rbd:
    return Rbd(image, conf=ceph.conf, **options)  # type: ignore[arg-type]


def test_what_is_written_is_read_and_kept(ceph: cluster.Cluster) -> None:
    with Disk(rbd(ceph), depth=8) as disk:
        assert disk.size == 64 << 20
        assert disk.params.basic.volatile_cache
        assert disk.params.basic.io_opt == 4 << 20
        disk.pwrite(b"a" * (1 << 20), 4096)
        disk.pwrite(b"b" * 4096, 8192, fua=True)
        disk.write_zeroes(65536, 65536)
        disk.write_zeroes(131072, 4096, unmap=False)
        disk.flush()
        assert disk.pread(4096, 4096) == b"a" * 4096
        assert disk.pread(4096, 8192) == b"b" * 4096
        assert disk.pread(8192, 65536) == bytes(8192)
        disk.pwrite(b"c" * (4 << 20), 32 << 20)
        disk.discard(32 << 20, 4 << 20)
        assert disk.pread(4 << 20, 32 << 20) == bytes(4 << 20)
    with Disk(rbd(ceph, cache=False, read_only=True)) as disk:
        assert disk.pread(4096, 8192) == b"b" * 4096
        assert disk.params.basic.read_only


def test_a_snapshot_stays(ceph: cluster.Cluster) -> None:
    with Disk(rbd(ceph)) as disk:
        disk.pwrite(b"1" * 4096, 0, fua=True)
    ceph.rbd("snap", "create", "rbd/img@then")
    with Disk(rbd(ceph)) as disk:
        disk.pwrite(b"2" * 4096, 0, fua=True)
        status = disk.target.status()
        assert status is not None
        assert status["snapshots"] == ["then"]
    target = rbd(ceph, "rbd/img@then")
    with Disk(target) as disk:
        assert disk.params.basic.read_only
        assert disk.pread(4096, 0) == b"1" * 4096
        before = target.identity()
    with Disk(target) as disk:
        assert target.identity() == before


def test_an_exclusive_lock_keeps_others_out(ceph: cluster.Cluster) -> None:
    with Disk(rbd(ceph, exclusive=True)) as disk:
        disk.pwrite(b"x" * 4096, 0)
        with pytest.raises(OSError, match="exclusive lock of rbd/img is held by another client"):
            Disk(rbd(ceph, exclusive=True)).open()
        disk.pwrite(b"y" * 4096, 0, fua=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rbd/none", "the image rbd/none does not exist"),
        ("none/img", "the pool none does not exist"),
        ("rbd/img@none", "the image rbd/img@none does not exist"),
        ("rbd/space/img", "the image rbd/space/img does not exist"),
    ],
)
def test_what_does_not_exist(ceph: cluster.Cluster, name: str, said: str) -> None:
    with pytest.raises(FileNotFoundError, match=said):
        Disk(rbd(ceph, name)).open()


def test_a_cluster_that_dies_and_comes_back(ceph: cluster.Cluster) -> None:
    target = rbd(ceph, cache=False, timeout=5.0)
    with Disk(target) as disk:
        disk.pwrite(b"before".ljust(4096), 0)
        ceph.kill_osd()
        began = time.monotonic()
        with pytest.raises(OSError, match="WRITE at 4096") as failure:
            disk.pwrite(b"lost?".ljust(4096), 4096)
        assert failure.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - began < 60
        ceph.start_osd()
        until = time.monotonic() + 60
        while True:
            try:
                disk.pwrite(b"after".ljust(4096), 0, fua=True)
                break
            except OSError:
                assert time.monotonic() < until
        assert disk.pread(4096, 0) == b"after".ljust(4096)


def test_a_stop_does_not_wait_for_a_dead_cluster(ceph: cluster.Cluster) -> None:
    disk = Disk(rbd(ceph, timeout=3.0))
    disk.open()
    disk.pwrite(b"in librbd's cache".ljust(4096), 0)
    ceph.kill_osd()
    began = time.monotonic()
    disk.close()
    assert time.monotonic() - began < 60
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"did not answer|does not answer"):
        Disk(rbd(ceph, timeout=3.0)).open()
    assert time.monotonic() - began < 60


def test_no_cluster(tmp_path: Path, ceph: cluster.Cluster) -> None:
    with pytest.raises(OSError, match="there is no configuration or key of a Ceph cluster"):
        Disk(Rbd("rbd/img", conf=tmp_path / "none.conf")).open()
