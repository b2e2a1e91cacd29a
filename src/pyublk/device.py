# SPDX-License-Identifier: MIT
"""A disk from start to stop: the kernel's device, and the session that serves it, in step."""

import atexit
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from pyublk import errors
from pyublk._native import process, this_thread
from pyublk.arguments import whole
from pyublk.control import DeviceInfo
from pyublk.faults import Faults, WithFaults
from pyublk.handover import handler_timeout
from pyublk.interruptions import (
    LOOK_FOR_SIGNALS,
    Signalled,
    run_shielded,
    run_shielded_async,
    signals_raised,
)
from pyublk.launch import fill_descriptors
from pyublk.lifecycle import DeviceState, Lifecycle
from pyublk.options import DEVICE, DeviceOptions, complete, complete_for, documented
from pyublk.params import Params
from pyublk.paths import PathChoice
from pyublk.servers import Servers
from pyublk.session import Session
from pyublk.sharing import SharedMemory, check_share
from pyublk.tapped import Tapped
from pyublk.target import Target

log = logging.getLogger("pyublk.device")

#: Seconds between two looks of an event loop at whether a disk has ended.
LOOK_FOR_END = 0.1
#: Seconds between two looks of a resize at whether the disk is stopped instead.
LOOK_FOR_STOP = 0.05


