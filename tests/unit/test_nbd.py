"""Disks from NBD servers: one in this process that can do everything wrong, and real ones."""

import errno
import logging
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd_server
import pytest
from nbd_server import FakeServer, Request, has, header, nbdkit, running

from pyublk._native import ConnectedQueue
from pyublk.layers import Layer
from pyublk.targets import resolve
from pyublk.targets.nbd import Nbd, keeper
from pyublk.targets.nbd.uri import Place, parse
from pyublk.targets.sources import from_text
from pyublk.testing import Disk
from pyublk.uapi import Op

SIZE = 1 << 20
needs_nbdkit = pytest.mark.skipif(not has("nbdkit"), reason="nbdkit is not installed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def server(path: Path) -> Iterator[FakeServer]:
    with FakeServer(path, SIZE) as server:
        yield server


def target(path: Path, **options: object) -> Nbd:
    return Nbd(f"unix:{path}", **options)  # type: ignore[arg-type]


def once(say: Callable[[Request], bytes | None]) -> Callable[[Request], bytes | None]:
    """Says that for the first request, and nothing of its own for the others."""
    left = [say]
    return lambda request: left.pop()(request) if left else None


def raise_eof(request: Request) -> bytes:
    raise EOFError


# ---- places ----


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("nbd://host", Place("host")),
        ("nbd://host/", Place("host")),
        ("nbd://host:1234/a/b%20c", Place("host", 1234, export="a/b c")),
        ("nbd://[::1]:99/x", Place("::1", 99, export="x")),
        ("nbd:///x", Place("localhost", export="x")),
        ("nbds://host/x", Place("host", export="x", tls=True)),
        ("nbd+unix:///x?socket=/run/n%2Bb", Place(path="/run/n+b", export="x")),
        ("nbds+unix:///?socket=/s", Place(path="/s", tls=True)),
        ("unix:/run/x.sock", Place(path="/run/x.sock")),
        ("nbd:unix:/run/x.sock:exportname=y", Place(path="/run/x.sock", export="y")),
        ("host:10809", Place("host")),
        ("[::1]:5:exportname=y", Place("::1", 5, export="y")),
    ],
)
def test_places_are_read_in_all_their_forms_and_written_as_uris(text: str, place: Place) -> None:
    assert parse(text) == place
    assert parse(str(place)) == place


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://host/", "its scheme must be one of nbd, nbds, nbd\\+unix, nbds\\+unix"),
        ("nbd+unix:///x", "names no socket"),
        ("nbd+unix://host/x?socket=/s", "names the host 'host' and a socket"),
        ("nbd://host/x?socket=/s", "its scheme must be nbd\\+unix"),
        ("nbd://host:0/", "must be a number from 1 to 65535"),
        ("nbd://host:x/", "must be a number from 1 to 65535"),
        ("nbd://host/?what=1", "'what', which means nothing"),
        ("nbds://host/?tls-cipher=x", "tls-cipher of an NBD URI is not supported"),
        ("nbds://host/?tls-psk-file=/x&tls-certificates=/y", "are two ways: give one of them"),
        ("unix:", "names no NBD server"),
        ("host", "names no NBD server"),
        ("nbd://h/" + "x" * 4097, "at most 4096 bytes"),
    ],
)
def test_what_is_no_place_is_told_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Nbd(text)


def test_it_is_a_built_in_target() -> None:
    assert resolve("nbd") is Nbd
    for text in ("nbds:unix:/s", "nbds://host/x"):
        made = from_text(text)
        assert isinstance(made, Nbd)
        assert made.place.tls
    made = from_text("nbd:nbd+unix:///x?socket=/s", options={"retry_for": "7"}, read_only=True)
    assert isinstance(made, Nbd)
    assert made.place == Place(path="/s", export="x")
    assert made.read_only
    assert made.max_stall > 7


# ---- what the server says becomes the disk ----


