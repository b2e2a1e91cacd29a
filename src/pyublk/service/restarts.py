# SPDX-License-Identifier: MIT
"""Whether a disk's server is started again by itself when it ends, how often, and why not.

A server tells its helper process what to execute then (`watch_over`): the program of `restarting`.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pyublk.control import Controller
from pyublk.defects import defects_of
from pyublk.features import Features
from pyublk.layers import first_that_forgets
from pyublk.options import DiskOptions
from pyublk.recovery import RESEND_FLAGS, Recovery
from pyublk.target import Target
from pyublk.targets import Ram

#: Restarts of a disk in so many seconds; after the last, the disk is deleted.
LIMIT = 5
WINDOW = 600.0
#: Seconds before each of them.
PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)

PROGRAM = [sys.executable, "-P", "-m", "pyublk.service.restarting"]


def now() -> float:
    """Seconds since the machine was started: no other clock goes on evenly from one server to the
    next."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """What a disk's record says of it: whether its server is restarted, or `why_not`; how often it
    was, and when (by `now`) within the last WINDOW."""

    why_not: str | None = None
    count: int = 0
    times: tuple[float, ...] = ()

    @property
    def on(self) -> bool:
        return self.why_not is None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Of what `dataclasses.asdict` made of one, by way of JSON. Raises TypeError, KeyError or
        ValueError for what it cannot have made."""
        why_not, times = fields["why_not"], tuple(float(time) for time in fields["times"])
        if not isinstance(why_not, str | None) or type(fields["count"]) is not int:
            raise TypeError(fields)
        return cls(why_not=why_not, count=fields["count"], times=times)

    def pause(self, at: float) -> float | None:
        """Seconds to wait before the next restart; None: there were too many."""
        recent = len(self._recent(at))
        return PAUSES[recent] if recent < LIMIT else None

    def counted(self, at: float) -> "Restarts":
        """With one more."""
        return replace(self, count=self.count + 1, times=(*self._recent(at), at))

    def _recent(self, at: float) -> tuple[float, ...]:
        return tuple(time for time in self.times if at - WINDOW < time <= at)

    def told(self) -> dict[str, Any]:
        """For programs: whether, why not, how often so far, and the last time by the wall clock."""
        return {
            "on": self.on,
            "why_not": self.why_not,
            "count": self.count,
            "last": time.time() - now() + self.times[-1] if self.times else None,
        }

    def words(self) -> str:
        """As `pyublk info` says it."""
        if not self.on:
            return f"no: {self.why_not}"
        return f"yes, at most {LIMIT} times in {WINDOW / 60:g} minutes"

    def history(self) -> str | None:
        """How often, and when last, in words."""
        if not self.count:
            return None
        last = time.localtime(time.time() - now() + self.times[-1])
        return f"{self.count}, the last on {time.strftime('%Y-%m-%d at %H:%M:%S', last)}"


def decide(
    asked: DiskOptions,
    target: Target,
    features: Features,
    *,
    background: bool,
    there: Recovery | None = None,
) -> Restarts:
    """Whether the server of a disk is to be restarted; `there` is what becomes of a disk that is
    there already, `background` whether its server is a process of its own.

    Raises ValueError for a new disk whose server is asked to be, and cannot be, and for a
    hang_timeout that has no use or is too short for the target.
    """
    why_not = _why_not(asked, target, features, background, there)
    if there is None and asked.get("restart") and why_not is not None:
        raise ValueError(f"the disk's server cannot be restarted: {why_not}")
    if there is None and (hang := asked.get("hang_timeout")) is not None:
        if why_not is not None:
            raise ValueError(f"hang_timeout is for a server that is restarted: {why_not}")
        if hang <= target.max_stall:
            raise ValueError(
                f"hang_timeout must be above {target.max_stall:g} s, for which "
                f"{type(target).__name__} may be silent without hanging, not {hang:g}"
            )
    return Restarts(why_not=why_not)


def _why_not(
    asked: DiskOptions,
    target: Target,
    features: Features,
    background: bool,
    there: Recovery | None,
) -> str | None:
    mode = there or asked.get("recovery")
    if asked.get("restart") is False:
        return "it was added so"
    if not background:
        return "it is served in the foreground"
    if mode == Recovery.NONE:
        return "it was added with recovery=none"
    if asked.get("shared_memory"):
        return "it shares memory with clients, which another server has not"
    forgets = first_that_forgets(target)
    if forgets is not None and not isinstance(target, Ram):  # which can be: `Ram.keep`
        return f"the class {type(forgets).__name__} does not say that it is recoverable"
    if mode is not None or asked.get("restart"):
        return None
    if (reason := features.reason(RESEND_FLAGS)) is not None:
        return f"recovery {reason}"
    for defect in defects_of(features.kernel_release):
        if defect.of_recovery:
            return f"Linux {features.kernel_release}: {defect.what}"
    return None


def watch_over(device: int, cookie: int, *, memory: int | None, hang_timeout: float | None) -> None:
    """Has this process's helper execute PROGRAM, in place of the device's deletion, when this
    process ends without having stopped the disk. When the disk answers nothing for `hang_timeout`
    seconds although it has requests, the helper kills this process. `memory` is the descriptor of a
    file in memory that has the disk's data, which the helper keeps for the next server. Raises
    OSError."""
    words = [*map(os.fsencode, PROGRAM), b""]
    words += [key + b"=" + value for key, value in os.environb.items()]
    program = os.memfd_create("pyublk-restarting")
    try:
        with open(program, "wb", closefd=False) as file:
            file.write(b"".join(word + b"\0" for word in words))
        with Controller() as controller:
            helper, deadline = controller.helper, controller.deadline
            result = helper.restart_by(program, deadline=deadline)
            if result == 0:
                hang_ms = 0 if hang_timeout is None else max(1, round(hang_timeout * 1000))
                result = helper.guard(
                    device,
                    cookie,
                    True,
                    restarted=True,
                    memory=-1 if memory is None else memory,
                    hang_ms=hang_ms,
                    deadline=deadline,
                )
    finally:
        os.close(program)
    if result < 0:
        raise OSError(
            -result,
            f"the helper process could not be told to restart the server of device {device}: "
            f"{os.strerror(-result)}",
        )