@documented(DEVICE)
class Device(Tapped, WithFaults):
    """A target served as `/dev/ublkbN`.

    ::

        with pyublk.Device(target, queues=2) as disk:
            print(disk.path)
            disk.wait()

    Args:
        target: what to serve; its methods decide how (see `Target`).
        **options: see `pyublk.options.DeviceOptions`.
        on: threads that serve many disks (`Servers`); None: a thread of its own for each queue.

    With `with`, the disk is usable inside the block and deleted at its end. With `async with`, an
    async target is served on the running event loop, which several devices may share.
    """

    # Where __del__ finds them when an interpreter that ends has taken this module apart already.
    _NOTHING_OPEN = (DeviceState.CREATED, DeviceState.STOPPED)

    def __init__(
        self, target: Target, *, on: Servers | None = None, **options: Unpack[DeviceOptions]
    ) -> None:
        self._set_up(target, on, complete(options))

    @classmethod
    def take_over(
        cls,
        device: int,
        target: Target,
        /,
        *,
        on: Servers | None = None,
        foreign: bool = False,
        ask: Callable[[], None] | None = None,
        **options: Unpack[DeviceOptions],
    ) -> Self:
        """The disk of the id `device`, which has lost its server, to be served by `target` from the
        start of this Device on: `start`, `with` or `async with`.

        Its queues, depth, data path and all else that is the kernel's stay as they are, so these
        `options` are not taken (TypeError). The start waits at most `deadline` seconds for the
        kernel to notice the end of the server. When it fails, the disk waits as before:

        - ValueError: it is other software's (unless `foreign`), or has no recovery, or differs from
          the target in what the error names: size, operations, zones, data path and so on.
        - DeviceBusy: it is still served, or another process takes it over.
        - DeviceLost: it is stopped. DeviceNotFound: there is no such disk.

        `ask` is for a disk that is served: called when all else is ready, it has the server let go
        (`hand_over`). Until `keep` is called, this Device leaves the disk to that one at its end.
        """
        whole("device", device, least=0)
        asked = complete_for(f"device {device}", options)
        disk = cls.__new__(cls)
        disk._set_up(target, on, asked, adopted=device, foreign=foreign, ask=ask)
        return disk

    def _set_up(
        self, target: Target, on: Servers | None, asked: DeviceOptions, **taken: Any
    ) -> None:
        self._state = DeviceState.CREATED
        self.target = target
        self._faults = Faults(target)
        self._life = Lifecycle(target, asked, on, self._faults, **taken)
        self._on = on
        self._stop_timeout = asked["stop_timeout"]
        self._stopped = threading.Event()
        self._start_over = threading.Event()
        self._start_over.set()
        self._start_threads: set[int] = set()  # which start it now: on a loop, two
        self._stop_lock = threading.Lock()
        self._resize_lock = threading.Lock()
        self._swap_lock = threading.Lock()
        self._swaps = 0  # twice for each, when it begins and when it is over
        self._stop_thread = 0  # which stops it now
        self._impatient = False  # what hangs is given up at once
        self._failure_told = False  # to the caller
        self._made_at = errors.caller()
        self._process = process()

    # ---- looking at it ----

    @property
    def _session(self) -> Session:
        """What serves it now."""
        return self._life.session

    @property
    def state(self) -> DeviceState:
        """The disk's state."""
        return self._state

    @property
    def id(self) -> int:
        """The N in `/dev/ublkbN`. Raises DeviceClosed before the device exists."""
        return self._life.disk().info.id

    @property
    def path(self) -> str:
        """The block device, such as `/dev/ublkb0`."""
        return self._life.disk().info.path

    @property
    def char_path(self) -> str:
        """The server's node, such as `/dev/ublkc0`."""
        return self._life.disk().info.char_path

    @property
    def data_path(self) -> PathChoice:
        """The disk's data path, and why it was chosen."""
        if self._life.choice is None:
            raise errors.DeviceClosed("the device has no data path before it is started")
        return self._life.choice

    @property
    def params(self) -> Params:
        """The parameters as the kernel accepted them."""
        return self._life.disk().params

    def _inherited(self) -> bool:
        """Whether this is a forked child's copy: the disk is the parent's, and nothing is done."""
        return self._process != process()

    def _check_process(self) -> None:
        if self._inherited():
            raise errors.forked_error(self._process)

    def info(self) -> DeviceInfo:
        """The device's current state, as the kernel reports it."""
        self._check_process()
        kernel = self._life.kernel
        if kernel is None or self._state is DeviceState.STOPPED:
            raise errors.DeviceClosed(f"the device is {self._state}")
        return kernel.look()

    def __repr__(self) -> str:
        kernel = self._life.kernel
        where = kernel.info.path if kernel is not None and kernel.exists else "no node yet"
        return f"<Device {where} {self._state} target {type(self.target).__name__}>"

    # ---- starting ----

    def start(self) -> None:
        """Makes the disk; returns when it is usable. On failure nothing is left behind."""
        if self._on is not None and self._session.needs_loop:
            self._start_on_servers_loop(self._on)
            return
        self._begin_start()
        try:
            self._session.prepare(on_this_loop=False)
            self._configure()
            self._begin_serving(on_this_loop=False)
            self._go_live()
        except BaseException:
            self._end_start()
            self._finish_quietly()
            raise
        self._end_start()

    def _start_on_servers_loop(self, servers: Servers) -> None:
        import asyncio

        start = asyncio.run_coroutine_threadsafe(self._start_on_loop(), servers.loop())

        def interrupted() -> None:
            start.cancel()

        run_shielded(start.result, interrupted)

    async def _start_on_loop(self) -> None:
        import asyncio

        self._begin_start()
        self._life.loop = asyncio.get_running_loop()
        try:
            self._session.prepare(on_this_loop=True)
            await run_shielded_async(self._configure, self._session.cancel_opening)
            self._begin_serving(on_this_loop=self._session.needs_loop)
            await run_shielded_async(self._go_live)
        except BaseException:
            self._end_start()
            await run_shielded_async(self._finish_quietly)  # the loop may have to contribute
            raise
        self._end_start()

    def _begin_start(self) -> None:
        self._check_process()
        with self._stop_lock:
            if self._state is not DeviceState.CREATED or self._start_threads:
                raise errors.DeviceClosed(
                    f"the device is {self._state}: a Device starts once, make a new one"
                )
            self._start_threads.add(this_thread())
            self._start_over.clear()
        _open_devices.add(self)

    def _end_start(self) -> None:
        self._start_threads.clear()
        self._start_over.set()

    def _configure(self) -> None:
        self._start_threads.add(this_thread())
        fill_descriptors()
        self._life.configure()
        self._state = DeviceState.CONFIGURED
        self._life.disk().open_char_device()

    def _begin_serving(self, *, on_this_loop: bool) -> None:
        self._state = DeviceState.STARTING
        failed = partial(_end_failed, weakref.ref(self))
        self._life.begin_serving(on_this_loop=on_this_loop, failed=failed)

    def _go_live(self) -> None:
        self._start_threads.add(this_thread())
        self._life.go_live()
        self._state = DeviceState.LIVE

    # ---- while it lives ----

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the disk ends, at most `timeout` seconds, after which it returns False.

        Returns True when someone else has stopped the device, and, in the main thread, on SIGINT,
        SIGTERM and SIGHUP (whose handlers are restored afterwards). If the serving of a queue
        fails, the disk ends, and the cause is raised (as DeviceLost, when it is no Exception).
        """
        self._check_process()
        until = None if timeout is None else time.monotonic() + timeout
        try:
            with signals_raised():
                while True:
                    self._session.attention.clear()  # what comes from here on is seen by the wait
                    if self._has_ended():
                        return True
                    left = LOOK_FOR_SIGNALS if until is None else until - time.monotonic()
                    if left <= 0:
                        return False
                    self._session.attention.wait(min(left, LOOK_FOR_SIGNALS))
        except Signalled:
            pass
        return True

    def _has_ended(self) -> bool:
        if self._state is DeviceState.CREATED:
            raise errors.DeviceClosed("the device is created: start it first")
        self._raise_failure()
        swaps = self._swaps
        one_ended = self._session.one_ended() and not swaps % 2 and swaps == self._swaps
        return self._stopped.is_set() or one_ended

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As `wait`, without blocking the event loop. It does not watch signals: add handlers for
        these to the loop (`loop.add_signal_handler`)."""
        import asyncio

        until = None if timeout is None else time.monotonic() + timeout
        while not self._has_ended():
            left = LOOK_FOR_END if until is None else until - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, LOOK_FOR_END))
        return True

    def resize(self, size: int, *, shrink: bool = False) -> None:
        """Gives the live disk, and its target, a new `size` in bytes (Linux 6.16).

        Clients may use the disk meanwhile. The files of `file`, `linear`, `stripe` and `mirror` are
        extended before the disk grows, and cut after it has shrunk; others do what their
        `Target.resize` does. If a step fails, the disk and its files keep the old size. `shrink`
        allows a smaller size; the data beyond it is lost.
        """
        self._check_process()
        whole("size", size)
        with self._resize_lock:
            if self._life.check_resize(self._state, size, shrink=shrink):
                self.target.resize(size, self._update_size)

    def _update_size(self, size: int) -> None:
        """Not beside a stop, which crashes kernels; one that comes from a signal's handler here
        goes on in the background."""
        self._start_threads.add(this_thread())
        try:
            # A stop that has it may wait for us, if this is a handler.
            while not (locked := self._stop_lock.acquire(timeout=LOOK_FOR_STOP)):
                if self._state is not DeviceState.LIVE:
                    break
            try:
                if self._state is not DeviceState.LIVE:
                    raise errors.DeviceClosed(f"the device is {self._state} meanwhile")
                self._life.resize(size)
            finally:
                if locked:
                    self._stop_lock.release()
        finally:
            self._start_threads.discard(this_thread())

    def swap(self, target: Target) -> None:
        """Serves another target as the same disk: clients' requests wait meanwhile, and none fails.
        The one before is closed, as at a stop. Needs recovery="resend".

        `target` is opened first, while the other one still serves: what it reads then may be
        changed until the hand-over. It must be like the disk (ValueError, see `take_over`), and is
        served with the Device's options. If anything fails, the one before serves on, and the error
        is raised. If that fails too, DeviceLost: this Device is stopped, and the disk waits.

        Handlers that hang are given up as by `stop`, and HandlerTimeout is raised, although the
        new target serves. Must not be called in a handler, or on the event loop that serves the
        disk (RuntimeError; `swap_async` may).

        The kernel holds requests back for it (QUIESCE_DEV, Linux 6.16; FeatureMissing before), but
        not with batch I/O, which recovery="resend" has only if it is asked for (ValueError).
        """
        self._check_process()
        self._life.check_swap(self._state)
        here, before = this_thread(), self.target
        with self._swap_lock, self._resize_lock:
            self._start_threads.add(here)  # a signal's handler may stop it
            try:
                hung = run_shielded(partial(self._swap, target), self._lose_patience)
            finally:
                self._start_threads.discard(here)
        if hung:
            raise handler_timeout(before, self._life.disk(), hung, successor=target)

    async def swap_async(self, target: Target) -> None:
        """As `swap`, on an event loop."""
        await run_shielded_async(partial(self.swap, target))

    def _swap(self, target: Target) -> list[str]:
        with self._stop_lock:
            self._life.check_swap(self._state)  # it may have ended since
            self._swaps += 1
            patience = max(self._stop_timeout, self._session.max_stall)
            failed = partial(_end_failed, weakref.ref(self))
            try:
                hung = self._life.swap(target, patience=patience, failed=failed)
                self.target = self._faults.target = target
            except BaseException:
                if self._life.disk().spared:
                    self._release()
                raise
            finally:
                self._swaps += 1
        return hung

    def hand_over(self, taken: Callable[[], bool]) -> bool:
        """Leaves the disk to another server: clients' requests wait meanwhile, and none fails.
        Needs recovery="resend".

        When every request is answered, which the kernel must be able to wait for as for a `swap`,
        and the target closed, `taken` is called: it waits for the other server (`take_over` with
        `ask`), and returns whether that has the disk. If so, this Device is stopped. If not, or if
        it raises, the target is opened again and serves on. DeviceLost says that this failed.
        """
        self._check_process()
        self._life.check_hand_over(self._state)
        with self._swap_lock, self._resize_lock, self._stop_lock:
            self._life.check_hand_over(self._state)  # it may have ended since
            self._swaps += 1
            patience = max(self._stop_timeout, self._session.max_stall)
            try:
                failed = partial(_end_failed, weakref.ref(self))
                return self._life.hand_over(taken, patience=patience, failed=failed)
            finally:
                self._swaps += 1
                if self._life.disk().spared:
                    self._release()

    def keep(self) -> None:
        """The disk that was taken over with `ask` is this Device's from now on."""
        self._life.keep()

    def share(
        self, size: int | None = None, *, fd: int | None = None, read_only: bool = False
    ) -> SharedMemory:
        """Shares memory with clients (Linux 7.1): `size` bytes of it, or the file behind `fd`.

        Data that a client reads or writes by direct I/O, in its own mapping of the same file, is
        never copied: `IO.buffer` is the shared memory. With `read_only` the server cannot write to
        it, so only clients' writes avoid the copy. The device needs `shared_memory=True`. Must not
        be called in a handler (RuntimeError): the kernel waits for every request in flight first.
        """
        self._check_process()
        check_share(size, fd)
        return self._life.shared(self._state).begin(size, fd, read_only=read_only)

    # ---- stopping ----

    def stop(self, timeout: float | None = None) -> None:
        """Stops and deletes the disk; written data is flushed through the target first.

        `timeout`: seconds without progress (default: the device's stop_timeout) after which
        handlers that hang are given up. Then their requests fail, the disk is deleted, and
        HandlerTimeout says where they hang. If a handler, or the thread that starts the disk, calls
        it, the stop goes on in the background. Stopping twice is allowed, also in a signal handler
        that interrupts another stop. A disk is stopped even if it is mounted.

        A disk with a queue that failed stops by itself; this raises the cause, if nobody has yet.
        """
        self._check_process()
        try:
            self._stop_once(timeout)
        except Exception as error:
            if self._session.failure is None:
                raise
            log.warning("stopping %r, which failed: %s", self, error)
        if self._state is DeviceState.STOPPED and not self._failure_told:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._session.failure is not None:
            self._failure_told = True
            raise self._session.failure

    def _stop_once(self, timeout: float | None = None) -> None:
        here = this_thread()
        if here == self._stop_thread:
            return
        if here in self._start_threads or self._session.runs_here():
            threading.Thread(target=self._stop_once, args=(timeout,), name="ublk-stop").start()
            return
        # A kernel that gets START_DEV after STOP_DEV may crash.
        self._start_over.wait()
        with self._stop_lock:
            self._stop_thread = here
            try:
                self._stop(timeout)
            finally:
                self._stop_thread = 0

    def _stop(self, timeout: float | None) -> None:
        if self._state is DeviceState.STOPPED:
            return
        usual = max(self._stop_timeout, self._session.max_stall)
        patience = usual if timeout is None else timeout
        try:
            hung = run_shielded(partial(self._stop_serving, patience), self._lose_patience)
        finally:
            self._release()
        if hung:
            raise handler_timeout(self.target, self._life.disk(), hung)

    def _lose_patience(self) -> None:
        self._impatient = True

    def _stop_serving(self, patience: float) -> list[str]:
        """Returns the stacks of what hung and was given up."""
        started = self._state is not DeviceState.CREATED
        self._state = DeviceState.STOPPING
        return self._life.stop(patience, lambda: self._impatient) if started else []

    def _release(self) -> None:
        try:
            self._life.release()
        finally:
            self._state = DeviceState.STOPPED
            self._stopped.set()
            self._session.attention.set()
            _open_devices.discard(self)
            self._session.close_target()

    def _finish_quietly(self) -> None:
        """After a failed start: the first error is the one to tell."""
        if self._inherited():
            return
        self._failure_told = True
        try:
            self._stop_once()
        except Exception as error:
            log.warning("cleaning up after a failed start: %s", error)

    def _stop_failed(self) -> None:
        """At once, and whether or not somebody waits: nothing comes of its requests any more."""
        self._start_over.wait()
        with self._swap_lock:
            failed = self._session.failure is not None  # else: what serves it now has not
        if self._state is not DeviceState.LIVE or not failed:  # who starts or stops it does that
            return
        with suppress(BaseException):  # the program's log may do anything
            log.error("%r is stopped: a queue of it failed", self, exc_info=self._session.failure)
        try:
            self._stop_once()
        except Exception as error:
            log.warning("stopping %r, which failed: %s", self, error)

    # ---- scopes ----

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._inherited():  # else: a child that was forked inside leaves
            self.stop()

    async def __aenter__(self) -> Self:
        await self._start_on_loop()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._inherited():
            await run_shielded_async(self.stop)

    def __del__(self) -> None:
        if getattr(self, "_state", self._NOTHING_OPEN[0]) in self._NOTHING_OPEN:
            return
        if self._inherited():
            return
        warnings.warn(
            f"{self!r}, made at {self._made_at}, was dropped while open: use `with` or stop()",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )
        self._finish_quietly()


def _end_failed(device: "weakref.ref[Device]") -> None:
    """By the server that failed, which has its clients' requests to refuse meanwhile."""
    if (failed := device()) is not None:
        with suppress(RuntimeError):  # no more threads: then who waits for it stops it
            threading.Thread(target=failed._stop_failed, name="ublk-stop").start()


_open_devices: "weakref.WeakSet[Device]" = weakref.WeakSet()


@atexit.register
def _stop_open_devices() -> None:
    """A disk left open at exit is stopped while its threads still run: its page cache counts."""
    for device in list(_open_devices):
        device._finish_quietly()
