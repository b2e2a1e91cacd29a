# SPDX-License-Identifier: MIT
"""The steps of a disk's life, in which the kernel's device and the session that serves it meet."""

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable

from pyublk import errors
from pyublk.kernel_disk import KernelDisk
from pyublk.options import DeviceOptions, number_of_queues
from pyublk.paths import PathChoice, choose_path
from pyublk.queue_servers import OwnThreads
from pyublk.scheduling import checked_affinity
from pyublk.servers import Servers
from pyublk.session import Session
from pyublk.sharing import Sharing
from pyublk.stats import DeviceStats
from pyublk.target import Target
from pyublk.uapi import ControlCommand, Feature


class Lifecycle:
    """Takes each step once, in this order: `configure`, `begin_serving`, `go_live`, `stop`,
    `release`. Who takes them, and when, is the `Device`'s business."""

    def __init__(self, target: Target, asked: DeviceOptions, on: Servers | None) -> None:
        depth, threads = asked["depth"], asked["threads"]
        if threads > depth:
            raise ValueError(f"threads must be 1 to the depth, {depth}, not {threads}")
        self.session = Session(
            target,
            threads=threads,
            workers=asked["workers"],
            shared_memory=asked["shared_memory"],
            trim_after=asked["trim_after"],
            provider=OwnThreads(preempt=asked["preempt"]) if on is None else on,
        )
        self.kernel: KernelDisk | None = None
        self.sharing: Sharing | None = None
        self.choice: PathChoice | None = None
        self._asked = asked
        self._on = on
        self._queues = number_of_queues(asked)
        self._affinity = checked_affinity(asked["affinity"], self._queues)
        self._final_stats: DeviceStats | None = None
        self._on_shared_loop = False

    def disk(self) -> KernelDisk:
        """The kernel's device; raises DeviceClosed before there is one."""
        if self.kernel is None:
            raise errors.DeviceClosed("the device does not exist before it is started")
        return self.kernel

    def stats(self) -> DeviceStats:
        """Counters since the start; after the end, the last ones."""
        return self.session.stats() if self._final_stats is None else self._final_stats

    def configure(self) -> None:
        """Opens the target, and adds a device of the kernel's that fits it."""
        asked = self._asked
        kernel = self.kernel = KernelDisk(deadline=asked["deadline"], waits=self._on is None)
        profile = self.session.open_target()
        features = kernel.features()
        if asked["threads"] > 1:
            features.require(Feature.PER_IO_DAEMON)
        choice = self.choice = choose_path(
            profile.paths,
            features,
            path=asked["path"],
            batch=asked["batch"],
            depth=asked["depth"],
            needed=profile.needs | _needed(asked),
        )
        zero_copy = Feature.SUPPORT_ZERO_COPY in choice.flags
        params = profile.params(asked["max_io_size"], zero_copy=zero_copy)
        device = kernel.add(
            queues=self._queues,
            depth=asked["depth"],
            max_io_size=asked["max_io_size"],
            id=asked["id"],
            flags=choice.flags,
        )
        if asked["shared_memory"]:
            by_handler = weakref.WeakMethod(self.session.runs_here)
            self.sharing = Sharing(kernel.controller, device.id, by_handler)
        kernel.set_params(params)

    def begin_serving(self, *, on_this_loop: bool, failed: Callable[[], None]) -> None:
        """Has every queue made and fetched; `failed` is called when one fails."""
        kernel = self.disk()
        assert kernel.char_device is not None
        if on_this_loop and self._on is not None:
            self._on.enter_loop()
            self._on_shared_loop = True
        self.session.begin(
            kernel.char_device,
            kernel.info,
            table=None if self.sharing is None else self.sharing.table,
            cpus_of=self._cpus_of,
            on_this_loop=on_this_loop,
            failed=failed,
        )

    def _cpus_of(self, queues: list[int]) -> frozenset[int] | None:
        affinity = self._affinity
        if affinity is None or self._on is not None:
            return None
        if affinity != "auto":
            return frozenset[int]().union(*(affinity[queue] for queue in queues))
        return (self.disk().queue_cpus(queues) & os.sched_getaffinity(0)) or None

    def go_live(self) -> None:
        """START_DEV, once every tag is fetched; returns when the disk can be used."""
        kernel, deadline = self.disk(), self._asked["deadline"]
        until = time.monotonic() + deadline
        if not self.session.primed(deadline):
            raise errors.InternalError(f"a queue was not primed within {deadline:g} s")
        self._raise_if_over()  # START_DEV after somebody's STOP_DEV would crash the kernel
        kernel.start()
        self.session.raise_error()
        kernel.await_node(until, self._raise_if_over)
        kernel.choose_scheduler(self._asked["io_scheduler"], deadline)
        kernel.refresh()

    def _raise_if_over(self) -> None:
        self.session.raise_error()
        if self.session.one_ended():
            device = self.disk().info.id
            raise errors.DeviceLost(f"device {device} was stopped while it was started")

    def stop(self, patience: float, enough: Callable[[], bool]) -> list[str]:
        """STOP_DEV, if it was added; returns the stacks of the handlers that were given up, after
        `patience` seconds without progress, or when it is `enough`."""
        if self.kernel is None or not self.kernel.exists:
            return []
        deadline = self._asked["deadline"]
        return stop_serving(
            self.kernel, self.session, patience=patience, deadline=deadline, enough=enough
        )

    def release(self) -> None:
        """Gives back all but the target, also after a start that failed half-way."""
        kernel, session = self.kernel, self.session
        try:
            if kernel is not None:
                kernel.close_char_device()
                kernel.delete()
        finally:
            if self.sharing is not None:
                self.sharing.over(unused=session.all_ended())
            if kernel is not None:
                kernel.close()
            self._final_stats = self.stats()
            session.dismiss()
            if self._on_shared_loop and self._on is not None:
                self._on.leave_loop()
                self._on_shared_loop = False


