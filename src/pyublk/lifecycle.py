# SPDX-License-Identifier: MIT
"""The steps of a disk's life, in which the kernel's device and the session that serves it meet."""

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pyublk import errors
from pyublk.defects import defects_of
from pyublk.faults import Faults
from pyublk.features import Features
from pyublk.handover import check_fits, end_by_quiesce, flush, needs_flush, open_when_free, quiesces
from pyublk.kernel_disk import KernelDisk
from pyublk.options import DeviceOptions, number_of_queues
from pyublk.paths import PathChoice, choose_path
from pyublk.queue_servers import OwnThreads
from pyublk.recovery import Recovery, recovery_flags, resends
from pyublk.scheduling import Affinity, checked_affinity
from pyublk.servers import Servers
from pyublk.session import Session
from pyublk.sharing import Sharing
from pyublk.stats import DeviceStats
from pyublk.target import Target
from pyublk.tracing import Trace
from pyublk.uapi import SECTOR_SIZE, ControlCommand, Feature

if TYPE_CHECKING:  # event loops are for disks that need one
    import asyncio

log = logging.getLogger("pyublk.device")

T = TypeVar("T")


class DeviceState(StrEnum):
    """The state of a `Device`; a stopped one cannot be started again."""

    CREATED = "created"
    CONFIGURED = "configured"
    STARTING = "starting"
    LIVE = "live"
    STOPPING = "stopping"
    STOPPED = "stopped"


#: Seconds in which queues that serve nothing any more, or nothing yet, are left.
LEAVES = 5.0


