# SPDX-License-Identifier: MIT
"""The kernel's own claim on a disk: whoever has it mounted, under another device, or otherwise for
himself, in whatever namespace, is in its way, and nobody else gets it while it is held."""

import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from pyublk import errors
from pyublk.claiming import BEGINS, Claim
from pyublk.control import Controller, DeviceInfo
from pyublk.service.usage import Use, opened, uses
from pyublk.uapi import DeviceStatus, Feature

#: Seconds for those who open a disk in passing, as udev does.
_PASSING = 1.0


def refuse_if_used(device: DeviceInfo) -> None:
    """Raises DeviceBusy that names every use of the disk."""
    if found := uses(f"ublkb{device.id}"):
        raise errors.DeviceBusy("; ".join(str(use) for use in found))


def take(
    controller: Controller,
    device: DeviceInfo,
    held: ExitStack,
    timeout: float,
    *,
    force: bool,
    safe: bool = False,
) -> bool:
    """Takes a live disk from everybody else, unless `force`, and makes what was written to it
    durable; whether it is stopped already. Else nobody can claim it until `held` is closed.

    `safe`: who only reads is asked, too. Raises DeviceBusy, OSError, and TimeoutError after
    `timeout` seconds without progress.
    """
    if device.status is not DeviceStatus.LIVE:
        return False
    until = math.inf
    name = f"ublkb{device.id}"
    while True:
        claim = held.enter_context(Claim(device.path, exclusive=not force))
        if not _flush(device, claim, timeout, force=force):
            return False
        others = opened(name, but=claim.pid)
        readers = all(use.how == "open" for use in others)
        if safe and others:
            claim.close()
            if time.monotonic() > until:
                raise _in_use(device, others)
            until = min(until, time.monotonic() + _PASSING)
            time.sleep(0.05)
            continue
        if force or (readers and others):
            return False
        if readers and not controller.features().has(Feature.SAFE_STOP_DEV):
            return False
        claim.close()
        if not readers:  # who began to write since is refused like the others
            continue
        try:
            # Nobody can come between: it is refused when somebody has opened the disk since.
            controller.safe_stop(device.id, deadline=timeout)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return True
            if error.errno != errno.EBUSY:
                raise
            if not opened(name):
                if time.monotonic() > until:
                    raise _in_use(device, ()) from None
                until = min(until, time.monotonic() + _PASSING)
        else:
            return True


def _flush(device: DeviceInfo, claim: Claim, timeout: float, *, force: bool) -> bool:
    """Whether the disk was claimed and flushed; not when somebody else is taking it down, with whom
    its page cache is written back."""
    name = f"ublkb{device.id}"
    if claim.step(BEGINS) is None:
        raise TimeoutError(
            f"{device.path} could not be opened: no process began to do so within {BEGINS:g} s"
        )
    for verb in ("opened", "flushed"):
        results: list[int] = []

        def step(seconds: float, results: list[int] = results) -> bool:
            result = claim.step(seconds)
            results.extend([] if result is None else [result])
            return result is not None

        if not patiently(step, device, timeout):
            raise TimeoutError(
                f"{device.path} could not be {verb}: its server (process {device.server_pid}) "
                f"answered nothing for {timeout:g} s"
            )
        number = results[0]
        if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return False
        if number == errno.EBUSY and verb == "opened":
            raise _in_use(device, uses(name) + opened(name, but=claim.pid))
        if number:
            error = OSError(
                number,
                f"{device.path} could not be {verb}: {os.strerror(number)}; it is left as it is",
            )
            error.add_note("--force stops it anyway: data that was not written is lost")
            raise error
        if verb == "opened" and not force:
            _refuse_if_written(device, claim)
    return True


def _refuse_if_written(device: DeviceInfo, claim: Claim) -> None:
    """To have a disk open without claiming it is a use where something can be lost by the stop:
    that of who writes, or serves it as another disk. Who only reads is not asked."""
    until = time.monotonic() + _PASSING
    while True:
        found = [u for u in opened(f"ublkb{device.id}", but=claim.pid) if u.how != "open"]
        if not found:
            return
        if time.monotonic() > until:
            raise _in_use(device, found)
        time.sleep(0.05)


def _in_use(device: DeviceInfo, found: Sequence[Use]) -> errors.DeviceBusy:
    told = "; ".join(str(use) for use in found)
    return errors.DeviceBusy(told or f"{device.path} is in use by something that cannot be found")


def patiently(wait: Callable[[float], bool], device: DeviceInfo, timeout: float) -> bool:
    """Repeats `wait(seconds)` until it is true; false after `timeout` s without answered I/O."""
    last = -1
    until = 0.0
    while not wait(min(0.1, timeout)):
        if (now := _requests_answered(device)) != last:
            last, until = now, time.monotonic() + timeout
        elif time.monotonic() > until:
            return False
    return True


def _requests_answered(device: DeviceInfo) -> int:
    """Reads, writes, discards and flushes that have ended (Documentation/block/stat.rst)."""
    try:
        fields = Path(f"/sys/class/block/ublkb{device.id}/stat").read_text().split()
    except OSError:  # the disk is being taken down
        return 0
    # The other fields also change while requests merely wait.
    return sum(int(fields[place]) for place in (0, 4, 11, 15))
