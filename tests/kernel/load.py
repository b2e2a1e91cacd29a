"""Clients that write and read a disk all the time, and know what it must hold."""

import os
import random
import threading
from types import TracebackType
from typing import Self

from blocks import Blocks
from servers import until

BLOCK = 4096


class Load:
    """`clients` threads, each with `blocks` blocks of its own, in direct I/O. Each write has
    another content, and each read is compared with the last write that was acknowledged.

    `may_fail`: a request may get an error; what it wrote may be there or not.
    """

    def __init__(
        self, path: str, *, clients: int = 4, blocks: int = 32, may_fail: bool = False
    ) -> None:
        self.path = path
        self.failed = 0
        self.wrong: list[str] = []
        self.done = [0] * clients
        self._may_fail = may_fail
        self._blocks = blocks
        self._held: list[list[set[bytes]]] = [
            [{bytes(BLOCK)} for _ in range(blocks)] for _ in range(clients)
        ]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(client,)) for client in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a client hangs"
        if kind is None:
            assert not self.wrong, self.wrong[:5]

    def goes_on(self, requests: int = 10) -> None:
        """Waits until each client has had so many answers from now on."""
        before = list(self.done)
        until(
            lambda: (
                self.wrong
                or all(now >= then + requests for now, then in zip(self.done, before, strict=True))
            ),
            what="clients get answers",
        )

    def check(self) -> None:
        """Compares every block; when the clients have ended, on a disk that is served."""
        with Blocks(self.path, os.O_RDONLY) as disk:
            for client in range(len(self._threads)):
                for block in range(self._blocks):
                    self._compare(disk, client, block)
        assert not self.wrong, self.wrong[:5]

    def _run(self, client: int) -> None:
        rng = random.Random(client)
        number = 0
        try:
            with Blocks(self.path) as disk:
                while not self._over.is_set() and not self.wrong:
                    block = rng.randrange(self._blocks)
                    number += 1
                    try:
                        if rng.random() < 0.5:
                            self._write(disk, client, block, number)
                        else:
                            self._compare(disk, client, block)
                    except OSError as error:
                        self.failed += 1
                        if not self._may_fail:
                            self.wrong.append(f"client {client}: {error}")
                    self.done[client] += 1
        except BaseException as error:
            self.wrong.append(f"client {client} ended: {error!r}")

    def _offset(self, client: int, block: int) -> int:
        return (client * self._blocks + block) * BLOCK

    def _write(self, disk: Blocks, client: int, block: int, number: int) -> None:
        data = f"{client}.{block}.{number}.".encode().ljust(BLOCK, b"#")
        held = self._held[client]
        if self._may_fail:
            held[block] = held[block] | {data}
        disk.write(data, self._offset(client, block))
        held[block] = {data}

    def _compare(self, disk: Blocks, client: int, block: int) -> None:
        found = disk.read(BLOCK, self._offset(client, block))
        allowed = self._held[client][block]
        if found not in allowed:
            self.wrong.append(
                f"client {client}, block {block}: {found[:24]!r} instead of "
                f"{[one[:24] for one in allowed]}"
            )
