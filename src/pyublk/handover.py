# SPDX-License-Identifier: MIT
"""How a device's requests go from one server to the next: what both must have in common, and how
the one ends and the other begins.

The kernel's order is fixed. The old server closes its queues, then its char device, which the
kernel takes for its end; START_USER_RECOVERY; the new one opens the char device and fetches every
tag; END_USER_RECOVERY.
"""

import errno
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from pyublk import errors
from pyublk.claiming import BEGINS, Claim
from pyublk.kernel_disk import KernelDisk
from pyublk.paths import PathChoice, path_of
from pyublk.profile import Profile
from pyublk.recovery import Recovery, differences, shortcomings
from pyublk.session import Session
from pyublk.target import Target
from pyublk.uapi import Feature

log = logging.getLogger("pyublk.device")

#: Seconds that one quiesce waits for the server's answers.
ANSWERED_WITHIN = 0.5
#: Seconds between two of them: what was busy in one is told by the next.
QUIESCE_AGAIN = 0.1


def check_fits(target: Target, profile: Profile, kernel: KernelDisk) -> PathChoice:
    """The data path by which the target can be served as this disk, which stays as it is.

    Raises ValueError that names all in which they differ.
    """
    info, params = kernel.info, kernel.params
    choice = path_of(info.flags)
    found = []
    if choice.path not in profile.paths:
        able = ", ".join(profile.paths)
        found.append(f"the data path {choice.path}, and the target is served by {able}")
    if missing := profile.needs & ~info.flags:
        found.append(f"no {missing.name}, which the target needs")
    zero_copy = Feature.SUPPORT_ZERO_COPY in info.flags
    wished = profile.params(params.basic.max_io_size, zero_copy=zero_copy)
    found += differences(wished, params) if info.ours else shortcomings(wished, params)
    if found:
        raise ValueError(
            f"{type(target).__name__} cannot serve {info.path}: the disk has {'; '.join(found)}"
        )
    return choice


def quiesces(kernel: KernelDisk) -> bool:
    """Whether the kernel can hold back the device's requests, and fails none of them: from
    QUIESCE_DEV on, Linux 7.3.4 fails those of a device with batch I/O."""
    return Feature.QUIESCE in kernel.info.flags and Feature.BATCH_IO not in kernel.info.flags


def open_when_free(session: Session, deadline: float) -> Profile:
    """Opens the session's target, whose files another server may be about to let go: it keeps one
    until what it wrote last is written."""
    until = time.monotonic() + deadline
    while True:
        try:
            return session.open_target(new=False)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def end_by_quiesce(
    kernel: KernelDisk, session: Session, *, patience: float, give_up: Callable[[], list[str]]
) -> list[str]:
    """Has the kernel hold back new requests, and the session answer what it has. Returns the stacks
    of the handlers that were given up after `patience` seconds.

    What the first QUIESCE_DEV raises leaves the session as it is.
    """
    session.suspend_faults(True)
    try:
        kernel.quiesce(min(patience, ANSWERED_WITHIN))
    except BaseException:
        session.suspend_faults(False)
        raise
    hung: list[str] = []
    again = time.monotonic() + QUIESCE_AGAIN

    def over() -> bool:
        nonlocal again
        if session.all_ended():
            return True
        if time.monotonic() > again:
            with suppress(OSError):  # the first has succeeded, and there is no way back
                kernel.quiesce(ANSWERED_WITHIN)
            again = time.monotonic() + QUIESCE_AGAIN
        return False

    if not session.progress_until(over, patience=patience, idle=patience):
        hung = give_up()
        session.progress_until(over, patience=1.0, idle=1.0)
    return hung


def needs_flush(kernel: KernelDisk) -> bool:
    """Whether the kernel, to stop it, would throw away what its page cache holds: it gives up what
    a server, had it ended, would not have seen."""
    return kernel.recovery is Recovery.RESEND


def flush(
    kernel: KernelDisk, session: Session, *, patience: float, enough: Callable[[], bool]
) -> None:
    """Has what clients wrote to the disk written to the target, by another process, since nothing
    can interrupt who waits for it. One that hangs ends with the disk."""
    with ExitStack() as held:
        claim = held.enter_context(Claim(kernel.info.path, exclusive=False))
        results: list[int] = []

        def begun() -> bool:
            return claim.step(0) is not None

        def flushed() -> bool:
            while (result := claim.step(0)) is not None:
                results.append(result)
                if result or len(results) == 2:  # opened, and flushed
                    return True
            return False

        if not (
            session.progress_until(begun, patience=BEGINS, idle=BEGINS, enough=enough)
            and session.progress_until(flushed, patience=patience, idle=patience, enough=enough)
        ):
            log.warning("%s is stopped without a flush, which hangs", kernel.info.path)
        elif results[-1] and len(results) == 2:
            log.warning(
                "%s is stopped, and what was written is lost: %s",
                kernel.info.path,
                errors.described(results[-1]),
            )


def handler_timeout(
    target: Target, kernel: KernelDisk, stacks: list[str], *, successor: Target | None = None
) -> errors.HandlerTimeout:
    """For handlers that were given up at a disk's end, or when another target took their place."""
    who = "a handler" if len(stacks) == 1 else f"{len(stacks)} handlers"
    outcome = (
        f"every request of a queue is in its hands, and Linux before 6.16 keeps such a disk until "
        f"its server ends: {kernel.info.path} goes half a minute after this process"
        if kernel.kept
        else f"every request it held was failed, and {kernel.info.path} was deleted"
    )
    if successor is not None:
        now = type(successor).__name__
        outcome = f"every request it held was failed, and {kernel.info.path} is now served by {now}"
    error = errors.HandlerTimeout(f"{who} of {type(target).__name__} never returned: {outcome}")
    for stack in stacks:
        error.add_note(stack)
    return error
