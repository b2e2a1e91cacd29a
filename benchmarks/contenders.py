# SPDX-License-Identifier: MIT
"""Who is measured: how to start each one's disk, and how to take it away again.

All have so many queues and depth 128, and are otherwise as they come; ublk servers take requests up
to 1 MiB, which is kublk's own limit. Those of kind "null" move no bytes of their own; those of kind
"bytes" keep 64 MiB in the machine's memory.

Ours come with no I/O scheduler and threads that never interrupt (`pyublk.scheduling`). So both
sides are there with the other's choices too: "kernels-choices" and "our-choices".
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pyublk.scheduling import choose_io_scheduler

from . import programs
from .jobs import BYTES_SIZE
from .programs import Unavailable

NULL_SIZE = 250 << 30
DEPTH = 128
MAX_IO_SIZE = 1 << 20

_ROOT = Path(__file__).parent.parent
_NULL_BLK = Path("/sys/kernel/config/nullb")
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contender may use: `directory` is on tmpfs, `kublk` a program or None, `before`
    another checkout or None."""

    queues: int
    directory: Path
    kublk: str | None
    before: str | None = None

    def file(self, name: str) -> Path:
        """A new file of `BYTES_SIZE`, all of it written."""
        path = self.directory / name
        path.write_bytes(bytes(BYTES_SIZE))
        return path


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that is served: its path, and the process that serves it if there is one."""

    path: str
    server: int | None


Kind = Literal["null", "bytes"]
Start = Callable[[Setting, ExitStack], Disk]


@dataclass(frozen=True, slots=True)
class Contender:
    """One who is measured. `start` raises `programs.Unavailable` where it cannot take part.

    Of kind "bytes": of every so many MiB one is written before the first measurement; 0: none is.
    """

    name: str
    kind: Kind
    start: Start
    written: int = 1


#: Those the others of their kind are compared with: the limit, kublk, our own native target.
REFERENCES: dict[Kind, tuple[str, str, str]] = {
    "null": ("null_blk", "kublk", "pyublk-null"),
    "bytes": ("null_blk-memory", "kublk-loop", "pyublk-ram"),
}


def _null_blk(
    setting: Setting,
    stack: ExitStack,
    *,
    memory: bool,
    suffix: str = "",
    memory_size: int = BYTES_SIZE,
) -> Disk:
    programs.load_module("null_blk", "nr_devices=0")
    if not _NULL_BLK.is_dir():
        mount = programs.find("mount", "mount")
        programs.run(mount, "-t", "configfs", "none", str(_NULL_BLK.parent))
    name = ("pyublk_bench_memory" if memory else "pyublk_bench") + suffix
    place = _NULL_BLK / name
    place.mkdir()
    stack.callback(place.rmdir)
    size = memory_size if memory else NULL_SIZE
    attributes = {
        "size": size >> 20,
        "submit_queues": setting.queues,
        "hw_queue_depth": DEPTH,
        "memory_backed": int(memory),
    }
    for attribute, value in attributes.items():
        (place / attribute).write_text(str(value))
    (place / "power").write_text("1")
    stack.callback((place / "power").write_text, "0")
    # Older kernels number these disks, whatever they are called.
    index = (place / "index").read_text().strip()
    for path in (f"/dev/{name}", f"/dev/nullb{index}"):
        if os.path.exists(path):
            return Disk(path, None)
    raise Unavailable("the kernel made a null_blk disk without a node in /dev")


def _run_at_the_end(stack: ExitStack, *line: str) -> None:
    """Take a disk away; that it went by itself must not cost what was measured before."""
    # A counting guest's clock runs ahead while it waits for the host: 0.7 s of work took 48 s.
    stack.callback(subprocess.run, line, capture_output=True, timeout=3600, check=False)


def _loop(setting: Setting, stack: ExitStack) -> Disk:
    programs.load_module("loop")
    losetup = programs.find("losetup", "mount")
    file = str(setting.file("loop"))
    path = programs.run(losetup, "--direct-io=on", "--find", "--show", file).strip()
    _run_at_the_end(stack, losetup, "-d", path)
    return Disk(path, None)


def _free_nbd() -> str:
    for number in range(16):
        state = Path(f"/sys/block/nbd{number}")
        if state.is_dir() and not (state / "pid").exists():
            return f"/dev/nbd{number}"
    raise Unavailable("every nbd device is in use")


def _nbdkit(
    setting: Setting, stack: ExitStack, *, name: str, plugin: list[str] | None = None
) -> Disk:
    """By the kernel's client. Without a plugin, a file in memory."""
    client = programs.find("nbd-client", "nbd-client")
    programs.load_module("nbd")
    plugin = plugin or ["file", str(setting.file(f"nbdkit-{name}"))]
    socket = setting.directory / f"{name}.socket"
    server = stack.enter_context(programs.nbdkit(socket, *plugin))
    path = _free_nbd()
    programs.run(client, "-unix", str(socket), path, "-connections", str(setting.queues))
    _run_at_the_end(stack, client, "-d", path)
    return Disk(path, server)


