# SPDX-License-Identifier: MIT
"""`url`: against a web server on loopback that is told to do wrong."""

import errno
import logging
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from web_server import FAULTS, WebServer

from pyublk.errors import ExtraMissing
from pyublk.targets import build, sources
from pyublk.targets.url import Url
from pyublk.testing import Disk

CONTENT = random.Random(1).randbytes(300_000)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer(CONTENT) as server:
        yield server


def quick(server: WebServer, **options: Any) -> Url:
    """A disk of the server's file, which has little patience."""
    return Url(server.url, **{"retry_for": 5.0, "timeout": 2.0, **options})


def refusal(target: Url) -> OSError:
    """What a start raises."""
    with pytest.raises(OSError) as caught, Disk(target):  # noqa: PT011
        pass
    return caught.value


def test_a_file_is_a_disk_filled_up_with_zeroes(server: WebServer) -> None:
    with Disk(quick(server)) as disk:
        assert disk.size == 300_032
        assert disk.params.basic.read_only
        assert disk.pread(disk.size, 0) == CONTENT + bytes(32)
        assert disk.pread(512, 299_520) == CONTENT[299_520:] + bytes(32)
        assert disk.pread(4096, 8192) == CONTENT[8192 : 8192 + 4096]
        with pytest.raises(PermissionError):
            disk.pwrite(bytes(512), 0)


def test_it_is_made_of_text(server: WebServer) -> None:
    for target in (
        sources.from_text(f"url:{server.url}"),
        sources.from_text(server.url),
        build(Url, {"retry_for": "1.5", "pin": "no"}, [server.url]),
    ):
        with Disk(target) as disk:
            assert disk.pread(512, 512) == CONTENT[512:1024]


def test_many_reads_are_under_way_at_once(server: WebServer) -> None:
    """`pyublk add url` asks for no workers: the target brings its own."""
    arrived = threading.Barrier(8, timeout=20)
    plain = server._send

    def send(request: Any, fault: str | None) -> None:
        if request.headers["Range"] != "bytes=0-511":
            arrived.wait()
        plain(request, fault)

    server._send = send  # type: ignore[method-assign]
    with Disk(quick(server, timeout=30), max_io_size=4096) as disk:
        assert disk.pread(8 * 4096, 0) == CONTENT[: 8 * 4096]


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, *sorted(FAULTS - {"slow", "silent"})])
def test_what_passes_is_tried_again(server: WebServer, fault: str | int) -> None:
    target = quick(server, timeout=0.2 if fault == "late" else 2.0)
    with Disk(target) as disk:
        server.faults = [fault, fault]
        assert disk.pread(4096, 4096) == CONTENT[4096:8192]
        assert target.status()["retries"] == 2
        assert target.status()["trouble"] is None


