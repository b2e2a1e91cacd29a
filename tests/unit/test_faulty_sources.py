# SPDX-License-Identifier: MIT
"""Disks over servers that answer late, wrongly or not at all: `s3`, and overlays and caches over
`url`. Within the budget nobody notices; past it there is one error, and no wrong byte, ever."""

import errno
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_stores import SmallS3, use_endpoint
from web_server import FAULTS, WebServer

from pyublk.layers.cache import Cache
from pyublk.layers.overlay import Overlay
from pyublk.layers.overlay_record import BaseChanged
from pyublk.layers.presence import PresenceLayer
from pyublk.target import Target
from pyublk.targets.file import File
from pyublk.targets.s3 import S3
from pyublk.targets.url import Url
from pyublk.testing import Disk

SIZE = 1 << 20
CHUNK = 64 << 10
#: Where a read is of a part of a chunk, by a range: not the beginning of one.
PART = 3 * CHUNK + 8192
CONTENT = random.Random(1).randbytes(SIZE)
STATUSES = [408, 429, 500, 502, 503, 504]

# ---- s3 ----


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    with SmallS3() as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


def objects(retry_for: float = 10.0, **options: Any) -> S3:
    """It keeps nothing that was read, and fetches nothing ahead."""
    few = {"chunk_size": CHUNK, "cache": 0, "ahead": 0, "uploads": 1, "timeout": 1.0}
    return S3("bucket/disk", size=SIZE, retry_for=retry_for, **{**few, **options})


@pytest.mark.parametrize("fault", [*STATUSES, "cut", "reset", "late", "silent", "elsewhere"])
def test_what_passes_is_asked_again_of_an_object_store(s3: SmallS3, fault: str | int) -> None:
    s3.silence = 1.5
    with Disk(objects()) as disk:
        disk.pwrite(CONTENT, 0)
        s3.faults = [fault] * 2  # of PUTs
        disk.flush()
        assert s3.faults == []
    with Disk(objects()) as disk:
        assert disk.pread(4096, 9 * CHUNK) == CONTENT[9 * CHUNK :][:4096]  # and the map
        s3.faults = [fault] * 2  # of GETs of a part
        assert disk.pread(4096, PART) == CONTENT[PART : PART + 4096]
        assert s3.faults == []
        assert disk.pread(SIZE, 0) == CONTENT


def test_a_short_answer_of_an_object_store_is_never_taken_for_all(s3: SmallS3) -> None:
    """Of a part it is asked again; of a whole chunk it cannot be told from damage."""
    with Disk(objects()) as disk:
        disk.pwrite(CONTENT, 0)
    with Disk(objects()) as disk:
        assert disk.pread(4096, 9 * CHUNK) == CONTENT[9 * CHUNK :][:4096]
        s3.faults = ["short"]
        assert disk.pread(4096, PART) == CONTENT[PART : PART + 4096]
        assert s3.faults == []
        s3.always = "short"
        with pytest.raises(OSError, match="READ at 65536 failed"):
            disk.pread(CHUNK, CHUNK)
        s3.always = None
        assert disk.pread(SIZE, 0) == CONTENT


