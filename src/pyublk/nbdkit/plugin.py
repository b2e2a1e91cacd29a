#!/usr/sbin/nbdkit python
# SPDX-License-Identifier: MIT
"""The plugin by which nbdkit serves a target: ``nbdkit python plugin.py target=ram size=1G``.

Parameters: ``target``, ``arguments`` (once for each), ``size``, ``block_size``, ``read_only``, and
the options of the target's class; or ``spec=FILE``, a disk's description as JSON.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import nbdkit  # type: ignore[import-not-found]  # nbdkit's own

# nbdkit's interpreter finds the packages of its own distribution only.
sys.path.append(str(Path(__file__).resolve().parents[2]))


def give_up(error: BaseException | str) -> NoReturn:
    """Ends nbdkit with a sentence: what it makes of an exception is a traceback."""
    text = error
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename!r}" if error.filename else "")
    elif isinstance(error, BaseException) and not str(error):
        text = repr(error)
    print(f"nbdkit: pyublk: {text}", file=sys.stderr, flush=True)
    os._exit(1)


try:
    from pyublk.nbdkit import serving
    from pyublk.service.plan import DiskSpec
except ImportError as error:
    found = sorted(Path(__file__).resolve().parents[1].glob("_native.*.so"))
    give_up(
        f"nbdkit runs plugins by Python {sys.version_info[0]}.{sys.version_info[1]}, which cannot "
        f"load this pyublk ({error}; its core is {found[0].name if found else 'missing'}): "
        "install pyublk for that Python"
    )

API_VERSION = 2

_parameters: list[tuple[str, str]] = []
_directory = os.getcwd()
_serving: "serving.Serving"


def config(key: str, value: str) -> None:
    """Takes a parameter."""
    _parameters.append((key, value))


def config_complete() -> None:
    """Makes the target."""
    global _serving
    try:
        _serving = serving.Serving(_spec().make_target())
    except Exception as error:
        give_up(error)


def _spec() -> "DiskSpec":
    given = dict(_parameters)
    if "spec" in given:
        if len(_parameters) > 1:
            raise ValueError("spec excludes all other parameters")
        return DiskSpec.from_fields(json.loads(Path(given["spec"]).read_text()))
    if "target" not in given:
        raise ValueError("target=NAME is missing, such as target=file arguments=disk.img")
    table: dict[str, Any] = {"target": given.pop("target")}
    table["arguments"] = [value for key, value in _parameters if key == "arguments"]
    given.pop("arguments", None)
    for name in ("size", "block_size"):
        if name in given:
            table[name] = given.pop(name)
    if "read_only" in given:
        table["read_only"] = given.pop("read_only").lower() in ("1", "yes", "true", "on")
    return DiskSpec.of_table(table | {"options": given})


def thread_model() -> int:
    """As the target's `concurrency`."""
    if _serving.is_parallel:
        model: int = nbdkit.THREAD_MODEL_PARALLEL
    elif _serving.target.concurrency == "per_queue":
        model = nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
    else:
        model = nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS
    return model


def after_fork() -> None:
    """Opens the target, of which every connection has the same."""
    try:
        os.chdir(_directory)  # where relative paths begin, and which is not to be kept busy
        _serving.open()
        os.chdir("/")
        if _parameters[0][0] == "spec":
            _outlive_parent()
    except Exception as error:
        give_up(error)
    block = _serving.block_sizes[0]
    print(f"pyublk: serves {_serving.size} bytes in blocks of {block}", file=sys.stderr, flush=True)


def cleanup() -> None:
    """Closes it."""
    if hasattr(_serving, "params"):
        _serving.close()


def _outlive_parent() -> None:
    """nbdkit 1.32 ends with its parent, which it looked whether it could. [main thread]"""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, 0, 0, 0, 0)


def open(readonly: bool) -> bool:  # noqa: A001 - nbdkit's name
    """A connection."""
    return readonly


def get_size(h: bool) -> int:
    """Bytes."""
    return _serving.size


def block_size(h: bool) -> tuple[int, int, int]:
    """Least, best and most bytes of a request."""
    return _serving.block_sizes


def is_rotational(h: bool) -> bool:
    """Whether it turns."""
    return _serving.params.basic.rotational


def can_multi_conn(h: bool) -> bool:
    """All connections have the same target, and a flush is one for all."""
    return True


def can_write(h: bool) -> bool:
    """Whether it can be written."""
    return not h and _serving.can("write")


def can_flush(h: bool) -> bool:
    """Whether it has a volatile cache."""
    return _serving.can("flush")


def can_trim(h: bool) -> bool:
    """Whether it takes discards."""
    return _serving.can("discard")


def can_zero(h: bool) -> bool:
    """Whether it makes zeroes; else nbdkit writes them."""
    return _serving.can("write_zeroes")


def can_fua(h: bool) -> int:
    """How a write is made durable at once."""
    how = nbdkit.FUA_NONE
    if _serving.can("write_fua"):
        how = nbdkit.FUA_NATIVE
    elif _serving.can("flush"):
        how = nbdkit.FUA_EMULATE
    return int(how)


class _Told:
    """Tells nbdkit the errno of what is raised."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            nbdkit.set_error(serving.errno_of(error))


_told = _Told()


def pread(h: bool, buf: memoryview, offset: int, flags: int) -> None:
    """Reads."""
    with _told:
        _serving.read(buf, offset)


def pwrite(h: bool, buf: memoryview, offset: int, flags: int) -> None:
    """Writes."""
    with _told:
        _serving.write(buf, offset, fua=bool(flags & nbdkit.FLAG_FUA))


def flush(h: bool, flags: int) -> None:
    """Flushes."""
    with _told:
        _serving.flush()


def trim(h: bool, count: int, offset: int, flags: int) -> None:
    """Discards."""
    with _told:
        _serving.discard(count, offset, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(h: bool, count: int, offset: int, flags: int) -> None:
    """Makes zeroes."""
    with _told:
        unmap = bool(flags & nbdkit.FLAG_MAY_TRIM)
        _serving.write_zeroes(count, offset, unmap=unmap, fua=bool(flags & nbdkit.FLAG_FUA))