def test_bytes_are_kept_and_operations_arrive(server: FakeServer, path: Path) -> None:
    with Disk(target(path)) as disk:
        data = random.Random(7).randbytes(700_416)
        disk.pwrite(data, 4096)
        assert disk.pread(len(data), 4096) == data
        assert server.memory[4096 : 4096 + len(data)] == data
        disk.pwrite(data[:4096], 0, fua=True)
        disk.flush()
        disk.discard(0, 4096)
        disk.write_zeroes(4096, 4096, unmap=False)
        assert disk.pread(8192, 0) == bytes(8192)
        kinds = [(request.type, request.flags) for request in server.requests[-5:]]
    assert kinds == [
        (nbd_server.WRITE, 1),
        (nbd_server.FLUSH, 0),
        (nbd_server.TRIM, 0),
        (nbd_server.WRITE_ZEROES, 2),
        (nbd_server.READ, 0),
    ]


def test_the_server_is_taken_leave_of(server: FakeServer, path: Path) -> None:
    with Disk(target(path)) as disk:
        disk.pread(512, 0)
    until = time.monotonic() + 10
    while server.requests[-1].type != nbd_server.DISCONNECT:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_flags_and_block_sizes_are_those_of_the_disk(server: FakeServer, path: Path) -> None:
    server.flags = 1 | nbd_server.READ_ONLY | 1 << 4
    server.block_sizes = (2048, 65536, 1 << 20)
    with Disk(target(path)) as disk:
        basic = disk.params.basic
        assert (basic.read_only, basic.rotational, basic.volatile_cache) == (True, True, False)
        assert (basic.logical_block_size, basic.io_opt) == (2048, 65536)
        assert disk.params.discard is None
        assert disk.pread(2048, 0) == bytes(2048)
        with pytest.raises(OSError, match="the disk is read-only"):
            disk.pwrite(bytes(2048), 0)


def test_a_server_without_go_is_asked_by_name(server: FakeServer, path: Path) -> None:
    server.knows_go = False
    with Disk(target(path)) as disk:
        assert disk.size == SIZE
        assert disk.pread(512, 0) == bytes(512)


def test_what_a_disk_cannot_be_made_of_is_refused(server: FakeServer, path: Path) -> None:
    def refusal(**options: object) -> str:
        with pytest.raises(ValueError, match=str(path)) as raised, Disk(target(path, **options)):
            pass
        return str(raised.value)

    assert "has only 1048576" in refusal(size=2 << 20)
    server.size = SIZE + 100
    assert "positive multiple of its block size, 512; give size=1048576" in refusal()
    with Disk(target(path, size=SIZE)) as disk:
        assert disk.size == SIZE
    server.size = 100
    assert "has 100 bytes: a disk needs a positive multiple" in refusal()
    server.size = SIZE
    server.block_sizes = (65536, 65536, 1 << 20)
    assert "in blocks of 65536 bytes: a disk's have at most" in refusal()
    server.block_sizes = (1, 4096, 65536)
    assert "at most 65536 bytes: use max_io_size=64KiB or less" in refusal()
    with Disk(target(path), max_io_size=65536) as disk:
        disk.pwrite(b"x" * 200_704, 0)
    assert max(request.length for request in server.requests) == 65536


@pytest.mark.parametrize(
    ("export", "greeting", "why"),
    [
        (
            "nothing",
            None,
            "does not have the export 'nothing' .no such thing here.; it has '', 'other'$",
        ),
        ("", b"SSH-2.0-OpenSSH_9.2 Debian", "is not an NBD server: it greets otherwise"),
        ("", b"NBDMAGIC\0\x00\x42\x02\x81\x86\x12\x53\0\0", "speaks the oldstyle protocol"),
        ("", b"NBDMAGICIHAVEOPT\0\0", "does not speak the fixed newstyle protocol"),
    ],
)
def test_a_server_that_does_not_have_it_is_told_in_a_sentence(
    server: FakeServer, path: Path, export: str, greeting: bytes | None, why: str
) -> None:
    server.greeting = greeting or server.greeting
    with pytest.raises(OSError, match=f"^.Errno \\d+. the NBD server at {path} {why}"):
        Disk(Nbd(f"unix:{path}:exportname={export}")).open()


