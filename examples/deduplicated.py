"""A disk that keeps each block once, however often clients write it.

pyublk add examples/deduplicated.py:Deduplicated store --size 1G

`store` is a directory: `blocks` has the blocks, `index.db` (SQLite) says which block of the disk
has which of them, and how many use it. What was written is kept from a flush on: a flush makes the
new blocks durable, then commits the index. A slot that is used no more is used again only after
the commit that says so; so whenever the power is cut, each block that the index names is whole.
Until a flush, the index is in a transaction of this process: the disk is not `recoverable`, since a
killed server is like a power cut.
"""

import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pyublk

BLOCK = 4096
ZEROES = bytes(BLOCK)

SCHEMA = """
PRAGMA journal_mode = DELETE;
PRAGMA synchronous = EXTRA;
CREATE TABLE IF NOT EXISTS slot (hash BLOB PRIMARY KEY, number INT UNIQUE, uses INT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (number INTEGER PRIMARY KEY, hash BLOB);
"""


def sync_directory(place: Path) -> None:
    directory = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Deduplicated(pyublk.Target):
    def __init__(self, store: Path, *, size: int) -> None:
        super().__init__(size=size, block_size=BLOCK, discard_granularity=BLOCK)
        self._store = Path(store)

    def open(self) -> None:
        self._store.mkdir(exist_ok=True)
        file = self._store / "blocks"
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # One queue's thread at a time calls (`concurrency` is "serial"), not always the same.
        self._db = sqlite3.connect(
            self._store / "index.db", isolation_level=None, check_same_thread=False
        )
        self._db.executescript(SCHEMA)
        for place in (self._store, self._store.parent):  # new names are durable from here on
            sync_directory(place)
        taken = {number for (number,) in self._db.execute("SELECT number FROM slot")}
        self._end = max(taken, default=-1) + 1  # the first slot that was never used
        self._free = sorted(set(range(self._end)) - taken, reverse=True)
        self._freed: list[int] = []  # free once the index is committed
        self._db.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._db.close()
            os.close(self._file)

    def read(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), BLOCK):
            number = (offset + at) // BLOCK
            found = self._db.execute(
                "SELECT slot.number FROM block JOIN slot USING (hash) WHERE block.number = ?",
                [number],
            ).fetchone()
            part = buffer[at : at + BLOCK]
            part[:] = os.pread(self._file, BLOCK, found[0] * BLOCK) if found else ZEROES

    def write(self, offset: int, data: memoryview) -> None:
        for at in range(0, len(data), BLOCK):
            content = bytes(data[at : at + BLOCK])
            self._put((offset + at) // BLOCK, None if content == ZEROES else content)

    def discard(self, offset: int, length: int) -> None:
        for number in range(offset // BLOCK, (offset + length) // BLOCK):
            self._put(number, None)

    def flush(self) -> None:
        os.fdatasync(self._file)
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")
        self._free += self._freed
        self._freed.clear()

    def status(self) -> dict[str, Any]:
        return {"slots": self._end, "free": len(self._free) + len(self._freed)}

    def _put(self, number: int, content: bytes | None) -> None:
        """Gives a block of the disk its content; None: zeroes, which take no slot."""
        key = None
        if content is not None:
            key = hashlib.blake2b(content, digest_size=32).digest()
            used = self._db.execute("UPDATE slot SET uses = uses + 1 WHERE hash = ?", [key])
            if used.rowcount == 0:
                slot = self._free.pop() if self._free else self._end
                os.pwrite(self._file, content, slot * BLOCK)
                self._end = max(self._end, slot + 1)
                self._db.execute("INSERT INTO slot VALUES (?, ?, 1)", [key, slot])
        before = self._db.execute("SELECT hash FROM block WHERE number = ?", [number]).fetchone()
        if before:
            self._db.execute("UPDATE slot SET uses = uses - 1 WHERE hash = ?", before)
            gone = self._db.execute(
                "DELETE FROM slot WHERE hash = ? AND uses = 0 RETURNING number", before
            ).fetchone()
            if gone:
                self._freed.append(gone[0])
        if key is None:
            self._db.execute("DELETE FROM block WHERE number = ?", [number])
        else:
            self._db.execute("INSERT OR REPLACE INTO block VALUES (?, ?)", [number, key])
