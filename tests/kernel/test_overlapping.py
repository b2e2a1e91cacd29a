"""Requests to the same blocks at the same time, by different queues: each block is in the end what
one of them made of it, and no mixture."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from needs import needs_what_it_asks_for
from variations import variations

import pyublk
from pyublk import DataPath
from pyublk.targets import File, Ram, Stripe

KIB = 1 << 10
BLOCK = 4 * KIB
#: Long, so that two of them meet in many places.
LENGTH = 256 * KIB
ROUNDS = 60
SECONDS = 60


def made(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


TARGETS: dict[str, Callable[[Path], pyublk.Target]] = {
    "file": lambda folder: File(made(folder, "a", LENGTH)),
    "stripe": lambda folder: Stripe(
        made(folder, "a", LENGTH // 2), made(folder, "b", LENGTH // 2), chunk=BLOCK
    ),
    "ram": lambda folder: Ram(size=LENGTH),
}

#: A request to all of it, which leaves that byte in each place.
REQUESTS: dict[str, Callable[[Blocks, int], object]] = {
    "write": lambda disk, byte: disk.write(bytes([byte]) * LENGTH, 0),
    "zeroes": lambda disk, _: disk.zero_out(0, LENGTH),
    "discard": lambda disk, _: disk.discard(0, LENGTH),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder whose files are in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


#: With files in memory, user copy brings the bytes straight to and from their mappings.
WAYS = [
    ("file", DataPath.USER_COPY),
    ("file", DataPath.ZERO_COPY),
    ("file", DataPath.COPY),
    ("stripe", DataPath.USER_COPY),
    ("ram", DataPath.USER_COPY),
    ("ram", DataPath.COPY),
]


@pytest.mark.parametrize(("kind", "path"), variations(WAYS, WAYS[:1]))
@pytest.mark.parametrize("other", variations(REQUESTS, ["write"]))
def test_a_block_is_never_half_of_each(
    serve: Serve, memory: Path, kind: str, path: DataPath, other: str
) -> None:
    with needs_what_it_asks_for():
        disk = serve(TARGETS[kind](memory), queues=2, path=path, max_io_size=LENGTH)
    together = threading.Barrier(2, timeout=SECONDS)
    wrong: list[str] = []

    def client(queue: int, name: str) -> None:
        os.sched_setaffinity(threading.get_native_id(), {cpu_of(disk, queue)})
        with Blocks(disk.path) as blocks:
            for number in range(ROUNDS):
                together.wait()
                REQUESTS[name](blocks, 1 + 2 * number + queue)
                together.wait()
                if queue == 0:
                    wrong.extend(mixtures(blocks.read(LENGTH, 0)))

    threads = [
        threading.Thread(target=client, args=[queue, name], daemon=True)
        for queue, name in enumerate(["write", other])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert not thread.is_alive(), "a client hangs"
    assert not wrong, f"{len(wrong)} of {ROUNDS * LENGTH // BLOCK} blocks: {wrong[:3]}"
    assert all(queue.requests > ROUNDS // 2 for queue in disk.stats().queues)


def cpu_of(disk: pyublk.Device, queue: int) -> int:
    """One whose requests go to the queue."""
    its = Path(f"/sys/block/{Path(disk.path).name}/mq/{queue}/cpu_list").read_text()
    return int(its.split(",")[0])


def mixtures(data: bytes) -> list[str]:
    found = []
    for at in range(0, len(data), BLOCK):
        values = set(data[at : at + BLOCK])
        if len(values) > 1:
            found.append(f"at {at}: {sorted(values)}")
    return found