def test_no_server_is_told_in_a_sentence(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no NBD server can be reached at {path}: No such"):
        Disk(target(path)).open()


def test_one_connection_is_one_queue(server: FakeServer, path: Path) -> None:
    nbd = target(path, connections=4)
    nbd.open()
    assert nbd.links_per_queue() == 1
    with pytest.raises(ValueError, match="does not offer multi-conn"):
        nbd.check_queues(2)
    nbd.close()
    server.flags |= nbd_server.MULTI_CONN
    nbd.open()
    assert nbd.links_per_queue() == 4
    nbd.check_queues(2)
    nbd.close()


def test_several_connections_are_used(server: FakeServer, path: Path) -> None:
    server.flags |= nbd_server.MULTI_CONN
    nbd = target(path, connections=3)
    with Disk(nbd) as disk:
        until = time.monotonic() + 10
        while server.connections < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        data = random.Random(3).randbytes(SIZE)
        for at in range(0, SIZE, 65536):
            disk.pwrite(data[at : at + 65536], at)
        assert disk.pread(SIZE, 0) == data
        status = nbd.status()
        assert status is not None
        assert len(status["connections"]) == 3


def test_its_size_can_change_within_the_export(server: FakeServer, path: Path) -> None:
    with Disk(target(path, size=4096)) as disk:
        disk.resize(SIZE)
        disk.pwrite(b"w" * 512, SIZE - 512)
        with pytest.raises(ValueError, match="has only 1048576 bytes"):
            disk.resize(2 * SIZE)
        assert disk.size == SIZE
    assert server.memory[-512:] == b"w" * 512


def test_a_queue_is_served_by_turns(server: FakeServer, path: Path) -> None:
    """As one of many that have a thread together."""
    nbd = target(path)
    nbd.open()
    queue = ConnectedQueue.loopback(depth=4, buffer_size=65536)
    nbd.queue_made(queue)
    queue.fetch()
    server.memory[:4096] = b"m" * 4096
    poll = select.poll()
    poll.register(queue.fileno(), select.POLLIN)
    for _ in range(5):
        queue.inject(2, Op.READ, 0, 4096)
        while queue.answered(2) is None:
            assert poll.poll(10_000)
            assert queue.step(nbd.connection_lost, timeout=0)
        assert queue.answered(2) == 4096
        assert queue.memory(2, 4096) == b"m" * 4096
        server.before = once(raise_eof)
    queue.close()
    nbd.close()


def test_the_next_server_begins_when_what_was_in_flight_is_over(
    server: FakeServer, path: Path
) -> None:
    """A disk that is taken from its server with requests in flight, as in an upgrade."""
    nbd = target(path)
    nbd.open()
    queue = ConnectedQueue.loopback(depth=4, buffer_size=65536)
    nbd.queue_made(queue)
    queue.fetch()
    arrived, done = threading.Event(), threading.Event()

    def slow(request: Request) -> bytes:
        arrived.set()
        time.sleep(0.8)
        server.memory[:4096] = request.data
        done.set()
        raise EOFError

    server.before = once(slow)
    queue.memory(0, 4096)[:] = b"w" * 4096
    queue.inject(0, Op.WRITE, 0, 4096)
    while not arrived.is_set():
        queue.step(nbd.connection_lost, timeout=0.01)
    queue.close()
    nbd.close()
    assert done.is_set()


# ---- servers that break ----


LIES: dict[str, Callable[[Request], bytes | None]] = {
    "ends": raise_eof,
    "shutting down": lambda request: header(request, 108),
    "other magic": lambda request: header(request, magic=0x668E33EF),
    "nonsense": lambda request: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another's answer": lambda request: header(Request(bytes(28), b"")),
    "twice": lambda request: header(request) + bytes(request.length) + header(request),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_connection_that_cannot_be_believed_is_replaced(
    server: FakeServer, path: Path, lie: str
) -> None:
    server.memory[:8192] = b"m" * 8192
    with Disk(target(path)) as disk:
        server.before = once(LIES[lie])
        expected = bytes(4096) if lie == "twice" else b"m" * 4096
        assert disk.pread(4096, 0) == expected
        assert disk.pread(4096, 4096) == b"m" * 4096
        disk.pwrite(b"w" * 4096, 0)
        assert disk.pread(4096, 0) == b"w" * 4096
    assert server.connections == 2


def test_half_an_answer_is_none(server: FakeServer, path: Path) -> None:
    server.memory[:] = b"m" * SIZE

    def half(request: Request) -> bytes:
        server.stop()
        server.start()
        raise EOFError

    with Disk(target(path)) as disk:
        server.before = once(half)
        assert disk.pread(300_032, 0) == b"m" * 300_032


def test_errors_are_those_of_the_request(server: FakeServer, path: Path) -> None:
    with Disk(target(path)) as disk:
        for number, raised in ((28, errno.ENOSPC), (5, errno.EIO), (1234, errno.EIO)):
            server.before = once(lambda request, number=number: header(request, number))  # type: ignore[misc]
            with pytest.raises(OSError, match=f"Errno {raised}"):
                disk.pwrite(bytes(512), 0)
        assert disk.pread(512, 0) == bytes(512)
    assert server.connections == 1


def test_a_server_that_is_away_for_a_while_is_waited_for(server: FakeServer, path: Path) -> None:
    with Disk(target(path)) as disk:
        disk.pwrite(b"1" * 4096, 0)
        server.stop()
        threading.Timer(0.5, server.start).start()
        assert disk.pread(4096, 0) == b"1" * 4096
        disk.pwrite(b"2" * 4096, 0)
    assert server.memory[:4096] == b"2" * 4096


def test_a_write_is_sent_again_only_when_the_server_is_done_with_it(
    server: FakeServer, path: Path
) -> None:
    """A server that does what it had after its client has gone."""
    done = threading.Event()

    def slow(request: Request) -> bytes:
        threading.Timer(0.4, done.set).start()
        done.wait(10)
        assert len(server.requests) == 1  # nothing came by another connection meanwhile
        server.answer(request)
        return b"nonsense from a server that goes on"

    with Disk(target(path)) as disk:
        server.before = once(slow)
        disk.pwrite(b"1" * 4096, 0)
        disk.pwrite(b"2" * 4096, 0)
    assert server.memory[:4096] == b"2" * 4096
    assert [request.data[:1] for request in server.requests[:3]] == [b"1", b"1", b"2"]


def test_past_its_budget_there_is_one_sentence_and_eio(
    server: FakeServer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Disk(target(path, retry_for=0.5)) as disk:
        disk.pwrite(b"1" * 4096, 0)
        server.stop()
        for _ in range(3):
            with pytest.raises(OSError, match="Errno 5"):
                disk.pread(4096, 0)
        told = [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]
        assert len(told) == 1
        assert f"socket={path}: there was no connection for 0." in told[0]
        assert "Connection refused" in told[0]
        assert "its requests fail with EIO until there is one again" in told[0]
        server.start()
        until = time.monotonic() + 20
        while True:
            try:
                assert disk.pread(4096, 0) == b"1" * 4096
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 2 * SIZE}, "it has 2097152 bytes, and had 1048576"),
        ({"flags": nbd_server.FLAGS | nbd_server.READ_ONLY}, "it is read-only now"),
        ({"flags": nbd_server.FLAGS & ~4}, "it lacks <SEND_FLUSH"),
        ({"block_sizes": (4096, 4096, 1 << 20)}, "it takes requests of other sizes"),
    ],
)
def test_another_export_is_not_taken_for_the_same(
    server: FakeServer,
    path: Path,
    change: dict[str, object],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Disk(target(path)) as disk:
        for name, value in change.items():
            setattr(server, name, value)
        server.before = once(raise_eof)
        with pytest.raises(OSError, match="Errno 5"):  # at once: time does not help
            disk.pwrite(bytes(512), 0)
        assert f"is not the same any more: {why}" in caplog.text
    assert not any(server.memory)


def test_a_server_that_does_not_answer_is_given_up(server: FakeServer, path: Path) -> None:
    hung = threading.Event()

    def hang(request: Request) -> bytes:
        hung.wait(20)
        raise EOFError

    with Disk(target(path, timeout=0.4)) as disk:
        server.before = once(hang)
        threading.Timer(1.5, hung.set).start()  # it ends the connection only then
        assert disk.pread(512, 0) == bytes(512)
    assert server.connections == 2
    assert hung.is_set()


def test_a_slow_server_is_only_slow(server: FakeServer, path: Path) -> None:
    server.before = once(lambda request: time.sleep(0.6))  # type: ignore[func-returns-value]
    with Disk(target(path, timeout=0.9, retry_for=0.1)) as disk:
        assert disk.pread(512, 0) == bytes(512)
    assert server.connections == 1


def test_the_disk_ends_while_its_server_hangs(
    server: FakeServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "FENCE", 0.2)
    hung = threading.Event()

    def hang(request: Request) -> bytes:
        hung.wait(20)
        raise EOFError

    nbd = target(path, retry_for=0, timeout=0.3)
    with Disk(nbd) as disk:
        server.before = hang
        server.greeting = b"NBDMAGIC"  # and who connects again hears nothing
        with pytest.raises(OSError, match="Errno 5"):
            disk.pread(512, 0)
    assert not hung.is_set()
    hung.set()


# ---- below a layer ----


def test_layers_call_it_from_many_threads(server: FakeServer, path: Path) -> None:
    nbd = target(path)
    with Disk(Layer(nbd)) as disk:
        data = random.Random(5).randbytes(SIZE)
        disk.pwrite(data, 0)
        disk.flush()
        assert disk.pread(SIZE, 0) == data
        below = disk.target.below  # type: ignore[attr-defined]
        found: dict[int, bytes] = {}

        def read(at: int) -> None:
            buffer = bytearray(4096)
            below.read(at, memoryview(buffer))
            found[at] = bytes(buffer)

        threads = [threading.Thread(target=read, args=[n * 4096]) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == {n * 4096: data[n * 4096 : (n + 1) * 4096] for n in range(40)}
        server.before = once(raise_eof)
        assert disk.pread(4096, 0) == data[:4096]
        server.before = once(lambda request: header(request, 5))
        with pytest.raises(OSError, match="Errno 5"):
            disk.pread(4096, 0)


# ---- real servers ----


def verify(disk: Disk, seed: int) -> None:
    """Random writes and zeroes, against a copy."""
    chance = random.Random(seed)
    copy = bytearray(disk.pread(disk.size, 0))
    for _ in range(60):
        length = chance.randrange(1, 400) * 512
        offset = chance.randrange(0, (disk.size - length) // 512 + 1) * 512
        if chance.random() < 0.2:
            disk.write_zeroes(offset, length)
            copy[offset : offset + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            disk.pwrite(data, offset, fua=chance.random() < 0.2)
            copy[offset : offset + length] = data
    disk.flush()
    assert disk.pread(disk.size, 0) == copy


@needs_nbdkit
@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", "2M"],
        ["--filter=blocksize-policy", "memory", "2M", "blocksize-minimum=4096",
         "blocksize-error-policy=error", "blocksize-maximum=1M"],
        ["--no-sr", "--filter=fua", "memory", "2M", "fuamode=emulate"],
        ["--filter=nozero", "--filter=noextents", "memory", "2M"],
    ],
    ids=["plain", "block sizes", "no structured replies", "no zeroes"],
)  # fmt: skip
def test_nbdkit(path: Path, arguments: list[str]) -> None:
    with running(nbdkit(path, *arguments), path), Disk(target(path, connections=2)) as disk:
        if disk.block_size == 512:
            verify(disk, 1)
        data = os.urandom(65536)
        disk.pwrite(data, 65536)
        assert disk.pread(65536, 65536) == data


@needs_nbdkit
def test_nbdkit_that_is_killed_and_started_again(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(2 << 20))
    with running(nbdkit(path, "file", image), path) as first, Disk(target(path)) as disk:
        disk.pwrite(b"2" * 65536, 0)
        first.kill()
        first.wait()
        path.unlink()
        delayed = ["sh", "-c", 'sleep 0.5; exec "$@"', "sh", *nbdkit(path, "file", image)]
        second = subprocess.Popen(delayed)
        try:
            assert disk.pread(65536, 0) == b"2" * 65536
            verify(disk, 2)
        finally:
            second.kill()
            second.wait()


@needs_nbdkit
def test_nbdkit_with_errors_and_delays(path: Path) -> None:
    filters = ["--filter=error", "--filter=delay", "memory", "1M", "delay-read=50ms"]
    with (
        running(nbdkit(path, *filters, "error-pwrite=ENOSPC", "error-pwrite-rate=1"), path),
        Disk(target(path)) as disk,
    ):
        assert disk.pread(4096, 0) == bytes(4096)
        with pytest.raises(OSError, match="Errno 28"):
            disk.pwrite(bytes(4096), 0)


@pytest.mark.skipif(not has("qemu-nbd") or not has("qemu-img"), reason="no qemu-utils")
def test_qemu_nbd_with_a_qcow2_image(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "2M"], check=True)
    command = [
        "qemu-nbd",
        "-k",
        str(path),
        "-x",
        "name",
        "-e",
        "4",
        "-t",
        "-f",
        "qcow2",
        str(image),
    ]
    with running(command, path):
        with pytest.raises(OSError, match=r"does not have a default export.*it has 'name'"):
            Disk(target(path)).open()
        with Disk(Nbd(f"nbd+unix:///name?socket={path}", connections=2)) as disk:
            verify(disk, 3)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and what it certifies: a server called localhost, and a client."""
    if not has("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=CA",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    for who in ("server", "client"):
        Path(folder, "names").write_text("subjectAltName=DNS:localhost\n")
        openssl(
            "req", *key, "-keyout", f"{who}-key.pem", "-out", f"{who}.csr", "-subj", f"/CN={who}"
        )
        openssl("x509", "-req", "-in", f"{who}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem",
                "-CAcreateserial", "-out", f"{who}-cert.pem", "-extfile", "names")  # fmt: skip
    return folder


@needs_nbdkit
def test_tls(path: Path, certificates: Path) -> None:
    command = nbdkit(
        path, "--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer",
        "memory", "2M",
    )  # fmt: skip
    uri = f"nbds+unix:///?socket={path}"
    with running(command, path):
        with Disk(Nbd(uri, tls_certificates=certificates, connections=2)) as disk:
            verify(disk, 4)
            data = os.urandom(2 << 20)
            disk.pwrite(data, 0)
            assert disk.pread(2 << 20, 0) == data
        with pytest.raises(OSError, match=r"requires TLS.*: use nbds:// in the place of nbd://"):
            Disk(target(path)).open()
        with pytest.raises(OSError, match=r"is not trusted: (unable to get|self.signed)"):
            Disk(Nbd(uri)).open()
        with pytest.raises(OSError, match=r"is not trusted: .*[Hh]ostname mismatch"):
            Disk(Nbd(uri, tls_certificates=certificates, tls_hostname="other")).open()
        with Disk(Nbd(f"{uri}&tls-certificates={certificates}&tls-hostname=localhost")) as disk:
            assert disk.pread(65536, 0) == data[:65536]


@needs_nbdkit
def test_tls_is_not_begun_with_a_server_that_has_none(path: Path, certificates: Path) -> None:
    with running(nbdkit(path, "memory", "1M"), path):
        nbd = Nbd(f"nbds+unix:///?socket={path}", tls_certificates=certificates)
        with pytest.raises(
            OSError, match=r"does not offer TLS.*: use nbd:// in the place of nbds://"
        ):
            Disk(nbd).open()


def test_certificates_that_are_not_there_are_told(
    server: FakeServer, path: Path, tmp_path: Path
) -> None:
    nbd = Nbd(f"nbds+unix:///?socket={path}", tls_certificates=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*ca-cert.pem: it must be a file"
    ):
        Disk(nbd).open()


@pytest.mark.parametrize("name", ["tls_certificates", "tls_psk"])
def test_a_file_may_be_named_by_text(
    name: str, server: FakeServer, path: Path, tmp_path: Path
) -> None:
    options: Any = {name: str(tmp_path / "nothing")}
    nbd = Nbd(f"nbds+unix:///?socket={path}", **options)
    with pytest.raises(FileNotFoundError, match=f"{name}: there is no file"):
        Disk(nbd).open()


TLS_FAILS = "TLS with the NBD server at .* fails: "
NEEDS_PSK = pytest.mark.skipif(
    sys.version_info < (3, 13), reason="ssl has no pre-shared keys before Python 3.13"
)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """As psktool writes it."""
    file = tmp_path / "keys.psk"
    file.write_text(f"alice:{'ab' * 32}\nbob:{'cd' * 32}\n")
    return file


@needs_nbdkit
@NEEDS_PSK
def test_tls_with_a_shared_key(path: Path, keys: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.psk"
    wrong.write_text(f"alice:{'ef' * 32}\n")
    uri = f"nbds+unix:///?socket={path}"
    with running(nbdkit(path, "--tls=require", f"--tls-psk={keys}", "memory", "2M"), path):
        data = os.urandom(2 << 20)
        with Disk(Nbd(uri, tls_psk=keys)) as disk:
            disk.pwrite(data, 0)
        with Disk(Nbd(f"nbds+unix://bob@/?socket={path}&tls-psk-file={keys}")) as disk:
            assert disk.pread(2 << 20, 0) == data
        with pytest.raises(OSError, match=TLS_FAILS):
            Disk(Nbd(uri, tls_psk=wrong)).open()


@needs_nbdkit
@NEEDS_PSK
def test_a_server_with_a_certificate_does_not_do_for_a_shared_key(
    path: Path, keys: Path, certificates: Path
) -> None:
    command = nbdkit(path, "--tls=require", f"--tls-certificates={certificates}", "memory", "2M")
    with (
        running(command, path),
        pytest.raises(OSError, match=TLS_FAILS),
    ):
        Disk(Nbd(f"nbds+unix:///?socket={path}", tls_psk=keys)).open()


@pytest.mark.parametrize(
    ("content", "user", "why"),
    [
        ("", None, "has no key"),
        ("alice", None, "must have lines of USER:KEY"),
        ("alice:xyz", None, "must have lines of USER:KEY"),
        (":abcd", None, "must have lines of USER:KEY"),
        ("alice:abcd\nbob:abcd", "carol", "has no key of 'carol'; it has alice, bob"),
    ],
)
def test_keys_that_cannot_be_used_are_told(
    path: Path, tmp_path: Path, content: str, user: str | None, why: str
) -> None:
    (tmp_path / "keys").write_text(content)
    nbd = Nbd(f"nbds+unix:///?socket={path}", tls_psk=tmp_path / "keys", tls_username=user)
    with pytest.raises(ValueError, match=why):
        Disk(nbd).open()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python has pre-shared keys")
def test_an_older_python_has_no_shared_keys(path: Path, keys: Path) -> None:
    nbd = Nbd(f"nbds+unix:///?socket={path}", tls_psk=keys)
    with pytest.raises(ValueError, match=r"tls_psk needs Python 3.13 or newer, and this is 3\.1"):
        Disk(nbd).open()
