"""Makes the pictures of observing.md from real disks: `./run pictures`.

They need a kernel with ublk, root and fio.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from pyublk.cli.top import rows
from pyublk.cli.watching import View
from pyublk.control import Controller
from pyublk.service.observing import Observer

PICTURES = Path(__file__).with_name("pictures")
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pyublk"]
#: Of a disk each: a database (a log that is written in order, and pages at random), random reads
#: of Python, and large writes.
TRAFFIC = {
    "database": [
        ["--name=log", "--rw=write", "--bs=32k", "--size=32m", "--rate_iops=40", "--fdatasync=4"],
        [
            "--name=pages", "--rw=randrw", "--rwmixread=80", "--bsrange=8k-32k", "--offset=32m",
            "--size=224m", "--random_distribution=zipf:0.9", "--iodepth=4", "--rate_iops=120",
        ],
    ],
    "reads": [["--name=reads", "--rw=randread", "--bs=4k", "--size=60m", "--rate_iops=60"]],
    "copy": [["--name=copy", "--rw=write", "--bs=256k", "--size=500m", "--rate_iops=25"]],
}  # fmt: skip
DISKS = {
    "database": ["ram", "--size", "256M"],
    "reads": [str(ROOT / "examples/rot13.py:Rot13"), "--size", "64M"],
    "copy": ["null", "--size", "1G"],
}


def pyublk(*words: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [*COMMAND, *words], check=True, text=True, cwd="/tmp", stdout=subprocess.PIPE
    )
    return done.stdout


@contextmanager
def fio(path: str, jobs: list[list[str]]) -> Iterator[None]:
    """Traffic on a disk, until the end."""
    words = [word for job in jobs for word in job]
    command = ["fio", f"--filename={path}", "--ioengine=libaio", "--direct=1", "--time_based",
               "--runtime=600", *words]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def draw_top() -> None:
    """One frame of `pyublk top`, as it is on a terminal of 80 columns."""
    view = View()
    with Controller() as controller, Observer(controller) as observer:
        now = observer.samples()
        for _ in range(60):  # until there is traffic on each
            time.sleep(2)
            before, now = now, observer.samples()
            found = rows(before, now)
            if all(row.activity is not None and row.activity.iops for row in found):
                break
    view.show(found)
    view.press("i")
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(view.frame(80, 8))
    console.save_svg(str(PICTURES / "top.svg"), title="pyublk top", unique_id="top")


def main() -> None:
    """Starts the disks and the traffic, and draws what is seen of them."""
    made = {name: json.loads(pyublk("add", *words, "--json")) for name, words in DISKS.items()}
    try:
        with ExitStack() as traffic:
            for name, jobs in TRAFFIC.items():
                traffic.enter_context(fio(made[name]["path"], jobs))
            draw_top()
            number = str(made["database"]["id"])
            print(pyublk("trace", "record", number, "-o", "/tmp/db", "--seconds", "5"), end="")
    finally:
        pyublk("stop", *(str(one["id"]) for one in made.values()))
    pyublk("trace", "plot", "db", "-o", str(PICTURES / "trace.png"))
    (PICTURES / "summary.txt").write_text(pyublk("trace", "summary", "db"))


if __name__ == "__main__":
    main()
