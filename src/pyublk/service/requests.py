# SPDX-License-Identifier: MIT
"""What a disk's channel can be asked for: each request is one function here.

A request is named as its function; its arguments are the function's, but for the disk and the
conversation, with the types that it says. What it returns is made of JSON's types. What it raises
is told to the client.
"""

import inspect
import os
import threading
import types
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from pyublk import errors
from pyublk.device import Device
from pyublk.faults import BURST, Faults
from pyublk.layers import own_status, stack
from pyublk.service.listener import Conversation, version
from pyublk.service.records import Record
from pyublk.targets import Mirror
from pyublk.tracing import DEFAULT_MEGABYTES


class ServedDisk(Protocol):
    """A disk of this process, as a request finds it."""

    device: Device
    record: Record
    #: Another server has it now.
    handed_over: bool

    def resize(self, size: int, *, shrink: bool) -> None:
        """`Device.resize`, and its record."""

    def stop(self) -> None:
        """Stops it, and forgets it."""

    def hand_over(self, taken: Callable[[], bool]) -> bool:
        """`Device.hand_over`, and forgets it when another server has it."""


REQUESTS: dict[str, Callable[..., Any]] = {}

#: Seconds that a disk which is handed over may be without a server.
HELD_WITHIN = 60.0
#: Seconds that a trace lasts at most.
TRACED_WITHIN = 7 * 24 * 3600.0