@pytest.mark.parametrize("fault", [503, "reset", "silent", "cut"])
def test_past_the_budget_of_an_object_store_nothing_is_lost(
    s3: SmallS3, fault: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    with Disk(objects(retry_for=0.3)) as disk:
        disk.pwrite(CONTENT, 0)
        disk.flush()
        changed = bytes(8192) + CONTENT[8192:]
        disk.pwrite(bytes(8192), 0)
        s3.always = fault
        if fault != "cut":  # an answer without a body cannot be
            with pytest.raises(TimeoutError):
                disk.flush()
        with pytest.raises(TimeoutError):
            disk.pread(4096, 5 * CHUNK)
        assert disk.pread(8192, 0) == bytes(8192), "what was written is still there"
        s3.always = None
        disk.flush()
        assert disk.pread(SIZE, 0) == changed
    with Disk(objects()) as disk:
        assert disk.pread(SIZE, 0) == changed
    told = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert [one for one in told if "given up (retry_for says how long to try)" in one][1:] == []


@pytest.mark.parametrize("fault", [400, 403, 416])
def test_what_lasts_is_an_error_at_once(s3: SmallS3, fault: int) -> None:
    with Disk(objects(retry_for=60)) as disk:
        disk.pwrite(CONTENT, 0)
        disk.flush()
        s3.always = fault
        with pytest.raises(OSError, match="READ at 0 failed"):
            disk.pread(4096, 0)
        s3.always = None
        assert disk.pread(SIZE, 0) == CONTENT


# ---- layers over url ----


def overlay(url: Url, place: Path) -> Target:
    return Overlay(url, place / "top")


def cache(url: Url, place: Path) -> Target:
    return Cache(url, place / "kept", readahead=0)


def both(url: Url, place: Path) -> Target:
    return Overlay(cache(url, place), place / "top")


LAYERS = pytest.mark.parametrize("layers", [overlay, cache, both])


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer(CONTENT) as server:
        yield server


@LAYERS
@pytest.mark.parametrize("fault", [500, 503, *sorted(FAULTS - {"silent"})])
def test_layers_wait_for_a_web_server(
    web: WebServer, tmp_path: Path, layers: Callable[[Url, Path], Target], fault: str | int
) -> None:
    with Disk(layers(Url(web.url, retry_for=30, timeout=2), tmp_path)) as disk:
        web.faults = [fault] * 2
        assert disk.pread(4096, 5 * CHUNK) == CONTENT[5 * CHUNK :][:4096]
        web.faults = [fault]
        assert disk.pread(SIZE, 0) == CONTENT


@LAYERS
@pytest.mark.parametrize("fault", [404, 412, 416, 500, "short", "cut", "reset", "elsewhere"])
def test_layers_keep_nothing_of_a_wrong_answer(
    web: WebServer, tmp_path: Path, layers: Callable[[Url, Path], Target], fault: str | int
) -> None:
    """What fails is read when it can be, and what is there is served meanwhile."""
    target = layers(Url(web.url, retry_for=0.2, timeout=2), tmp_path)
    with Disk(target) as disk:
        assert disk.pread(4096, 0) == CONTENT[:4096]
        if layers is not cache:
            disk.pwrite(b"w" * 4096, 2 * CHUNK)
        web.always = fault
        for at in (5 * CHUNK, 9 * CHUNK):
            with pytest.raises(OSError, match=f"READ at {at} failed") as failed:
                disk.pread(4096, at)
            assert failed.value.errno in (errno.EIO, errno.ETIMEDOUT)
        if layers is not cache:
            assert disk.pread(4096, 2 * CHUNK) == b"w" * 4096
        if layers is not overlay:
            assert disk.pread(4096, 0) == CONTENT[:4096]
        web.always = None
        for at in (5 * CHUNK, 9 * CHUNK):
            assert disk.pread(4096, at) == CONTENT[at : at + 4096]


@LAYERS
def test_layers_never_mix_two_files(
    web: WebServer, tmp_path: Path, layers: Callable[[Url, Path], Target]
) -> None:
    """Another ETag half-way: what is not there yet fails, now and when it is served again."""
    with Disk(layers(Url(web.url, retry_for=0.2), tmp_path)) as disk:
        assert disk.pread(CHUNK, 0) == CONTENT[:CHUNK]
        web.content, web.etag = os.urandom(SIZE), '"v2"'
        with pytest.raises(OSError, match="READ at 327680 failed"):
            disk.pread(4096, 5 * CHUNK)
    again = layers(Url(web.url, retry_for=0.2), tmp_path)
    if layers is overlay:
        with pytest.raises(BaseChanged, match="it said of itself"), Disk(again):
            pass
        return
    with Disk(again) as disk:  # without the server, as far as the cache goes
        assert disk.pread(CHUNK, 0) == CONTENT[:CHUNK]
        with pytest.raises(OSError, match="READ at 327680 failed"):
            disk.pread(4096, 5 * CHUNK)


@pytest.mark.parametrize("identity", [None, "the first"])
def test_a_cache_that_fills_is_no_other_base(tmp_path: Path, identity: str | None) -> None:
    class Source(Target):
        def __init__(self) -> None:
            super().__init__(size=SIZE)

        def read(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = CONTENT[offset : offset + len(buffer)]

        def write(self, offset: int, data: memoryview) -> None:
            raise AssertionError("the base of an overlay is only read")

        def identity(self) -> str | None:
            return identity

    for number in range(3):
        kept = Cache(Source(), tmp_path / "kept", readahead=0)
        with Disk(Overlay(kept, tmp_path / "top")) as disk:
            at = number * CHUNK
            assert disk.pread(4096, at + 4096) == CONTENT[at + 4096 : at + 8192]
            disk.pwrite(b"w" * 4096, at)
            disk.flush()
            assert kept.status()["present_bytes"] > number * CHUNK
    with Disk(Overlay(Cache(Source(), tmp_path / "kept"), tmp_path / "top")) as disk:
        assert disk.pread(SIZE, 0)[: 4096 * 2] == b"w" * 4096 + CONTENT[4096:8192]


# ---- files below ----


@pytest.mark.parametrize("kind", [Overlay, Cache, PresenceLayer])
def test_a_file_below_that_is_empty_missing_or_shrinks(
    tmp_path: Path, kind: type[PresenceLayer]
) -> None:
    base = tmp_path / "base"
    with pytest.raises(FileNotFoundError), Disk(kind(File(base), tmp_path / "top")):
        pass
    base.touch()
    with pytest.raises(ValueError, match="has 0 bytes"), Disk(kind(File(base), tmp_path / "top")):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["base"], "nothing half-made is left"
    base.write_bytes(CONTENT)
    with Disk(kind(File(base), tmp_path / "top")) as disk:
        assert disk.pread(4096, 0) == CONTENT[:4096]
        disk.pwrite(b"w" * 4096, 9 * CHUNK)
        os.truncate(base, SIZE // 2)
        with pytest.raises(OSError, match="READ at 786432 failed"):
            disk.pread(4096, 12 * CHUNK)
        assert disk.pread(4096, 9 * CHUNK) == b"w" * 4096
