# SPDX-License-Identifier: MIT
"""The module `nbdkit` that a plugin written for nbdkit imports, with this process in its place.

Its functions and constants are those of nbdkit 1.32's Python plugin, and do what they do there.
"""

import errno
import logging
import re
import sys
import threading
import types
from collections.abc import Callable

log = logging.getLogger("pyublk.nbdkit")

THREAD_MODELS = (
    "THREAD_MODEL_SERIALIZE_CONNECTIONS",
    "THREAD_MODEL_SERIALIZE_ALL_REQUESTS",
    "THREAD_MODEL_SERIALIZE_REQUESTS",
    "THREAD_MODEL_PARALLEL",
)
SERIALIZE_ALL_REQUESTS, PARALLEL = 1, 3
MAY_TRIM, FUA = 1, 2
FUA_EMULATE, FUA_NATIVE = 1, 2
#: What `zero` sets to have zeroes written instead.
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP)

_CONSTANTS = {name: value for value, name in enumerate(THREAD_MODELS)} | {
    "FLAG_MAY_TRIM": MAY_TRIM,
    "FLAG_FUA": FUA,
    "FLAG_REQ_ONE": 4,
    "FLAG_FAST_ZERO": 8,
    "FUA_NONE": 0,
    "FUA_EMULATE": FUA_EMULATE,
    "FUA_NATIVE": FUA_NATIVE,
    "CACHE_NONE": 0,
    "CACHE_EMULATE": 1,
    "CACHE_NATIVE": 2,
    "EXTENT_HOLE": 1,
    "EXTENT_ZERO": 2,
}
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60, "s": 9}
_LARGEST = (1 << 63) - 1


class _Call(threading.local):
    """What belongs to the call of a plugin that a thread is in."""

    error = 0
    export = ""
    shut_down: Callable[[str], None] | None = None


call = _Call()


def debug(msg: str) -> None:
    """To the disk's log, where that has debug messages."""
    log.debug("%s", msg)


def export_name() -> str:
    """What the disk was given as `export_name`, else the plugin's default export."""
    return call.export


def set_error(err: int) -> None:
    """The errno of the exception that is about to be raised."""
    call.error = int(err)


def shutdown() -> None:
    """Fails every later request of the disk: whether it is stopped is for its user to say."""
    if call.shut_down is not None:
        call.shut_down("it called nbdkit.shutdown")


def parse_size(text: str) -> int:
    """Bytes of a text such as 100M; "s" counts sectors of 512 bytes.

    Raises ValueError also for what nbdkit 1.48 and older ones take for different sizes.
    """
    if not isinstance(text, str):
        raise TypeError("Expected string, got something else")
    found = re.fullmatch(r"\s*\+?([0-9]+)([a-zA-Z]?)", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("Unable to parse string as size")
    if re.match("0[0-9]", found[1]):
        raise ValueError(f"{text!r} is octal since nbdkit 1.48 only: leave out its leading zeros")
    size = int(found[1]) << _UNITS[found[2].lower()]
    if size > _LARGEST:
        raise ValueError("Unable to parse string as size")
    return size


def _make() -> types.ModuleType:
    module = types.ModuleType("nbdkit", "nbdkit's API for plugins, emulated by pyublk.")
    for function in (debug, export_name, parse_size, set_error, shutdown):
        setattr(module, function.__name__, function)
    for name, value in _CONSTANTS.items():
        setattr(module, name, value)
    return module


MODULE = _make()


def install() -> None:
    """Makes `import nbdkit` find it. Raises ValueError in nbdkit's own process."""
    if sys.modules.setdefault("nbdkit", MODULE) is not MODULE:
        raise ValueError(
            "this process has another module of the name nbdkit: if it is nbdkit itself, have it "
            "run the plugin without pyublk"
        )