#: How JSON calls its types.
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def request(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes it a request of every disk's channel."""
    REQUESTS[function.__name__] = function
    return function


def call(disk: ServedDisk, name: str, arguments: dict[str, Any], conversation: Conversation) -> Any:
    """What the request returns. Raises ValueError for arguments that it does not take."""
    function = REQUESTS[name]
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if parameters and parameters[0].name == "conversation":
        function = partial(function, conversation=conversation)
        del parameters[0]
    names = [parameter.name for parameter in parameters]
    for given in arguments:
        if given not in names:
            raise ValueError(
                f"{name} has no argument {given!r}; it takes {', '.join(names) or 'none'}"
            )
    hints = get_type_hints(REQUESTS[name])
    for parameter in parameters:
        if parameter.name not in arguments:
            if parameter.default is parameter.empty:
                raise ValueError(f"{name} needs {parameter.name!r}")
            continue
        allowed = _allowed(hints[parameter.name])
        if type(arguments[parameter.name]) not in allowed:
            words = " or ".join(_WORDS[kind] for kind in allowed)
            raise ValueError(f"{parameter.name} of {name} must be {words}")
    return function(disk, **arguments)


def _allowed(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@request
def stats(disk: ServedDisk) -> dict[str, Any]:
    """The counters of each queue and of all together, `errors` among them: failed requests; and
    the latencies by operation."""
    found = disk.device.stats()
    return {
        "total": asdict(found.total),
        "queues": [asdict(queue) for queue in found.queues],
        "latency": {name: histogram.told() for name, histogram in found.latency.items()},
    }


@request
def status(disk: ServedDisk) -> dict[str, Any]:
    """What the target says of itself, and how it is served."""
    device = disk.device
    prefix = f"ublk{device.id}-"
    return {
        "path": device.path,
        "state": str(device.state),
        "size": device.params.basic.size,
        "target": disk.record.plan.target,
        **_statuses(disk),
        "failed_requests": device.stats().total.errors,
        "data_path": str(device.data_path),
        "restart": disk.record.restarts and disk.record.restarts.told(),
        **_rules_of(disk),
        "pyublk": version(),
        "pid": os.getpid(),
        "threads": {
            thread.name: thread.native_id
            for thread in threading.enumerate()
            if thread.name.startswith(prefix)
        },
    }


def _statuses(disk: ServedDisk) -> dict[str, Any]:
    """What the target says of itself, and what each says of the stack that it is in."""
    found = stack(disk.device.target)
    target = found[-1] if disk.record.plan.layers else found[0]
    told = [{"class": type(one).__name__, "status": own_status(one)} for one in found]
    return {"target_status": target.status(), "stack": told if len(told) > 1 else None}


@request
def resize(disk: ServedDisk, size: int, shrink: bool = False) -> dict[str, Any]:
    """`Device.resize`; the record keeps the new size."""
    disk.resize(size, shrink=shrink)
    return {"size": disk.device.params.basic.size}


@request
def replace(disk: ServedDisk, leg: int, path: str | None = None) -> dict[str, Any]:
    """`Mirror.replace`: another file for a failed leg, or the same again."""
    target = stack(disk.device.target)[-1]
    if not isinstance(target, Mirror):
        raise ValueError(f"{disk.record.path} is not a mirror: only a mirror has legs")
    if path is not None:
        _check_absolute(path)
    target.replace(leg, None if path is None else Path(path))
    return {"target_status": target.status()}


def _check_absolute(path: str) -> None:
    if not os.path.isabs(path):
        raise ValueError(f"{path!r} must be an absolute path: the server has another directory")


@request
def trace(
    disk: ServedDisk, conversation: Conversation, path: str, megabytes: int = DEFAULT_MEGABYTES
) -> dict[str, Any]:
    """`Device.trace`. It is answered by the names of the files when it has begun; the client then
    sends the request `end_trace`, which is answered by what there was, when the files are written.
    They are also written when the client goes before, and after a week."""
    _check_absolute(path)
    recorded = disk.device.trace(path, megabytes=megabytes)
    files = [str(file) for file in recorded.files]
    try:
        conversation.goes_on({"files": files}, by="end_trace", within=TRACED_WITHIN)
    finally:
        summary = recorded.stop()
    return {"events": summary.events, "lost": summary.lost, "files": files}


@request
def faults(
    disk: ServedDisk,
    add: str | None = None,
    clear: bool = False,
    release: bool = False,
    number: int | None = None,
) -> dict[str, Any]:
    """Adds rules (`Faults.extend`), or clears all or that of a number, or releases what they hold.
    Returns the rules that there are, and the disk's limit."""
    rules = disk.device.faults
    if add is not None:
        rules.extend(add)
    one = rules if number is None else rules.find(number)
    if release:
        one.release()
    if clear:
        one.clear() if isinstance(one, Faults) else one.remove()
    return _rules_of(disk)


@request
def limit(
    disk: ServedDisk,
    iops: float | int | None = None,
    bandwidth: float | int | None = None,
    burst: float | int = BURST,
) -> dict[str, Any]:
    """`Device.limit`; without arguments, none any more. Returns what `faults` returns."""
    disk.device.limit(iops=iops, bandwidth=bandwidth, burst=burst)
    return _rules_of(disk)


@request
def cache(disk: ServedDisk, action: str = "info") -> dict[str, Any]:
    """`Cache.drain` or `Cache.invalidate` of the disk's cache, or nothing (`info`). Returns the
    status of the cache."""
    from pyublk.layers.cache import Cache  # few disks have one

    found = next((one for one in stack(disk.device.target) if isinstance(one, Cache)), None)
    if found is None:
        raise ValueError(f"{disk.record.path} has no cache")
    actions = {"info": found.status, "drain": found.drain, "invalidate": found.invalidate}
    if action not in actions:
        raise ValueError(f"cache takes {', '.join(actions)}, not {action!r}")
    done: dict[str, Any] = actions[action]()
    return done


def _rules_of(disk: ServedDisk) -> dict[str, Any]:
    rules = disk.device.faults
    limited = rules.disk_limit
    return {"faults": rules.told(), "limit": None if limited is None else limited.told()}


@request
def stop(disk: ServedDisk) -> None:
    """`Device.stop`; the server ends with its last disk. What was written to the disk is flushed
    through the target, but not the kernel's page cache: `pyublk stop` does that, and asks users."""
    disk.stop()
    if disk.handed_over:
        raise errors.DeviceClosed(f"{disk.record.path} has another server now, which can stop it")


@request
def hand_over(disk: ServedDisk, conversation: Conversation) -> None:
    """`Device.hand_over`. It is answered when nobody serves the disk any more; the client then
    takes it over, and says so by the request `held`. If that does not come, or the client goes
    before, the disk is served here again."""
    gone = disk.hand_over(lambda: conversation.goes_on(None, by="held", within=HELD_WITHIN))
    if not gone:
        raise errors.DeviceBusy(
            f"{disk.record.path} was not taken over by who asked for it, and is served here again"
        )
