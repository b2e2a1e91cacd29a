# SPDX-License-Identifier: MIT
"""Which of SQLite's settings keep a commit when the power is cut? Run it in a kernel with ublk:

    pyublk vm -- python3 examples/sqlite_power_cuts.py            # every setting, some states each
    pyublk vm -- python3 examples/sqlite_power_cuts.py --records .    # and keep what was recorded
    python3 examples/sqlite_power_cuts.py --records . --limit 1000    # for more states, anywhere

The first two need root; all need e2fsprogs. A setting that promises to keep commits must keep them
in every state. Of "OFF", which promises nothing, a state must be found that lost a commit or broke
the database.
"""

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pyublk
from pyublk.targets import File
from pyublk.testing import Crash, PowerCut, PowerCutFailed

#: (journal mode, synchronous) and whether a commit is kept, by https://sqlite.org/pragma.html
SETTINGS = {
    ("delete", "OFF"): False,
    ("delete", "EXTRA"): True,
    ("truncate", "FULL"): True,
    ("persist", "FULL"): True,
    ("wal", "OFF"): False,
    ("wal", "FULL"): True,
}
COMMITS = 6
MIB = 1 << 20


def connect(directory: Path, journal: str, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(directory / "my.db", isolation_level=None)
    connection.execute(f"PRAGMA journal_mode={journal}")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    return connection


def work(directory: Path, journal: str, synchronous: str, cut: PowerCut) -> None:
    """What is tested: transactions, each of which is told to somebody when it is committed."""
    connection = connect(directory, journal, synchronous)
    for number in range(COMMITS):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE account SET money = money - 1 WHERE name = 'ours'")
        connection.execute("UPDATE account SET money = money + 1 WHERE name = 'theirs'")
        connection.execute("INSERT INTO paid VALUES (?, ?)", (number, "x" * 2000))
        connection.execute("COMMIT")
        cut.mark(f"paid {number}")
    os.sync()  # so that later events change nothing of this
    connection.close()


def check(crash: Crash, journal: str, synchronous: str) -> None:
    """No file system, no database and no payment may be broken or lost."""
    with crash.extracted() as directory:
        connection = connect(directory, journal, synchronous)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            paid = [number for (number,) in connection.execute("SELECT n FROM paid ORDER BY n")]
            money = dict(connection.execute("SELECT name, money FROM account"))
        finally:
            connection.close()
    told = sum(crash.reached(f"paid {number}") for number in range(COMMITS))
    assert paid in [list(range(told)), list(range(told + 1))], f"told {told}, but found {paid}"
    assert money == {"ours": 100 - len(paid), "theirs": len(paid)}


def record(journal: str, synchronous: str, directory: Path) -> PowerCut:
    """A disk with an ext4 on which the work was done."""
    image, mounted = directory / "disk.img", directory / "mounted"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-J", "size=1", "-b", "1024", image], check=True)
    mounted.mkdir()
    cut = PowerCut(File(image), atomic=4096)  # ext4's superblock may not be torn
    with pyublk.Device(cut) as disk:
        subprocess.run(["mount", "-t", "ext4", disk.path, mounted], check=True)
        try:
            connection = connect(mounted, journal, synchronous)
            connection.execute("CREATE TABLE account (name TEXT PRIMARY KEY, money INTEGER)")
            connection.execute("INSERT INTO account VALUES ('ours', 100), ('theirs', 0)")
            connection.execute("CREATE TABLE paid (n INTEGER PRIMARY KEY, note TEXT)")
            connection.close()
            os.sync()
            with cut.record():
                work(mounted, journal, synchronous, cut)
        finally:
            subprocess.run(["umount", mounted], check=True)
    return cut


def run(journal: str, synchronous: str, limit: int, kept: Path | None = None) -> str | int:
    """The failure that was found, in words; else how many states there were. `kept`: the file of
    the record, if it is to be saved, or was."""
    if kept is not None and kept.exists():
        return try_states(PowerCut.load(kept), journal, synchronous, limit)
    with tempfile.TemporaryDirectory() as directory:
        cut = record(journal, synchronous, Path(directory))
        if kept is not None:
            cut.save(kept)
        return try_states(cut, journal, synchronous, limit)


def try_states(cut: PowerCut, journal: str, synchronous: str, limit: int) -> str | int:
    try:
        return cut.check(lambda crash: check(crash, journal, synchronous), limit=limit)
    except PowerCutFailed as failed:
        return str(failed)


def main() -> int:
    names = {
        f"{journal}-{synchronous}": (journal, synchronous) for journal, synchronous in SETTINGS
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", choices=[[], *names], metavar="JOURNAL-SYNCHRONOUS")
    parser.add_argument("--limit", type=int, default=12, help="states of each setting")
    parser.add_argument(
        "--records", type=Path, help="a directory: records are saved there, or taken from there"
    )
    chosen = parser.parse_args()
    wrong = 0
    for name in chosen.settings or names:
        setting = names[name]
        kept = chosen.records and chosen.records / f"{name}.cut"
        found = run(*setting, chosen.limit, kept)
        as_promised = isinstance(found, int) == SETTINGS[setting]
        wrong += not as_promised
        print(f"{name}: {'as promised' if as_promised else 'NOT AS PROMISED'}", flush=True)
        if isinstance(found, int):
            print(f"    no failure in {found} states", flush=True)
        else:
            print("    " + found.replace("\n", "\n    "), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