def test_a_slow_answer_is_waited_for(server: WebServer) -> None:
    server.always = "slow"
    target = quick(server, timeout=0.3)
    with Disk(target) as disk:
        assert disk.pread(32768, 0) == CONTENT[:32768]  # which takes twice the time-out
    assert target.status()["retries"] == 0


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (500, "the server answers 500 (Internal Server Error)"),
        ("silent", "it does not answer in time"),
        ("short", "it answered with 2048 bytes of 4096"),
        ("cut", "the connection was cut"),
    ],
)
def test_past_the_budget_there_is_one_sentence(
    server: WebServer, fault: str | int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = quick(server, retry_for=0.4, timeout=0.2)
    with Disk(target) as disk:
        server.always = fault
        for _ in range(2):
            with pytest.raises(TimeoutError) as failed:
                disk.pread(4096, 0)
            assert failed.value.errno == errno.ETIMEDOUT
        server.released.set()
        server.always = None
        assert disk.pread(512, 0) == CONTENT[:512]
    errors = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert errors == [
        f"{server.url}: {why}, for 0.4 seconds: given up (retry_for says how long to try)"
    ]
    others = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert others == [
        f"{server.url}: {why}: trying again for 0.4 seconds",
        f"{server.url} answers again",
    ]


def test_a_server_that_is_killed_and_comes_back_is_waited_for(server: WebServer) -> None:
    with Disk(quick(server, retry_for=20)) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        server.stop()
        back = threading.Timer(0.5, server.start)
        back.start()
        assert disk.pread(8192, 0) == CONTENT[:8192]
        back.join()


def test_one_that_stays_away_is_given_up(server: WebServer) -> None:
    with Disk(quick(server, retry_for=0.3)) as disk:
        server.stop()
        with pytest.raises(TimeoutError):
            disk.pread(8192, 0)


def test_the_end_of_the_disk_ends_retries(server: WebServer) -> None:
    target = quick(server, retry_for=60)
    target.open()
    server.always = 503
    failed: list[int | None] = []

    def read() -> None:
        try:
            target.read(0, memoryview(bytearray(512)))
        except OSError as error:
            failed.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    while target.status()["retries"] < 1:
        pass
    target.close()
    reader.join(20)
    assert failed == [errno.ETIMEDOUT]


# ---- versions ----


@pytest.mark.parametrize("pinned_by", ["etag", "weak", "modified", "ignored"])
def test_a_file_that_changes_fails_its_reads(
    server: WebServer, pinned_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    if pinned_by == "weak":
        server.etag = 'W/"v1"'
    elif pinned_by == "modified":
        server.etag = None
    server.heeds_if_match = pinned_by != "ignored"
    target = quick(server)
    with Disk(target) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        assert target.identity() == {
            "weak": 'W/"v1"',
            "modified": "2026-11-28T20:00:00+00:00 300000",
        }.get(pinned_by, '"v1"')
        server.content = bytes(len(CONTENT))
        if pinned_by == "modified":
            server.modified = "Sat, 28 Nov 2026 20:00:01 GMT"
        else:
            server.etag = (server.etag or "").replace("1", "2")
        for _ in range(2):
            with pytest.raises(OSError, match="READ at 0 failed") as failed:
                disk.pread(512, 0)
            assert failed.value.errno == errno.EIO
    (said,) = (one.message for one in caplog.records if one.levelno == logging.ERROR)
    assert "the file has changed since the disk was started" in said


def test_a_file_that_becomes_shorter_fails_its_reads(server: WebServer) -> None:
    with Disk(quick(server)) as disk:
        server.content = CONTENT[:1000]
        with pytest.raises(OSError, match="READ at 8192 failed") as failed:
            disk.pread(512, 8192)
        assert failed.value.errno == errno.EIO


def test_without_a_version_it_is_refused_unless_told(server: WebServer) -> None:
    server.etag = server.modified = None
    assert "pin=no serves it even so" in str(refusal(quick(server)))
    target = quick(server, pin=False)
    with Disk(target) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        assert target.identity() is None


def test_a_version_can_be_asked_for(server: WebServer) -> None:
    target = quick(server, etag='"v1"')
    with Disk(target) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        assert target.profile().recoverable
    assert not quick(server).recoverable
    server.etag = '"v2"'
    error = refusal(target)
    assert error.errno == errno.ESTALE
    assert str(error).endswith('its ETag is "v2", and "v1" is asked for: it has changed')


# ---- starts that fail ----


@pytest.mark.parametrize(
    ("fault", "number", "why"),
    [
        (404, errno.ENOENT, "there is no such file (404)"),
        (403, errno.EACCES, "the server forbids it (403): it wants other credentials"),
        (401, errno.EACCES, "the server wants credentials (401)"),
        (410, errno.EIO, "the server answers 410 (Gone)"),
        (416, errno.EINVAL, "the file is empty"),
    ],
)
def test_a_refused_start_says_why(server: WebServer, fault: int, number: int, why: str) -> None:
    server.always = fault
    error = refusal(quick(server))
    assert (error.errno, error.strerror) == (number, f"{server.url}: {why}")
    assert server.requests == 1


def test_a_server_without_ranges_is_refused(server: WebServer) -> None:
    server.ranges = False
    assert refusal(quick(server)).strerror == (
        f"{server.url}: the server answers without ranges, so nothing but the whole file can be "
        "had: copy it first"
    )


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")
@pytest.mark.parametrize("length", [1, 512, 300_000])
def test_busybox_serves_it(tmp_path: Path, length: int) -> None:
    """The server of the page, which answers a range of the first byte alone with the whole file."""
    (tmp_path / "disk.img").write_bytes(CONTENT[:length])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["busybox", "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(tmp_path)]
    server = subprocess.Popen(command)
    try:
        with Disk(Url(f"http://127.0.0.1:{port}/disk.img")) as disk:  # waits for its start
            assert disk.pread(disk.size, 0) == CONTENT[:length].ljust(disk.size, b"\0")
            assert str(disk.target.identity()).startswith('"')
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:1/x?secret=1", "http://127.0.0.1:1/x: the connection is refused"),
        ("http://a:b@no.such.invalid/x", "http://no.such.invalid/x: its name cannot be resolved"),
    ],
)
def test_nobody_answers_at_the_start(url: str, why: str) -> None:
    error = refusal(Url(url, retry_for=0.1))
    assert error.strerror == f"{why}, for 0.1 seconds: given up"


def test_a_system_without_certificates_is_told_so(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "/nonexistent")
    with pytest.raises(ValueError, match="has no certificates: install ca-certificates, or name"):
        quick(server).open()


def test_tls_is_spoken_to_a_server_without(server: WebServer) -> None:
    error = refusal(Url(server.url.replace("http", "https"), retry_for=0.1))
    assert str(error.strerror).endswith("it does not speak TLS there")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "ftp://host/x"}, "'ftp://host/x' is not a URL such as https://host/disk.img"),
        ({"url": "disk.img"}, "is not a URL"),
        ({"url": "http://h/x", "read_only": False}, "read-only: lay an overlay over it"),
        ({"url": "http://h/x", "pin": False, "etag": '"1"'}, "pin=no that any will do"),
        ({"url": "http://h/x", "retry_for": -1}, "retry_for must be a number of seconds"),
        ({"url": "http://h/x", "timeout": 0}, "timeout must be a number of seconds above 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Url(**options)


def test_obstore_is_an_extra(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'pyublk\[url\]'"):
        quick(server).open()


# ---- what goes along with requests ----


def test_headers_are_sent(server: WebServer, tmp_path: Any) -> None:
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer abc\n\nX-Two: a: b, c\n")
    for header in (file.read_text(), f"@{file}"):
        server.headers.clear()
        with Disk(quick(server, header=header)) as disk:
            disk.pread(512, 0)
        assert [one["authorization"] for one in server.headers] == ["Bearer abc"] * 2
        assert server.headers[0]["x-two"] == "a: b, c"
    with (
        pytest.raises(ValueError, match="header must have lines such as"),
        Disk(quick(server, header="Bearer abc")),
    ):
        pass


def test_a_user_in_the_url_is_sent_and_not_shown(server: WebServer) -> None:
    target = Url(server.url.replace("//", "//me:secret@") + "?signature=deadbeef")
    with Disk(target) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        assert target.status()["url"] == server.url
    assert server.headers[0]["authorization"].startswith("Basic ")


def test_redirects_are_followed(server: WebServer) -> None:
    server.redirect = server.url.replace("/images/disk.img", "/elsewhere")
    with Disk(quick(server)) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
        server.redirect = server.url
        with pytest.raises(OSError, match="READ at 0 failed"):
            disk.pread(512, 0)


def test_a_proxy_of_the_environment_is_used(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", server.url.partition("/images")[0])
    with Disk(Url("http://far.invalid/disk.img", retry_for=1)) as disk:
        assert disk.pread(512, 0) == CONTENT[:512]
    assert server.headers[0]["host"] == "far.invalid"