def _pyublk_nbd(setting: Setting, stack: ExitStack, *, path: str, batch: bool | None) -> Disk:
    """By our client, the same server."""
    name = f"pyublk-nbd-{path}-{batch}"
    socket = setting.directory / f"{name}.socket"
    stack.enter_context(programs.nbdkit(socket, "file", str(setting.file(name))))
    return _pyublk(setting, stack, target="nbd", path=path, batch=batch, on=str(socket))


def _files(setting: Setting, name: str, count: int) -> list[str]:
    """`count` new files that have `BYTES_SIZE` together, all of it written."""
    files = []
    for number in range(count):
        path = setting.directory / f"{name}-{number}"
        path.write_bytes(bytes(BYTES_SIZE // count))
        files.append(str(path))
    return files


def _kublk(
    setting: Setting, stack: ExitStack, *, mode: str, kind: str = "null", files: int = 0
) -> Disk:
    if setting.kublk is None:
        raise Unavailable("kublk takes part only when asked for (--kublk)")
    programs.load_module("ublk_drv")
    line = [setting.kublk, "add", "-q", str(setting.queues), "-d", str(DEPTH), "-t", kind]
    line += [*KUBLK_MODES[mode], *_files(setting, f"kublk-{kind}-{mode}", files)]
    words = programs.run(*line)
    found = re.search(r"dev id (\d+):.*?daemon pid (\d+)", words, re.DOTALL)
    if found is None:
        raise Unavailable(f"kublk said no device: {words.strip() or 'nothing'}")
    _run_at_the_end(stack, setting.kublk, "del", "-n", found[1])
    return Disk(f"/dev/ublkb{found[1]}", int(found[2]))


def _kublk_with_our_choices(setting: Setting, stack: ExitStack, *, mode: str) -> Disk:
    disk = _kublk(setting, stack, mode=mode)
    choose_io_scheduler(disk.path, "none", _PATIENCE)
    for thread in Path(f"/proc/{disk.server}/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
    return disk


def _pyublk(
    setting: Setting,
    stack: ExitStack,
    *,
    target: str,
    files: int = 0,
    path: str = "auto",
    batch: bool | None = None,
    on: str = "",
    name: str = "",
    kernels_choices: tuple[str, ...] = (),
    before: bool = False,
    traced: bool = False,
) -> Disk:
    if before and setting.before is None:
        raise Unavailable("another checkout takes part only when it is named (--before)")
    programs.load_module("ublk_drv")
    line = [sys.executable, "-m", "benchmarks.server", target, "--queues", str(setting.queues)]
    size = BYTES_SIZE if target == "ram" else NULL_SIZE
    line += ["--depth", str(DEPTH), "--max-io-size", str(MAX_IO_SIZE), "--size", str(size)]
    line += ["--path", path]
    if batch is not None:
        line += ["--batch" if batch else "--no-batch"]
    for choice in kernels_choices:
        line += ["--kernels-choice", choice]
    if traced:
        line += ["--trace", str(setting.directory / f"trace-{target}")]
    name = f"pyublk-{name or target}-{path}-{batch}-{'-'.join(kernels_choices)}-{before}"
    for file in _files(setting, name, files) if not on else [on]:
        line += ["--file", file]
    home = setting.before if before else _ROOT
    server = stack.enter_context(
        subprocess.Popen(
            line,
            cwd=home,
            env={**os.environ, "PYTHONPATH": f"{home}/src:{os.environ.get('PYTHONPATH', '')}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(programs.end, server)
    assert server.stdout is not None
    assert server.stderr is not None
    disk = server.stdout.readline().strip()
    if not disk:
        words = server.stderr.read().strip().splitlines()
        raise Unavailable(words[-1] if words else "the server ended without a word")
    return Disk(disk, server.pid)


def _pyublk_by_command(setting: Setting, stack: ExitStack, *, restart: bool) -> Disk:
    """`null` as the command serves it, in the background."""
    programs.load_module("ublk_drv")
    command = [sys.executable, "-m", "pyublk"]
    line = [*command, "add", "null", "--size", str(NULL_SIZE), "--queues", str(setting.queues)]
    line += ["--restart" if restart else "--no-restart"]
    path = programs.run(*line).strip()
    _run_at_the_end(stack, *command, "stop", path)
    return Disk(path, None)


def _pyublk_on_disk(setting: Setting, stack: ExitStack, *, path: str) -> Disk:
    """Our file target on a null_blk disk with memory: direct I/O that really goes to a disk."""
    under = _null_blk(setting, stack, memory=True, suffix=f"_{path}")
    return _pyublk(setting, stack, target="file", path=path, on=under.path)


def _on_ext4(setting: Setting, stack: ExitStack, *, target: str, name: str) -> Disk:
    """A target whose files are on ext4, in the page cache, on a null_blk disk with memory."""
    programs.load_module("ext4")
    size = 4 * BYTES_SIZE
    under = _null_blk(setting, stack, memory=True, suffix=f"_ext4_{name}", memory_size=size)
    programs.run(programs.find("mkfs.ext4", "e2fsprogs"), "-q", under.path)
    place = setting.directory / f"ext4-{name}"
    place.mkdir()
    programs.run(programs.find("mount", "mount"), under.path, str(place))
    _run_at_the_end(stack, programs.find("umount", "mount"), str(place))
    return _pyublk(replace(setting, directory=place), stack, target=target, files=1)


#: kublk's modes: the name that ours have too, and its options. "copy" is its default.
KUBLK_MODES = {
    "copy": [],
    "user-copy": ["-u"],
    "zero-copy": ["-z"],
    "auto-buffer": ["--auto_zc"],
    "batch": ["--batch"],
    "batch-auto-buffer": ["--batch", "--auto_zc"],
}
#: The same modes of ours.
MODES: dict[str, tuple[str, bool]] = {
    "copy": ("copy", False),
    "user-copy": ("user-copy", False),
    "zero-copy": ("zero-copy", False),
    "auto-buffer": ("auto-buffer", False),
    "batch": ("copy", True),
    "batch-user-copy": ("user-copy", True),
    "batch-auto-buffer": ("auto-buffer", True),
}


def _kublks(kind: str, files: int) -> dict[str, Start]:
    """kublk in each of its modes; the default one has no mode in its name."""
    name = "kublk" if kind == "null" else f"kublk-{kind}"
    return {
        name if mode == "copy" else f"{name}-{mode}": partial(
            _kublk, mode=mode, kind=kind, files=files
        )
        for mode in KUBLK_MODES
    }


def _pyublks(target: str, files: int = 0) -> dict[str, Start]:
    """A target of ours by the path it chooses, and by each."""
    chosen: dict[str, Start] = {f"pyublk-{target}": partial(_pyublk, target=target, files=files)}
    forced: dict[str, Start] = {
        f"pyublk-{target}-{mode}": partial(
            _pyublk, target=target, files=files, path=path, batch=batch
        )
        for mode, (path, batch) in MODES.items()
    }
    return chosen | forced


def _layered() -> list[Contender]:
    """Overlays and caches of one file, in the same file systems as `pyublk-file` and
    `pyublk-file-ext4`. What is written of an overlay is in its own file, the rest in the base."""
    found = [
        Contender("pyublk-file-ext4", "bytes", partial(_on_ext4, target="cached", name="file"))
    ]
    for name, target, written in (
        ("overlay-base", "overlay", 0),
        ("overlay-mixed", "overlay", 2),
        ("overlay-upper", "overlay", 1),
        ("overlay-64k", "overlay-64k", 0),
        ("cache", "cache", 1),
    ):
        on_tmpfs = partial(_pyublk, target=target, files=1, name=name)
        on_ext4 = partial(_on_ext4, target=target, name=name)
        found.append(Contender(f"pyublk-{name}", "bytes", on_tmpfs, written))
        found.append(Contender(f"pyublk-{name}-ext4", "bytes", on_ext4, written))
    return found


def _all() -> list[Contender]:
    plugin = str(Path(__file__).with_name("nbdkit_null.py"))
    null: dict[str, Start] = {
        "null_blk": partial(_null_blk, memory=False),
        "nbdkit-null": partial(_nbdkit, plugin=["null", f"size={NULL_SIZE}"], name="null"),
        "nbdkit-python": partial(_nbdkit, plugin=["python", plugin], name="python"),
        **_kublks("null", 0),
        **_pyublks("null"),
        **{
            f"pyublk-{target}": partial(_pyublk, target=target)
            for target in ("handle", "handle-fields", "methods", "async", "async-sleep")
        },
        **{
            f"pyublk-{target}-before": partial(_pyublk, target=target, before=True)
            for target in ("null", "methods", "async", "async-sleep")
        },
        **{
            f"pyublk-{target}-traced": partial(_pyublk, target=target, traced=True)
            for target in ("null", "methods")
        },
        **{
            f"pyublk-null-{name}": partial(_pyublk_by_command, restart=restart)
            for name, restart in (("not-restarted", False), ("restarted", True))
        },
        "pyublk-null-get-data": partial(_pyublk, target="null", path="get-data"),
        **{
            f"kublk-{mode}-our-choices": partial(_kublk_with_our_choices, mode=mode)
            for mode in ("copy", "batch")
        },
        **{
            f"pyublk-{name}-kernels-choices": partial(
                _pyublk,
                target=target,
                path=path,
                batch=batch,
                kernels_choices=("scheduler", "preempt"),
            )
            for name, target, (path, batch) in (
                ("null", "null", ("auto", None)),
                *((f"null-{mode}", "null", MODES[mode]) for mode in ("copy", "batch")),
                *((name, name, ("auto", None)) for name in ("handle", "handle-fields")),
            )
        },
        **{
            f"pyublk-null-kernels-{choice}": partial(
                _pyublk, target="null", kernels_choices=(choice,)
            )
            for choice in ("scheduler", "preempt")
        },
    }
    files: dict[str, Start] = {
        "null_blk-memory": partial(_null_blk, memory=True),
        "loop": _loop,
        **_kublks("loop", 1),
        **_kublks("stripe", 4),
        "pyublk-ram": partial(_pyublk, target="ram"),
        **_pyublks("file", 1),
        "pyublk-file-before": partial(_pyublk, target="file", files=1, before=True),
        **_pyublks("stripe", 4),
        "pyublk-linear": partial(_pyublk, target="linear", files=4),
        "pyublk-map": partial(_pyublk, target="map", files=4),
        "nbdkit-file": partial(_nbdkit, name="file"),
        "pyublk-nbd": partial(_pyublk_nbd, path="auto", batch=None),
        "pyublk-nbd-user-copy": partial(_pyublk_nbd, path="user-copy", batch=None),
        **{
            f"pyublk-disk-{path}": partial(_pyublk_on_disk, path=path)
            for path in ("copy", "zero-copy", "auto-buffer")
        },
    }
    return [
        *(Contender(name, "null", start) for name, start in null.items()),
        *(Contender(name, "bytes", start) for name, start in files.items()),
        *_layered(),
    ]


CONTENDERS = {contender.name: contender for contender in _all()}