class Lifecycle:
    """Takes each step once, in this order: `configure`, `begin_serving`, `go_live`, `stop`,
    `release`; and `swap`, while it lives. Who takes them, and when, is the `Device`'s business.

    `adopted`: the id of a device that is there, and is taken over, also if it is `foreign`; `ask`
    has its server hand it over, if it has one.
    """

    def __init__(
        self,
        target: Target,
        asked: DeviceOptions,
        on: Servers | None,
        faults: Faults,
        *,
        adopted: int | None = None,
        ask: Callable[[], None] | None = None,
        foreign: bool = False,
    ) -> None:
        _check_servers(on, asked["affinity"])
        self._adopted = adopted
        self._ask = ask
        self._foreign = foreign
        self._asked = asked
        self._on = on
        self._faults = faults
        if adopted is None:
            _check_threads(asked["threads"], asked["depth"])
            self._queues = number_of_queues(asked)
            self._affinity = checked_affinity(asked["affinity"], self._queues)
        if asked["shared_memory"] and asked["recovery"] != Recovery.NONE:
            raise ValueError(
                "recovery does not go together with shared_memory, which another server has not"
            )
        self.session = self._new_session(target)
        #: The event loop that coroutines are served on; None: on one of their own.
        self.loop: asyncio.AbstractEventLoop | None = None
        self.kernel: KernelDisk | None = None
        self.sharing: Sharing | None = None
        self.choice: PathChoice | None = None
        #: Although it has recovery, it is deleted with this process, until the helper is told
        #: otherwise.
        self.stays_guarded = False
        self._live = False
        self._final_stats: DeviceStats | None = None
        self._earlier = DeviceStats(())  # of targets that were swapped
        self.trace: Trace | None = None
        self._on_shared_loop = False

    def _new_session(self, target: Target) -> Session:
        asked, on = self._asked, self._on
        return Session(
            target,
            threads=asked["threads"],
            workers=asked["workers"],
            shared_memory=asked["shared_memory"],
            trim_after=asked["trim_after"],
            provider=OwnThreads(preempt=asked["preempt"]) if on is None else on,
            faults=self._faults,
        )

    def disk(self) -> KernelDisk:
        """The kernel's device; raises DeviceClosed before there is one."""
        if self.kernel is None:
            raise errors.DeviceClosed("the device does not exist before it is started")
        return self.kernel

    def stats(self) -> DeviceStats:
        """Counters since the start; after the end, the last ones."""
        return self._final_stats or self._earlier.added(self.session.stats())

    def configure(self) -> None:
        """Opens the target, and adds a device of the kernel's that fits it, or adopts one."""
        asked = self._asked
        kernel = self.kernel = KernelDisk(deadline=asked["deadline"], waits=self._on is None)
        features = kernel.features()
        if asked["threads"] > 1:
            features.require(Feature.PER_IO_DAEMON)
        if self._adopted is not None:
            self._adopt(kernel, self._adopted)
            return
        mode = Recovery(asked["recovery"])
        recovery = recovery_flags(mode, features)
        if mode is not Recovery.NONE:
            _warn_of_defects(features.kernel_release)
        profile = self.session.open_target()
        choice = self.choice = choose_path(
            profile.paths,
            features,
            path=self._faults.wanted_path(asked["path"]),
            batch=_batch(asked, recovery),
            depth=asked["depth"],
            needed=profile.needs | _needed(asked) | recovery | _rights(features),
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

    def _adopt(self, kernel: KernelDisk, device: int) -> None:
        deadline = self._asked["deadline"]
        served = self._ask is not None
        kernel.adopt(device, deadline, served=served, foreign=self._foreign)
        info = kernel.info
        _check_threads(self._asked["threads"], info.depth)
        self._affinity = checked_affinity(self._asked["affinity"], info.queues)
        if self._ask is not None:
            self._ask()
        profile = open_when_free(self.session, 0.0 if self._ask is None else deadline)
        self.choice = check_fits(self.session.target, profile, kernel)
        kernel.start_recovery(deadline)

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
        self._await_fetches()
        if self._adopted is not None:
            kernel.end_recovery()
            kernel.spared = self._ask is not None  # its server may take it back: see `keep`
        else:
            kernel.start()
        self._live = True
        self.session.raise_error()
        kernel.await_node(until, self._raise_if_over)
        if self._adopted is None:
            kernel.choose_scheduler(self._asked["io_scheduler"], deadline)
            if kernel.recovery is not Recovery.NONE and not self.stays_guarded:
                kernel.guard(False)
        kernel.refresh()

    def _await_fetches(self) -> None:
        deadline = self._asked["deadline"]
        if not self.session.primed(deadline):
            raise errors.InternalError(f"a queue was not primed within {deadline:g} s")
        self._raise_if_over()  # START_DEV after somebody's STOP_DEV would crash the kernel

    def _raise_if_over(self) -> None:
        self.session.raise_error()
        if self.session.one_ended():
            device = self.disk().info.id
            raise errors.DeviceLost(f"device {device} was stopped while it was started")

    def stop(self, patience: float, enough: Callable[[], bool]) -> list[str]:
        """STOP_DEV, if it was added; returns the stacks of the handlers that were given up, after
        `patience` seconds without progress, or when it is `enough`."""
        kernel, session = self.kernel, self.session
        if kernel is None or not kernel.exists:
            return []
        deadline = self._asked["deadline"]
        self._faults.suspend(True)
        if kernel.spared:
            session.primed(deadline)
            session.leave(LEAVES)
            return []
        if kernel.recovery is not Recovery.NONE:
            with suppress(OSError):  # it is deleted already
                kernel.guard(True)
        if self._live and needs_flush(kernel) and session.failure is None:
            flush(kernel, session, patience=patience, enough=enough)
        return stop_serving(kernel, session, patience=patience, deadline=deadline, enough=enough)

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
            if self.trace is not None:
                self.trace.end()
            session.dismiss()
            self._leave_shared_loop()

    def _leave_shared_loop(self) -> None:
        if self._on_shared_loop and self._on is not None:
            self._on.leave_loop()
            self._on_shared_loop = False

    # ---- memory shared with clients ----

    def shared(self, state: DeviceState) -> Sharing:
        """What shares memory; raises what says why none can be shared now."""
        if not self._asked["shared_memory"]:
            raise ValueError("share needs a device made with shared_memory=True")
        if self.sharing is None or state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {state}, only a live one shares memory")
        return self.sharing

    # ---- another size ----

    def resize(self, size: int) -> None:
        """UPDATE_SIZE."""
        self.disk().resize(size)
        self._faults.resize(size)

    def check_resize(self, state: DeviceState, size: int, *, shrink: bool) -> bool:
        """Whether `size` is another one; raises what says why the disk cannot have it now."""
        profile = self.session.profile
        block_size = SECTOR_SIZE if profile is None else profile.block_size
        if size <= 0 or size % block_size:
            raise ValueError(f"size must be a positive multiple of {block_size}, not {size}")
        if state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {state}, only a live one is resized")
        before = self.disk().params.basic.size
        if size < before and not shrink:
            raise ValueError(
                f"{self.disk().info.path} has {before} bytes: shrinking to {size} loses the data "
                "beyond, so it must be asked for (shrink=True, or --shrink)"
            )
        return size != before

    # ---- another server ----

    def keep(self) -> None:
        """A device that was handed over does not go back to its server any more."""
        self.disk().spared = False

    def check_hand_over(self, state: DeviceState) -> None:
        """Raises what says why the device cannot be handed over now, or not by the caller."""
        if self.kernel is None or state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {state}, only a live one is handed over")
        if not resends(self.disk().info.flags):
            raise ValueError(
                f"{self.disk().info.path} cannot be handed over: it was not made with recovery="
                '"resend" (--recovery resend), so its clients\' requests would not wait'
            )
        self.disk().features().require(Feature.QUIESCE)
        if not quiesces(self.disk()):
            raise ValueError(
                f"{self.disk().info.path} cannot be handed over: the kernel fails requests of a "
                "device that it quiesces with batch I/O, or that was not made for it"
            )
        if self.session.runs_here() or self._loop_runs_here():
            raise RuntimeError("a disk cannot be handed over by a handler, nor on its loop")

    def hand_over(
        self, taken: Callable[[], bool], *, patience: float, failed: Callable[[], None]
    ) -> bool:
        """Leaves the device to another server, if it is `taken`; else it is served on. Whether it
        is left: then, and where it can be served on no more, it is `spared`."""
        kernel = self.disk()
        gone = False
        try:
            self._leave(patience)
            gone = taken()
        except BaseException as error:
            if kernel.spared:
                self._take_back(error, failed)
            raise
        if not gone:
            gone = not self._take_back(errors.DeviceLost("the next server did not come"), failed)
        if gone:
            kernel.guard(False)
        return gone

    def _leave(self, patience: float) -> None:
        """Ends the serving, with no request failed: what a handler that hangs does not answer is
        sent again. The device is `spared` from when there is no way back but `_take_back`."""
        kernel, old = self.disk(), self.session
        end_by_quiesce(kernel, old, patience=patience, give_up=list)
        kernel.spared = True
        self._earlier = self._earlier.added(old.stats())
        if not old.all_ended():
            held = old.stats().total.held
            log.warning("%s: %d requests are sent to the next server again", kernel.info.path, held)
        if not old.all_ended() and not old.leave(LEAVES):
            raise errors.HandlerTimeout(
                f"{kernel.info.path} is not handed over: a handler of {type(old.target).__name__} "
                "does not return"
            )
        self._let_go_of(old)
        old.close_target()
        kernel.await_end_of_server(self._asked["deadline"])

    def _take_back(self, why: BaseException, failed: Callable[[], None]) -> bool:
        """Serves the device again, by the same target. False: its next server has come after all.
        Raises DeviceLost when it is neither."""
        kernel, deadline, session = self.disk(), self._asked["deadline"], self.session
        try:
            self._let_go_of(session)
            kernel.await_end_of_server(deadline)
            if session.closed:
                session = self.session = self._new_session(session.target)
                self._where_served(session, session.prepare)
                open_when_free(session, deadline)
            self._resume(session, failed)
        except BaseException as worse:
            if kernel.is_served_elsewhere():
                return False
            raise self._lost(session, why, worse) from why
        kernel.spared = False
        return True

    # ---- another target ----

    def check_swap(self, state: DeviceState) -> None:
        """Raises what says why the target cannot be swapped now, or not by the caller."""
        if state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {state}, only a live one's target is swapped")
        if self.disk().recovery is not Recovery.RESEND:
            raise ValueError('a swap needs a device made with recovery="resend"')
        if Feature.BATCH_IO in self.disk().info.flags:
            # From QUIESCE_DEV on, Linux 7.3.4 fails the requests of such a device.
            raise ValueError("a swap needs a device without batch I/O (batch=False)")
        self.disk().features().require(Feature.QUIESCE)
        if self.session.runs_here() or self._loop_runs_here():
            raise RuntimeError("a disk's target cannot be swapped by a handler, nor on its loop")

    def _loop_runs_here(self) -> bool:
        if self.loop is None:
            return False
        import asyncio

        return asyncio._get_running_loop() is self.loop

    def swap(self, target: Target, *, patience: float, failed: Callable[[], None]) -> list[str]:
        """Serves another target from now on, and closes the one before. Returns the stacks of the
        handlers of that one that were given up after `patience` seconds without progress.

        When it raises, the target before serves on; or the device is `spared`, and waits for
        another server.
        """
        old, new = self.session, self._new_session(target)
        if self.loop is None and self._on is not None and new.needs_loop:
            self.loop = self._on.loop()
        try:
            self._where_served(new, new.prepare)
            choice = check_fits(target, new.open_target(after=old), self.disk())
            hung = self._end_serving(old, patience)
        except BaseException:
            new.close_target()
            raise
        try:
            self._resume(new, failed)
        except BaseException as error:
            self._let_go_of(new)
            new.close_target()
            self._put_back(old, error, failed)
            raise
        self.choice = choice
        old.close_target()
        return hung

    def _where_served(self, session: Session, step: Callable[..., T]) -> T:
        """Calls a step with `on_this_loop`, on the event loop that the session is served on."""
        loop = self.loop
        if loop is None or not session.needs_loop:
            return step(on_this_loop=False)
        import asyncio

        async def call() -> T:
            return step(on_this_loop=True)

        return asyncio.run_coroutine_threadsafe(call(), loop).result()

    def _end_serving(self, old: Session, patience: float) -> list[str]:
        """The session's end, with every request answered that it has taken."""
        kernel = self.disk()
        hung = end_by_quiesce(
            kernel, old, patience=patience, give_up=lambda: _give_up_hanging(kernel, old)
        )
        self._earlier = self._earlier.added(old.stats())
        self._let_go_of(old)
        return hung

    def _let_go_of(self, session: Session) -> None:
        """Of what may have begun to serve; the kernel takes the char device's end for its end."""
        if not session.all_ended():
            session.leave(LEAVES)
        kernel = self.disk()
        kernel.close_char_device(in_use=not session.all_ended())
        session.dismiss()
        self._leave_shared_loop()

    def _resume(self, session: Session, failed: Callable[[], None]) -> None:
        kernel = self.disk()
        kernel.start_recovery(self._asked["deadline"])
        kernel.open_char_device()
        self.session = session
        self._where_served(session, partial(self.begin_serving, failed=failed))
        self._await_fetches()
        if self.trace is not None:
            self.trace.follow(session.queues())
        kernel.end_recovery()

    def _put_back(self, old: Session, error: BaseException, failed: Callable[[], None]) -> None:
        self.session = old
        try:
            self._resume(old, failed)
        except BaseException as worse:
            raise self._lost(old, error, worse) from error

    def _lost(self, session: Session, error: BaseException, worse: BaseException) -> Exception:
        """What tells that the device could be handed over neither there nor back."""
        kernel = self.disk()
        self._let_go_of(session)
        kernel.spared = True
        self.session = session
        session.failure = errors.DeviceLost(
            f"{kernel.info.path} has no server any more: it could not be handed over "
            f"({error}), nor given back ({worse}); another process can take it over "
            f"(Device.take_over), or it is deleted by `pyublk del --force {kernel.info.id}`"
        )
        return session.failure


def _batch(asked: DeviceOptions, recovery: Feature) -> bool | None:
    """Whether to have batch I/O: not where it would keep a swap from holding back requests."""
    if asked["batch"] is None and Feature.QUIESCE in recovery:
        return False
    return asked["batch"]


def _needed(asked: DeviceOptions) -> Feature:
    """The device features that such a disk cannot do without."""
    needed = Feature(0) if asked["partition_scan"] else Feature.NO_AUTO_PART_SCAN
    return needed | Feature.SHMEM_ZC if asked["shared_memory"] else needed


def _rights(features: Features) -> Feature:
    """What makes a device one that a caller without CAP_SYS_ADMIN may have."""
    return Feature(0) if features.privileged else Feature.UNPRIVILEGED_DEV


def _check_servers(on: Servers | None, affinity: Affinity) -> None:
    """Raises ValueError for what threads of many disks cannot do for one."""
    if on is not None and not isinstance(on, Servers):
        raise TypeError(f"on must be Servers or None, not {type(on).__name__}")
    if on is not None and affinity not in ("auto", None):
        raise ValueError("affinity is for a disk's own threads: leave out one of affinity and on")


def _warn_of_defects(release: str) -> None:
    """No feature tells of a kernel whose recovery is bad, so it is not refused."""
    for defect in defects_of(release):
        if defect.of_recovery:
            log.warning("Linux %s: %s; %s", release, defect.what, defect.remedy)


def _check_threads(threads: int, depth: int) -> None:
    if threads > depth:
        raise ValueError(f"threads must be 1 to the depth, {depth}, not {threads}")


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
