# SPDX-License-Identifier: MIT
"""`s3`: a disk of objects, in stores in memory that are watched, and on servers on loopback."""

import errno
import itertools
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_stores import (
    CHUNK,
    KEYS,
    Put,
    Served,
    WatchedObjects,
    localbucket,
    lost,
    put_bucket,
    state_of,
    store_with,
)
from obstore.store import MemoryStore

from pyublk.cli import main
from pyublk.targets import sources
from pyublk.targets.objects import disks
from pyublk.targets.objects.codec import Codec
from pyublk.targets.objects.failures import Changed, Exists, Failure, Missing
from pyublk.targets.objects.store import Location, Objects
from pyublk.targets.s3 import S3
from pyublk.testing import Disk

SIZE = 8 * CHUNK + 20480  # the last chunk is not whole


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def objects(store: MemoryStore) -> WatchedObjects:
    return WatchedObjects(store)


def content_of(store: Any, **options: Any) -> bytes:
    """What the disk has for whoever opens it now, without writing."""
    with Disk(Served(Objects(store, "bucket/disk"), read_only=True, **options)) as disk:
        return disk.pread(disk.size, 0)


def fill(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


# ---- a disk ----


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_was_flushed_is_there_for_the_next(store: MemoryStore, compression: Any) -> None:
    data = fill(1, 3 * CHUNK)
    with Disk(Served(WatchedObjects(store), size=SIZE, compression=compression)) as disk:
        assert disk.size == SIZE
        assert disk.pread(SIZE, 0) == bytes(SIZE)
        disk.pwrite(data, CHUNK // 2)
        disk.flush()
        assert disk.pread(len(data), CHUNK // 2) == data
    expected = bytes(CHUNK // 2) + data + bytes(SIZE - CHUNK // 2 - len(data))
    assert content_of(store) == expected
    with Disk(Served(WatchedObjects(store))) as disk:
        disk.pwrite(b"x" * 4096, CHUNK)  # the rest of the chunk stays
        assert disk.pread(SIZE, 0) == expected[:CHUNK] + b"x" * 4096 + expected[CHUNK + 4096 :]


def test_zeroes_take_no_objects(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
        disk.flush()
        assert sum("/chunks/" in path for path in state_of(store)) == 9
        disk.pwrite(bytes(CHUNK), 0)
        disk.discard(CHUNK, CHUNK)
        disk.write_zeroes(2 * CHUNK, SIZE - 2 * CHUNK - 4096)
        assert disk.pread(SIZE - 4096, 0) == bytes(SIZE - 4096)
    objects = WatchedObjects(store)
    assert disks.info(objects, "disk").chunks == 1
    disks.clean_up(objects, "disk")
    assert sum("/chunks/" in path for path in state_of(store)) == 1


def test_a_flush_without_writes_asks_nothing(objects: WatchedObjects) -> None:
    with Disk(Served(objects, size=SIZE)) as disk:
        disk.pwrite(b"x" * 4096, 0)
        disk.flush()
        before = len(objects.puts)
        disk.flush()
        assert len(objects.puts) == before


def test_a_part_of_a_chunk_is_fetched_until_reads_go_on(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
    target = Served(WatchedObjects(store), read_only=True)
    with Disk(target) as disk:
        disk.pread(4096, CHUNK + 8192)
        assert target.status()["bytes_fetched"] == 4096
        disk.pread(4096, CHUNK + 12288)
        assert target.status()["bytes_fetched"] == 4096 + CHUNK
        disk.pread(4096, CHUNK + 4096)
        assert target.status()["bytes_fetched"] == 4096 + CHUNK
        assert target.status()["chunk_hits"] == 1


def test_many_readers_of_a_chunk_fetch_it_once(store: MemoryStore) -> None:
    data = fill(1, SIZE)
    with Disk(Served(WatchedObjects(store), size=SIZE, compression="zstd")) as disk:
        disk.pwrite(data, 0)
    target = Served(WatchedObjects(store), read_only=True, ahead=0)
    with Disk(target, max_io_size=4096, depth=32) as disk:
        assert disk.pread(2 * CHUNK, 0) == data[: 2 * CHUNK]
        assert target.status()["fetches"] == 2


def test_sequential_reads_find_their_chunks_fetched(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
    target = Served(WatchedObjects(store), read_only=True, ahead=2)
    target.open()
    for at in range(0, CHUNK + 4096, 4096):
        target.read(at, memoryview(bytearray(4096)))
    while target.status()["fetches"] < 4:  # two that were read, and two ahead
        pass
    target.read(3 * CHUNK, memoryview(bytearray(4096)))
    assert target.status()["bytes_fetched"] == 4 * CHUNK
    target.close()


def test_it_is_resized(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
        disk.resize(CHUNK + 4096)
        disk.flush()
        assert len(content_of(store)) == CHUNK + 4096
        disk.resize(SIZE)
    assert content_of(store) == fill(1, SIZE)[: CHUNK + 4096] + bytes(SIZE - CHUNK - 4096)


def test_a_full_buffer_is_uploaded_early_and_counts_only_when_flushed(store: MemoryStore) -> None:
    target = Served(WatchedObjects(store), size=SIZE, buffer=2 * CHUNK)
    with Disk(target, max_io_size=CHUNK) as disk:
        disk.pwrite(fill(1, SIZE), 0)
        assert target.status()["early_uploads"] >= 5
        assert target.status()["dirty_bytes"] <= 3 * CHUNK
        assert content_of(store) == bytes(SIZE)
        assert disk.pread(SIZE, 0) == fill(1, SIZE)
        disk.flush()
        assert content_of(store) == fill(1, SIZE)


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "discard", "flush", "reopen", "kill"]),
        st.integers(0, SIZE // 4096 - 1),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=_STEPS, compression=st.sampled_from(["none", "zstd"]), buffer=st.sampled_from([0, 1]))
def test_it_is_what_a_model_says(
    steps: list[tuple[str, int, int]], compression: str, buffer: int
) -> None:
    store = MemoryStore()
    options = {"buffer": buffer << 20, "compression": compression, "cache": 2 * CHUNK}
    model, durable = bytearray(SIZE), bytes(SIZE)
    disk = Disk(Served(WatchedObjects(store), size=SIZE, **options))
    disk.open()
    for number, (step, block, count) in enumerate(steps):
        start = block * 4096
        end = min(SIZE, start + count * 4096)
        if step == "write":
            model[start:end] = fill(number, end - start)
            disk.pwrite(bytes(model[start:end]), start)
        elif step == "zero":
            model[start:end] = bytes(end - start)
            disk.write_zeroes(start, end - start)
        elif step == "discard":
            disk.discard(start, end - start)
            first, last = -(-start // CHUNK), SIZE // CHUNK + 1 if end == SIZE else end // CHUNK
            if first < last:
                gone = min(SIZE, last * CHUNK) - first * CHUNK
                model[first * CHUNK : first * CHUNK + gone] = bytes(gone)
        elif step == "flush":
            disk.flush()
            durable = bytes(model)
        elif step == "reopen":
            disk.close()
            durable = bytes(model)
            disk = Disk(Served(WatchedObjects(store), **options))
            disk.open()
        else:  # the process is gone; another one opens the disk
            model[:] = durable
            disk = Disk(Served(WatchedObjects(store), **options))
            disk.open()
        assert disk.pread(SIZE, 0) == model
    assert content_of(store) == durable
    disk.close()


def test_writers_readers_and_flushes_at_once(store: MemoryStore) -> None:
    """Each thread has its own part, in the same chunks; flushes and early uploads go on."""
    target = Served(WatchedObjects(store), size=SIZE, buffer=2 * CHUNK, cache=2 * CHUNK)
    target.open()
    over = threading.Event()
    wrong: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        known = dict.fromkeys(range(number, SIZE // 4096, 4), bytes(4096))
        for _ in range(150):
            block = rng.choice(list(known))
            known[block] = rng.randbytes(16) * 256
            target.write(block * 4096, memoryview(known[block]))
            block, found = rng.choice(list(known)), bytearray(4096)
            target.read(block * 4096, memoryview(found))
            if found != known[block]:
                wrong.append(f"block {block}")
        ends[number] = known

    def flush() -> None:
        while not over.is_set():
            target.flush()

    ends: dict[int, dict[int, bytes]] = {}
    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    flusher = threading.Thread(target=flush)
    for thread in [*workers, flusher]:
        thread.start()
    for thread in workers:
        thread.join()
    over.set()
    flusher.join()
    target.close()
    assert not wrong
    blocks = {block: data for known in ends.values() for block, data in known.items()}
    assert content_of(store) == b"".join(blocks[block] for block in range(SIZE // 4096))


# ---- power cuts: the PUTs of a flush ----


def recorded_flush(
    store: MemoryStore, **options: Any
) -> tuple[dict[str, bytes], list[Put], bytes, bytes]:
    """What the store has at a flush, the PUTs up to the next, and the content at both."""
    objects = WatchedObjects(store)
    target = Served(objects, size=SIZE, **options)
    disk = Disk(target, max_io_size=CHUNK)
    disk.open()
    disk.pwrite(fill(1, SIZE), 0)
    disk.flush()
    before = disk.pread(SIZE, 0)
    left, started = state_of(store), len(objects.puts)
    disk.pwrite(fill(2, 3 * CHUNK), CHUNK // 2)
    disk.pwrite(fill(3, 4096), 6 * CHUNK + 4096)
    disk.discard(5 * CHUNK, CHUNK)
    disk.flush()
    return left, objects.puts[started:], before, disk.pread(SIZE, 0)


def cuts(puts: list[Put]) -> Iterator[tuple[Put, ...]]:
    """What the store may have got by a cut: all up to some PUT; and of the chunks, which are under
    way together, any of them."""
    for count in range(len(puts) + 1):
        yield tuple(puts[:count])
    chunks = [put for put in puts if "/chunks/" in put.path]
    for count in range(len(chunks)):
        yield from itertools.combinations(chunks, count)


@pytest.mark.parametrize("options", [{}, {"buffer": 0}, {"compression": "zstd"}])
def test_a_cut_at_each_put_leaves_the_last_flush_or_the_next(options: dict[str, Any]) -> None:
    left, puts, before, after = recorded_flush(MemoryStore(), **options)
    assert [put.path for put in puts].index("disk/manifest") == len(puts) - 1
    seen = set()
    for landed in cuts(puts):
        state = left | {put.path: put.data for put in landed}
        expected = after if "disk/manifest" in {put.path for put in landed} else before
        survivor = store_with(state)
        assert content_of(survivor) == expected
        # And whoever goes on with it is not troubled by what is left there.
        with Disk(Served(WatchedObjects(survivor))) as disk:
            disk.pwrite(b"next" * 1024, CHUNK)
        assert content_of(survivor) == expected[:CHUNK] + b"next" * 1024 + expected[CHUNK + 4096 :]
        disks.clean_up(WatchedObjects(survivor), "disk")
        assert content_of(survivor) == expected[:CHUNK] + b"next" * 1024 + expected[CHUNK + 4096 :]
        seen.add(expected)
    assert len(seen) == 2


def test_late_puts_of_a_dead_writer_change_nothing() -> None:
    """At each PUT of a flush the writer dies, another opens the disk, and then the rest arrives."""
    for alive in range(8):
        store = MemoryStore()
        first = Served(WatchedObjects(store), size=SIZE)
        first.open()
        first.write(0, memoryview(fill(1, SIZE)))
        first.flush()
        objects = first._given
        assert isinstance(objects, WatchedObjects)
        late: list[Put] = []
        count = itertools.count()

        def before(put: Put) -> None:
            if next(count) >= alive:  # noqa: B023
                late.append(put)  # noqa: B023
                lost(put)

        objects.before = before
        first.write(0, memoryview(fill(2, 4 * CHUNK)))
        expected = fill(1, SIZE)
        try:
            first.flush()
            expected = fill(2, 4 * CHUNK) + expected[4 * CHUNK :]
        except Failure:
            assert late
        second = Disk(Served(WatchedObjects(store)))
        second.open()
        second.pwrite(b"2" * 4096, 2 * CHUNK)
        expected = expected[: 2 * CHUNK] + b"2" * 4096 + expected[2 * CHUNK + 4096 :]
        objects.before = lambda put: None
        for put in late:
            if put.path == "disk/manifest":
                with pytest.raises(Changed):
                    objects.swap(put.path, put.data, put.mode)
            else:
                objects.put(put.path, put.data)
        assert second.pread(SIZE, 0) == expected
        second.close()
        assert content_of(store) == expected


def test_a_flush_that_fails_loses_nothing(objects: WatchedObjects, store: MemoryStore) -> None:
    """At each of its PUTs; the next flush succeeds, with what was written since."""
    with Disk(Served(objects, size=SIZE)) as disk:
        model = bytearray(SIZE)
        for failing in range(7):
            count = itertools.count()
            model[: 4 * CHUNK] = fill(failing, 4 * CHUNK)
            disk.pwrite(bytes(model[: 4 * CHUNK]), 0)
            objects.before = lambda put: lost(put) if next(count) == failing else None  # noqa: B023
            if failing < 6:  # four chunks, a page, the manifest
                with pytest.raises(TimeoutError):
                    disk.flush()
                assert disk.pread(SIZE, 0) == model
            model[2 * CHUNK : 2 * CHUNK + 4096] = b"later" + bytes(4091)
            disk.pwrite(bytes(model[2 * CHUNK : 2 * CHUNK + 4096]), 2 * CHUNK)
            objects.before = lambda put: None
            disk.flush()
            assert disk.pread(SIZE, 0) == model
            assert content_of(store) == model


def test_a_put_whose_answer_is_lost_has_landed(store: MemoryStore) -> None:
    """Its repetition reads as "somebody else has changed it"; so does a flush after it."""
    objects = WatchedObjects(store, retry_for=5)
    with Disk(Served(objects, size=SIZE)) as disk:
        answers = itertools.cycle([lost, lambda put: None])
        objects.after = lambda put: next(answers)(put)
        disk.pwrite(b"1" * 4096, 0)
        disk.flush()
        objects.retrying.budget = 0  # and now no answer at all
        objects.after = lambda put: lost(put) if put.path == "disk/manifest" else None
        disk.pwrite(b"2" * 4096, 0)
        with pytest.raises(TimeoutError):
            disk.flush()
        assert content_of(store)[:4096] == b"2" * 4096
        objects.after = lambda put: None
        disk.pwrite(b"3" * 4096, 8192)
        disk.flush()
        assert content_of(store)[:12288] == b"2" * 4096 + bytes(4096) + b"3" * 4096


def test_a_conflict_that_changed_nothing_is_no_fence(
    objects: WatchedObjects, store: MemoryStore
) -> None:
    """S3 answers 409 to one of two conditional PUTs that meet, though neither may have won."""
    with Disk(Served(objects, size=SIZE)) as disk:
        conflicts = iter([True, True, False])

        def before(put: Put) -> None:
            if put.path == "disk/manifest" and next(conflicts, False):
                raise Changed(errno.ESTALE, "it has changed")

        objects.before = before
        disk.pwrite(b"1" * 4096, 0)
        disk.flush()
        assert content_of(store)[:4096] == b"1" * 4096


def test_a_lost_answer_at_the_start(store: MemoryStore) -> None:
    objects = WatchedObjects(store, retry_for=5)
    answers = itertools.cycle([lost, lambda put: None])
    objects.after = lambda put: next(answers)(put)
    with Disk(Served(objects, size=SIZE)) as disk:
        disk.pwrite(b"1" * 4096, 0)
    assert disks.load(objects, "disk")[0].epoch == 1


# ---- two writers ----


def test_the_first_of_two_writers_is_fenced(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    first = Disk(Served(WatchedObjects(store), size=SIZE, buffer=0), max_io_size=CHUNK)
    first.open()
    first.pwrite(fill(1, SIZE), 0)
    first.flush()
    first.pwrite(b"f" * (4 * CHUNK), 0)  # uploaded early, and in no manifest
    second = Disk(Served(WatchedObjects(store)))
    second.open()
    second.pwrite(b"s" * 4096, CHUNK)
    second.flush()
    expected = bytearray(fill(1, SIZE))
    expected[CHUNK : CHUNK + 4096] = b"s" * 4096
    for call in (first.flush, first.flush, lambda: first.pread(4096, 0),
                 lambda: first.pwrite(bytes(4096), 0)):  # fmt: skip
        with pytest.raises(OSError, match="failed") as failed:
            call()
        assert failed.value.errno == errno.EIO
    first.close()
    assert second.pread(SIZE, 0) == expected
    second.close()
    assert content_of(store) == expected
    (error,) = (one.message for one in caplog.records if one.levelno == logging.ERROR)
    assert "has opened it for writing after this one: nothing more is read or written" in error
    assert any("that one is fenced, if it still runs" in one.message for one in caplog.records)


def test_of_writers_that_open_at_once_one_stays(store: MemoryStore) -> None:
    disks.create(Objects(store, "x"), "disk", size=SIZE, chunk_size=CHUNK)
    targets = [Served(WatchedObjects(store)) for _ in range(6)]
    threads = [threading.Thread(target=target.open) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {target.volume.manifest.epoch for target in targets} == {1, 2, 3, 4, 5, 6}
    flushed = []
    for number, target in enumerate(targets):
        target.write(0, memoryview(bytes([number]) * 4096))
        try:
            target.flush()
            flushed.append(number)
        except Failure:
            continue
    assert [targets[number].volume.manifest.epoch for number in flushed] == [6]
    assert content_of(store)[:4096] == bytes([flushed[0]]) * 4096


def test_a_disk_that_is_removed_is_gone_for_its_writer(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disks.remove(WatchedObjects(store), "disk", force=True)
        disk.pwrite(bytes([1]) * 4096, 0)
        with pytest.raises(OSError, match="failed"):
            disk.flush()


# ---- stores that are not fit ----


def test_a_server_that_ignores_if_match_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bucket").mkdir()
    with localbucket(tmp_path) as endpoint:
        for target in (
            S3("bucket/disk", endpoint=endpoint, size=SIZE),
            S3("bucket/disk", endpoint=endpoint, size=SIZE),
        ):
            with pytest.raises(OSError, match=r"ignores conditions \(If-Match\)"), Disk(target):
                pass
    assert not (tmp_path / "bucket/disk/manifest").exists()


def test_files_can_be_read_only(tmp_path: Path, store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
    for path, data in state_of(store).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    with Disk(S3(f"file://{tmp_path}/disk", read_only=True)) as disk:
        assert disk.pread(SIZE, 0) == fill(1, SIZE)
    with pytest.raises(OSError, match="ignores conditions"), Disk(S3(f"file://{tmp_path}/disk")):
        pass


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server")

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        put_bucket(f"http://{host}:{port}", "bucket")
        yield f"http://{host}:{port}"
    server.stop()


def test_a_real_server(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    options = {"chunk_size": "64K", "compression": "zstd"}
    data = fill(1, SIZE)
    with Disk(sources.from_text("s3:bucket/a/disk", size=SIZE, options=options)) as disk:
        disk.pwrite(data, 0)
        disk.flush()
        second = Disk(S3("s3://bucket/a/disk"))
        second.open()
        disk.pwrite(b"f" * 4096, 0)
        with pytest.raises(OSError, match="FLUSH"):
            disk.flush()
        second.pwrite(b"s" * 4096, 4096)
        second.close()
    with Disk(sources.from_text("s3:bucket/a/disk", read_only=True)) as disk:
        assert disk.pread(SIZE, 0) == data[:4096] + b"s" * 4096 + data[8192:]
        with pytest.raises(PermissionError):
            disk.pwrite(bytes(4096), 0)


# ---- damage ----


def damaged(store: MemoryStore, part: str, data: bytes | None) -> None:
    (path,) = (path for path in state_of(store) if part in path)
    if data is None:
        obstore.delete(store, path)
    else:
        obstore.put(store, path, data)


def flipped(data: bytes, place: int) -> bytes:
    found = bytearray(data)
    found[place] ^= 0x10
    return bytes(found)


@pytest.mark.parametrize(
    ("part", "data", "why"),
    [
        ("/chunks/", None, "there is no such file"),
        ("/chunks/", b"short", "has 5 bytes in place of 65536"),
        ("/map/", None, "there is no such file"),
        ("/map/", b"short", "is not a page of a map"),
        ("/map/", b"pyublkM1" + bytes(4 + 16384), "is a damaged page of a map"),
    ],
)
def test_damage_is_an_error(store: MemoryStore, part: str, data: bytes | None, why: str) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, CHUNK), 0)
    damaged(store, part, data)
    target = Served(WatchedObjects(store), read_only=True)
    with Disk(target) as disk, pytest.raises(OSError, match="READ at 0 failed"):
        disk.pread(4096, 0)
    target.open()
    with pytest.raises(OSError, match=why):
        target.read(0, memoryview(bytearray(CHUNK)))


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda chunk, at=at: flipped(chunk, at) for at in (0, 5, 1000, 40_000, -1)),
        lambda chunk: chunk[:-1],
        lambda chunk: chunk[:1000],
        lambda _: b"",
        lambda _: Codec("zstd", 2 * CHUNK).encode(fill(1, 2 * CHUNK)),
        lambda _: Codec("zstd", 1 << 30).encode(bytes(1 << 30)),
    ],
    ids=["magic", "head", "early", "late", "checksum", "end", "half", "all", "two", "a gibibyte"],
)
def test_a_compressed_chunk_that_is_damaged_is_an_error(
    store: MemoryStore, damage: Callable[[bytes], bytes]
) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE, compression="zstd")) as disk:
        disk.pwrite(fill(1, CHUNK), 0)
    (chunk,) = (data for path, data in state_of(store).items() if "/chunks/" in path)
    damaged(store, "/chunks/", damage(chunk))
    target = Served(WatchedObjects(store), read_only=True)
    target.open()
    with pytest.raises(OSError, match="cannot be decompressed"):
        target.read(0, memoryview(bytearray(4096)))


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (b"", "is not the manifest of a disk"),
        (b"[]", "is not the manifest of a disk"),
        (b'{"format": "pyublk objects 9"}', "has the format 'pyublk objects 9', and"),
        (b'{"format": "pyublk objects 1"}', "is a damaged manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(store: MemoryStore, manifest: bytes, why: str) -> None:
    obstore.put(store, "disk/manifest", manifest)
    with pytest.raises(OSError, match=why), Disk(Served(WatchedObjects(store), size=SIZE)):
        pass


# ---- snapshots, clones, clean-ups ----


def test_snapshots_and_clones(store: MemoryStore) -> None:
    objects = WatchedObjects(store)
    first, second = fill(1, SIZE), fill(2, SIZE)
    with Disk(Served(objects, size=SIZE)) as disk:
        disk.pwrite(first, 0)
        disk.flush()
        disks.take_snapshot(objects, "disk", "one")
        disk.pwrite(second, 0)
    with pytest.raises(Exists, match="exists already"):
        disks.take_snapshot(objects, "disk", "one")
    disks.clone(objects, "disk", "one", "copies/a")
    with pytest.raises(Exists, match="there is a disk 'copies/a' already"):
        disks.clone(objects, "disk", None, "copies/a")
    with Disk(S3("bucket/copies/a", store=store)) as disk:
        disk.pwrite(b"clone" + bytes(4091), 2 * CHUNK)
    changed = first[: 2 * CHUNK] + b"clone" + bytes(4091) + first[2 * CHUNK + 4096 :]
    disks.remove(objects, "disk", "one")
    assert disks.clean_up(objects, "disk") == 0  # the clone needs what the snapshot had
    assert content_of(store) == second
    with Disk(S3("bucket/copies/a", store=store, read_only=True)) as disk:
        assert disk.pread(SIZE, 0) == changed
    disks.clone(objects, "copies/a", None, "copies/b")  # of a clone
    with pytest.raises(Failure, match=r"has 1 clone\(s\)"):
        disks.remove(objects, "disk")
    with pytest.raises(Failure, match=r"has 1 clone\(s\)"):
        disks.remove(objects, "copies/a")
    disks.clean_up(objects, "copies/a")
    with Disk(S3("bucket/copies/b", store=store, read_only=True)) as disk:
        assert disk.pread(SIZE, 0) == changed
    assert sorted(disks.names_below(objects, None)) == ["copies/a", "copies/b", "disk"]
    disks.remove(objects, "copies/b")
    disks.remove(objects, "copies/a")
    assert disks.clean_up(objects, "disk") == 10  # chunks, and a page
    assert content_of(store) == second
    disks.remove(objects, "disk")
    assert state_of(store) == {}


def test_a_snapshot_is_a_disk_that_can_be_restarted(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
    disks.take_snapshot(WatchedObjects(store), "disk", "one")
    target = S3("bucket/disk@one", store=store)
    with Disk(target) as disk:
        assert disk.pread(SIZE, 0) == fill(1, SIZE)
        assert target.profile().recoverable
        assert target.profile().read_only
    assert not S3("bucket/disk", store=store).recoverable
    with (
        pytest.raises(OSError, match="'disk' has no snapshot 'two'"),
        Disk(S3("bucket/disk@two", store=store)),
    ):
        pass


def test_a_clean_up_spares_what_the_next_flush_needs(store: MemoryStore) -> None:
    target = Served(WatchedObjects(store), size=SIZE, buffer=0)
    with Disk(target, max_io_size=CHUNK) as disk:
        disk.pwrite(fill(1, SIZE), 0)
        disk.flush()
        disk.pwrite(fill(2, SIZE), 0)
        assert target.status()["early_uploads"] >= 10
        disks.clean_up(WatchedObjects(store), "disk")
        disk.flush()
        assert disks.clean_up(WatchedObjects(store), "disk") >= 10
        assert disk.pread(SIZE, 0) == fill(2, SIZE)
    assert content_of(store) == fill(2, SIZE)


def test_a_snapshot_that_a_clean_up_may_have_missed_is_not_made(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = WatchedObjects(store)
    with Disk(Served(objects, size=SIZE)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
    plain = disks.load

    def load(*args: Any) -> Any:
        found = plain(*args)
        monkeypatch.setattr(disks, "load", plain)
        disks.clean_up(WatchedObjects(store), "disk")
        return found

    monkeypatch.setattr(disks, "load", load)
    with pytest.raises(Changed, match="was cleaned up meanwhile"):
        disks.take_snapshot(objects, "disk", "one")
    assert disks.snapshots_of(objects, "disk") == []
    obstore.put(store, "disk/gc", b'{"nonce": "1", "since": "2026"}')
    with pytest.raises(Changed, match="is being cleaned up since 2026"):
        disks.take_snapshot(objects, "disk", "one")
    with pytest.raises(Changed, match="use --force"):
        disks.clean_up(objects, "disk")
    disks.clean_up(objects, "disk", force=True)
    disks.take_snapshot(objects, "disk", "one")


def test_removal_asks_when_something_would_be_lost(store: MemoryStore) -> None:
    objects = WatchedObjects(store)
    with Disk(Served(objects, size=SIZE)), pytest.raises(Failure, match="was opened for writing"):
        disks.remove(objects, "disk")
    disks.take_snapshot(objects, "disk", "one")
    with pytest.raises(Failure, match="has the snapshots one: --force"):
        disks.remove(objects, "disk")
    disks.remove(objects, "disk", force=True)
    with pytest.raises(Missing, match="there is no disk 'disk'"):
        disks.remove(objects, "disk")
    assert state_of(store) == {}


# ---- what is asked for wrongly ----


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("bucket/disk", ("s3://bucket", "disk", None)),
        ("bucket/a/b@snap", ("s3://bucket", "a/b", "snap")),
        ("s3://bucket/disk", ("s3://bucket", "disk", None)),
        ("gs://bucket/disk", ("gs://bucket", "disk", None)),
        ("file:///srv/disks/one", ("file:///srv/disks", "one", None)),
    ],
)
def test_places(text: str, parsed: tuple[str, str, str | None]) -> None:
    found = Location.parse(text)
    assert (found.store, found.name, found.snapshot) == parsed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"location": "bucket"}, "'bucket' is not a disk in a store: write bucket/name"),
        ({"location": "bucket/../x"}, "is not a disk in a store"),
        ({"location": "ftp://bucket/x"}, "is not a disk in a store"),
        ({"location": "bucket/x@"}, "'' is not a snapshot's name"),
        ({"location": "bucket/x@y", "size": 4096}, "is a snapshot, which has the size"),
        ({"location": "bucket/x", "uploads": 0}, "uploads must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        S3(**options)


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({}, FileNotFoundError, "there is no disk bucket/disk: give a size to make it"),
        ({"size": 1000}, ValueError, "size must be a multiple of 512 bytes"),
        ({"size": SIZE, "chunk_size": 100000}, ValueError, "must be a power of two from 64KiB to"),
        ({"size": SIZE, "compression": "lz4"}, ValueError, "must be one of none, zstd"),
        ({"size": 512}, ValueError, "no multiple of the block size, 4096"),
    ],
)
def test_a_start_that_cannot_be(
    store: MemoryStore, options: dict[str, Any], kind: type[Exception], why: str
) -> None:
    with pytest.raises(kind, match=why), Disk(Served(WatchedObjects(store), **options)):
        pass


def test_another_size_is_refused(store: MemoryStore) -> None:
    with Disk(Served(WatchedObjects(store), size=SIZE)):
        pass
    with (
        pytest.raises(ValueError, match="has 544768 bytes, not 1048576"),
        Disk(Served(WatchedObjects(store), size=1 << 20)),
    ):
        pass


# ---- the command ----


def test_the_command(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["s3", *words])
        assert done.exit_code == code, done.output
        return done.output

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    put_bucket(moto, "shelf")
    run("create", "shelf/a/base", "--size", "1G", "--compression", "zstd")
    with Disk(S3("shelf/a/base")) as disk:
        disk.pwrite(fill(1, 8192), 0)
    run("snapshot", "shelf/a/base@one")
    run("clone", "shelf/a/base@one", "shelf/copy")
    (base,) = json.loads(run("list", "shelf/a", "--json"))
    assert base == json.loads(run("info", "shelf/a/base", "--json"))
    assert (base["size"], base["chunks"], base["snapshots"]) == (1 << 30, 1, ["one"])
    assert [line.split() for line in run("list", "shelf").splitlines()] == [
        ["NAME", "SIZE", "DATA", "SNAPSHOTS", "OPEN", "BY"],
        ["a/base", "1.00GiB", "4.00MiB", "1", "-"],
        ["copy", "1.00GiB", "4.00MiB", "0", "-"],
    ]
    assert "clone of:    a/base" in run("info", "shelf/copy")
    assert json.loads(run("gc", "shelf/a/base", "--json")) == {"deleted": 0}
    assert "has 1 clone(s): remove these first" in run("rm", "shelf/a/base", code=6)
    run("rm", "shelf/copy")
    run("rm", "shelf/a/base@one")
    run("rm", "shelf/a/base")
    assert json.loads(run("list", "shelf", "--json")) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["info", "bucket/none"], 1, "bucket/none: there is no disk 'none'"),
        (["create", "nowhere/x", "--size", "1G"], 1, "nowhere/x: there is no such bucket"),
        (["list", "nowhere"], 1, "there is no such bucket"),
        (["info", "bucket"], 2, "'bucket' is not a disk in a store: write bucket/name"),
        (["create", "bucket/x@y", "--size", "1G"], 2, "is a snapshot, and a disk is asked for"),
        (["create", "bucket/x", "--size", "1000"], 2, "size must be a multiple of 512 bytes"),
        (["create", "bucket/x", "--size", "1G", "--chunk-size", "3M"], 2, "a power of two from"),
        (["snapshot", "bucket/x"], 2, "write DISK@NAME"),
        (["clone", "bucket/x", "other/y"], 2, "other/y is in another bucket than bucket/x"),
        (["list", "/"], 2, "'/' is not a bucket"),
        (["info", "gs://b/x", "--region", "r"], 2, "region and anonymous are of S3, and not of gs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_sentence(
    moto: str, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    done = CliRunner().invoke(main, ["s3", *words])
    assert said in " ".join(done.output.split())
    assert done.exit_code == code
    assert "Traceback" not in done.output
