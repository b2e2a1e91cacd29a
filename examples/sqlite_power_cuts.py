# SPDX-License-Identifier: MIT
"""Which of SQLite's settings keep a commit when the power is cut? Run it in a kernel with ublk:

    pyublk vm -- python3 examples/sqlite_power_cuts.py            # four settings, some states each
    pyublk vm -- python3 examples/sqlite_power_cuts.py --all      # each setting: takes minutes
    pyublk vm -- python3 examples/sqlite_power_cuts.py --records .    # and keep what was recorded
    python3 examples/sqlite_power_cuts.py --records . --limit 500    # for more states, anywhere

All but the last need root; all need e2fsprogs. A setting that promises to keep commits must keep
them in every state. One that promises a whole database may lose the last commits, but no other, and
half of none. Of one that promises nothing, a state must be found in which something is lost or
broken.
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

KEPT, WHOLE, NOTHING = "commits are kept", "the database is whole", "nothing"
#: (journal mode, synchronous), and what is promised by https://sqlite.org/pragma.html
SETTINGS = {
    ("delete", "OFF"): NOTHING,
    ("delete", "NORMAL"): WHOLE,
    ("delete", "FULL"): WHOLE,
    ("delete", "EXTRA"): KEPT,
    ("truncate", "FULL"): KEPT,
    ("persist", "FULL"): KEPT,
    ("wal", "OFF"): NOTHING,
    ("wal", "NORMAL"): WHOLE,
    ("wal", "FULL"): KEPT,
    ("memory", "FULL"): NOTHING,
    ("off", "FULL"): NOTHING,
}
FIRST = ["delete-OFF", "delete-EXTRA", "wal-NORMAL", "wal-FULL"]
MIB = 1 << 20


def connect(directory: Path, journal: str, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(directory / "my.db", isolation_level=None)
    connection.execute(f"PRAGMA journal_mode={journal}")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    return connection


def work(directory: Path, journal: str, synchronous: str, commits: int, cut: PowerCut) -> None:
    """What is tested: transactions, each of which is told to somebody when it is committed."""
    connection = connect(directory, journal, synchronous)
    for number in range(commits):
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
    told = len(crash.marks)
    assert paid == list(range(len(paid))), f"found {paid}"
    least = 0 if SETTINGS[journal, synchronous] is WHOLE else told
    assert least <= len(paid) <= told + 1, f"told {told}, but found {paid}"
    assert money == {"ours": 100 - len(paid), "theirs": len(paid)}


def record(journal: str, synchronous: str, commits: int, directory: Path) -> PowerCut:
    """A disk with an ext4 on which the work was done."""
    image, mounted = directory / "disk.img", directory / "mounted"
    with image.open("wb") as file:
        file.truncate(4 * MIB)
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
                work(mounted, journal, synchronous, commits, cut)
        finally:
            subprocess.run(["umount", mounted], check=True)
    return cut


def run(
    journal: str, synchronous: str, limit: int, kept: Path | None = None, commits: int = 6
) -> str | int:
    """The failure that was found, in words; else how many states there were. `kept`: the file of
    the record, if it is to be saved, or was."""
    if kept is not None and kept.exists():
        return try_states(PowerCut.load(kept), journal, synchronous, limit)
    with tempfile.TemporaryDirectory() as directory:
        cut = record(journal, synchronous, commits, Path(directory))
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
    parser.add_argument("--all", action="store_true", help=f"each setting, not {', '.join(FIRST)}")
    parser.add_argument("--limit", type=int, help="states of each setting: 4, with --all 12")
    parser.add_argument("--commits", type=int, default=6, help="of each setting")
    parser.add_argument(
        "--records", type=Path, help="a directory: records are saved there, or taken from there"
    )
    chosen = parser.parse_args()
    if chosen.records:
        chosen.records.mkdir(parents=True, exist_ok=True)
    limit = (12 if chosen.all else 4) if chosen.limit is None else chosen.limit
    wrong = 0
    for name in chosen.settings or (names if chosen.all else FIRST):
        setting = names[name]
        kept = chosen.records and chosen.records / f"{name}.cut"
        found = run(*setting, limit, kept, chosen.commits)
        as_promised = isinstance(found, int) == (SETTINGS[setting] is not NOTHING)
        wrong += not as_promised
        verdict = "as promised" if as_promised else "NOT AS PROMISED"
        print(f"{name} promises {SETTINGS[setting]}: {verdict}", flush=True)
        if isinstance(found, int):
            print(f"    no failure in {found} states", flush=True)
        else:
            print("    " + found.replace("\n", "\n    "), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