def _needed(asked: DeviceOptions) -> Feature:
    """The device features that such a disk cannot do without."""
    needed = Feature(0) if asked["partition_scan"] else Feature.NO_AUTO_PART_SCAN
    return needed | Feature.SHMEM_ZC if asked["shared_memory"] else needed


def stop_serving(
    kernel: KernelDisk,
    session: Session,
    *,
    patience: float,
    deadline: float,
    enough: Callable[[], bool],
) -> list[str]:
    """STOP_DEV beside the serving threads; see `Lifecycle.stop`."""
    session.primed(deadline)  # a fetch that came after the stop would stay
    failure: list[BaseException] = []
    stopped = threading.Event()

    def stop_device() -> None:
        try:
            kernel.stop(max(deadline, patience) + 24 * 3600)
        except BaseException as error:
            failure.append(error)
        stopped.set()
        session.moved.set()

    name = f"ublk{kernel.info.id}-stop"
    stopper = threading.Thread(target=stop_device, name=name, daemon=True)
    stopper.start()
    hung: list[str] = []
    try:
        if not session.progress_until(
            lambda: stopped.is_set() and session.all_ended(),
            patience=patience,
            idle=deadline,
            enough=enough,
        ):
            hung = _give_up_hanging(kernel, session)
    finally:
        if not kernel.kept:
            stopper.join(deadline)
    if kernel.kept:
        return hung
    if stopper.is_alive():
        raise errors.command_error(
            ControlCommand.STOP_DEV,
            errno.ETIMEDOUT,
            device=kernel.info.id,
            detail="still waiting",
        )
    if failure and getattr(failure[0], "errno", None) != errno.ENODEV:  # else: deleted already
        raise failure[0]
    return hung


def _give_up_hanging(kernel: KernelDisk, session: Session) -> list[str]:
    hanging = session.give_up()
    kernel.close_char_device(in_use=not session.all_ended())
    if hanging.holds_queue:
        kernel.give_up_queue()
    return hanging.stacks


def handler_timeout(target: Target, kernel: KernelDisk, stacks: list[str]) -> errors.HandlerTimeout:
    """For handlers that were given up at a disk's end."""
    who = "a handler" if len(stacks) == 1 else f"{len(stacks)} handlers"
    outcome = (
        f"every request of a queue is in its hands, and Linux before 6.16 keeps such a disk until "
        f"its server ends: {kernel.info.path} goes half a minute after this process"
        if kernel.kept
        else f"every request it held was failed, and {kernel.info.path} was deleted"
    )
    error = errors.HandlerTimeout(f"{who} of {type(target).__name__} never returned: {outcome}")
    for stack in stacks:
        error.add_note(stack)
    return error
