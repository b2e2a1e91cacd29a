# SPDX-License-Identifier: MIT
"""A disk from start to stop: queues and their servants, in step with the control commands."""

import atexit
import errno
import logging
import os
import stat
import sys
import threading
import time
import warnings
import weakref
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from types import FrameType, TracebackType
from typing import Self

from pyublk import errors
from pyublk._native import CharDevice, Helper, open_private, process, this_thread
from pyublk.arguments import seconds, whole
from pyublk.control import Controller, DeviceInfo, check_wish, new_cookie
from pyublk.crew import Crew
from pyublk.interruptions import (
    LOOK_FOR_SIGNALS,
    Signalled,
    run_shielded,
    run_shielded_async,
    signals_raised,
)
from pyublk.launch import fill_descriptors
from pyublk.mapped import MappedTarget
from pyublk.params import Params
from pyublk.paths import DataPath, PathChoice, choose_path, named_path
from pyublk.scheduling import (
    Affinity,
    SchedulerRemoval,
    checked_affinity,
    choose_io_scheduler,
)
from pyublk.sharing import SharedMemory, Sharing, check_share
from pyublk.stats import DeviceStats
from pyublk.target import Target
from pyublk.uapi import ControlCommand, Feature

log = logging.getLogger("pyublk.device")

#: Seconds between two looks of an event loop at whether a disk has ended.
LOOK_FOR_END = 0.1


class DeviceState(StrEnum):
    """Where a `Device` is in its life; a stopped one cannot be started again."""

    CREATED = "created"
    CONFIGURED = "configured"
    STARTING = "starting"
    LIVE = "live"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Device:
    """A target served as `/dev/ublkbN`.

    ::

        with pyublk.Device(target, queues=2) as disk:
            print(disk.path)
            disk.wait()

    Args:
        target: what to serve; its methods decide how (see `Target`).
        queues: hardware queues, each with its own thread. More than CPUs are refused.
        depth: requests in flight per queue, 1 to 4096.
        id: the N in `/dev/ublkbN`; None takes the lowest free.
        max_io_size: bytes of the largest request and of each tag's buffer; a multiple of 4096 up
            to 32 MiB. Kernels before 6.18 split at 1280 KiB whatever is asked, later ones at 4 MiB.
        workers: threads that run the handlers of a sync `parallel` target, beside the queues'
            own threads; for handlers that block. 0: the queues' threads run them.
        path: how the data travels (`pyublk.DataPath`); "auto" takes the best that target and kernel
            can; another one that the kernel lacks is refused (FeatureMissing).
        batch: whether commands carry many tags (Linux 7.0); None where the kernel can.
        threads: threads that serve each queue together (Linux 6.16), for targets whose calls may
            run at once; the handlers of a `serial` or `per_queue` target still take turns.
        partition_scan: whether the kernel looks for partitions when the disk starts. False (Linux
            7.0) keeps it from reading what an image says of itself; BLKRRPART, which
            `blockdev --rereadpt` calls, looks for them later.
        shared_memory: whether memory can be shared with clients (`share`; Linux 7.1).
        trim_after: seconds without a request after which a queue gives the memory of its buffers
            back to the kernel, until it needs it again (at most twice as many, since it looks once
            in that time); None: never. Not with several `threads`.
        affinity: "auto" keeps each queue's thread to the CPUs whose requests it gets (the kernel
            allocates its buffers on their NUMA node, on first use); a sequence of CPU sets, one
            for each queue; or None, the scheduler's choice.
        preempt: whether a request that arrives may take the CPU from a client that runs on it. Not
            doing so (SCHED_BATCH, where the process has no policy of its own) lets requests gather
            while clients send more, and be served together.
        io_scheduler: the kernel's I/O scheduler for the disk, such as "mq-deadline"; "auto": none,
            but for a zoned disk, which keeps what the kernel chose; None: what the kernel chose.
            With "auto" the start does not wait until the kernel has taken its choice back.
        stop_timeout: seconds without progress after which `stop` gives a hanging handler up; at
            least the target's `max_stall`.
        deadline: seconds for each control command.

    With `with`, the disk is usable inside the block and deleted at its end. With `async with`, an
    async target is served on the running event loop, which several devices may share.
    """

    # Where __del__ finds them when an interpreter that ends has taken this module apart already.
    _NOTHING_OPEN = (DeviceState.CREATED, DeviceState.STOPPED)

    def __init__(
        self,
        target: Target,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        max_io_size: int = 512 * 1024,
        workers: int = 0,
        path: DataPath | str = "auto",
        batch: bool | None = None,
        threads: int = 1,
        trim_after: float | None = 60.0,
        partition_scan: bool = True,
        shared_memory: bool = False,
        affinity: Affinity = "auto",
        preempt: bool = False,
        io_scheduler: str | None = "auto",
        stop_timeout: float = 10.0,
        deadline: float = 30.0,
    ) -> None:
        self._state = DeviceState.CREATED
        check_wish(queues=queues, depth=depth, id=id)
        whole("max_io_size", max_io_size)
        whole("threads", threads)
        if max_io_size % 4096 or not 4096 <= max_io_size <= 32 << 20:
            raise ValueError(
                f"max_io_size must be a multiple of 4096 from 4096 to {32 << 20}, not {max_io_size}"
            )
        if not 1 <= threads <= depth:
            raise ValueError(f"threads must be 1 to the depth, {depth}, not {threads}")
        self.target = target
        self._crew = Crew(
            target, threads=threads, workers=workers, preempt=preempt, trim_after=trim_after
        )
        if path != "auto":
            named_path(path, tuple(DataPath))  # which of them it takes, it says when it is open
        self._path_wish = path
        self._batch_wish = batch
        self._needed = Feature(0) if partition_scan else Feature.NO_AUTO_PART_SCAN
        if shared_memory:
            if isinstance(target, MappedTarget):
                target.check_shared_memory()
            self._needed |= Feature.SHMEM_ZC
        self._sharing: Sharing | None = None
        self._choice: PathChoice | None = None
        self._wish = {"queues": queues, "depth": depth, "max_io_size": max_io_size, "id": id}
        self._affinity = checked_affinity(affinity, queues)
        self._io_scheduler = io_scheduler
        self._scheduler_removal: SchedulerRemoval | None = None
        self._stop_timeout = seconds("stop_timeout", stop_timeout, zero=True)
        self._deadline = seconds("deadline", deadline)
        self._params: Params | None = None
        self._info: DeviceInfo | None = None
        self._controller: Controller | None = None
        self._guard: Helper | None = None
        self._char_device: CharDevice | None = None
        self._opened = False
        self._final_stats: DeviceStats | None = None
        self._stopped = threading.Event()
        self._start_over = threading.Event()
        self._start_over.set()
        self._start_threads: set[int] = set()  # which start it now: on a loop, two
        self._stop_lock = threading.Lock()
        self._stop_thread = 0  # which stops it now
        self._impatient = False  # what hangs is given up at once
        self._kept_by_kernel = False  # until this process ends
        self._failure_told = False  # to the caller
        self._made_at = _caller()
        self._process = process()

    # ---- looking at it ----

    @property
    def state(self) -> DeviceState:
        """How far the disk's life has come."""
        return self._state

    @property
    def id(self) -> int:
        """The N in `/dev/ublkbN`. Raises DeviceClosed before the device exists."""
        return self._device_info().id

    @property
    def path(self) -> str:
        """The block device, such as `/dev/ublkb0`."""
        return self._device_info().path

    @property
    def char_path(self) -> str:
        """The server's node, such as `/dev/ublkc0`."""
        return self._device_info().char_path

    @property
    def data_path(self) -> PathChoice:
        """How the data travels, and why."""
        if self._choice is None:
            raise errors.DeviceClosed("the device has no data path before it is started")
        return self._choice

    @property
    def params(self) -> Params:
        """The parameters as the kernel took them."""
        if self._params is None:
            raise errors.DeviceClosed("the device has no parameters before it is started")
        return self._params

    def _inherited(self) -> bool:
        """Whether this is a forked child's copy: the disk is the parent's, and nothing is done."""
        return self._process != process()

    def _check_process(self) -> None:
        if self._inherited():
            raise errors.forked_error(self._process)

    def _device_info(self) -> DeviceInfo:
        if self._info is None:
            raise errors.DeviceClosed("the device does not exist before it is started")
        return self._info

    def info(self) -> DeviceInfo:
        """What the kernel says of the device now."""
        self._check_process()
        if self._controller is None or self._state is DeviceState.STOPPED:
            raise errors.DeviceClosed(f"the device is {self._state}")
        return self._controller.info(self.id)

    def stats(self) -> DeviceStats:
        """Counters since the start; after the stop, the last ones."""
        self._check_process()
        if self._final_stats is not None:
            return self._final_stats
        return self._crew.stats()

    def __repr__(self) -> str:
        where = self._info.path if self._info else "no node yet"
        return f"<Device {where} {self._state} target {type(self.target).__name__}>"

    # ---- starting ----

    def start(self) -> None:
        """Makes the disk; returns when it is usable. On failure nothing is left behind."""
        self._begin_start()
        try:
            self._crew.prepare(on_this_loop=False)
            self._configure()
            self._begin_serving(on_this_loop=False)
            self._go_live()
        except BaseException:
            self._end_start()
            self._finish_quietly()
            raise
        self._end_start()

    async def _start_on_loop(self) -> None:
        self._begin_start()
        try:
            self._crew.prepare(on_this_loop=True)
            await run_shielded_async(self._configure, self._crew.cancel_opening)
            self._begin_serving(on_this_loop=self._crew.dispatch == "async")
            await run_shielded_async(self._go_live)
        except BaseException:
            self._end_start()
            await run_shielded_async(
                self._finish_quietly
            )  # to which the loop may have to contribute
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
        self._controller = Controller(deadline=self._deadline)
        self._guard = self._controller.helper
        self._crew.open_target()
        self._opened = True
        params = self.target.params(self._wish["max_io_size"] or 0)
        features = self._controller.features()
        if self._crew.threads > 1:
            features.require(Feature.PER_IO_DAEMON)
        depth = self._wish["depth"] or 0
        self._choice = choose_path(
            self.target.paths,
            features,
            path=self._path_wish,
            batch=self._batch_wish,
            depth=depth,
            needed=self.target.needs | self._needed,
        )
        if (
            isinstance(self.target, MappedTarget)
            and Feature.SUPPORT_ZERO_COPY in self._choice.flags
        ):
            params = replace(params, dma_align=self.target.dma_alignment())
        cookie = new_cookie()
        try:
            self._info = self._controller.add(
                cookie=cookie,
                guarded=True,
                flags=self._choice.flags,
                **self._wish,  # type: ignore[arg-type]
            )
        except BaseException:
            self._delete_added(cookie)
            raise
        if Feature.SHMEM_ZC in self._needed:
            by_handler = weakref.WeakMethod(self._crew.runs_here)
            self._sharing = Sharing(self._controller, self.id, by_handler)
        params.check_granted(max_io_size=self._info.max_io_size, flags=self._info.flags)
        self._controller.set_params(self.id, params)
        self._params = self._controller.get_params(self.id)
        if dropped := params.difference(self._params):
            raise errors.negotiation_error(
                f"parameters of device {self.id}",
                "what the target announces",
                "; ".join(dropped),
                "announce less, or use a newer kernel",
            )
        self._state = DeviceState.CONFIGURED
        self._char_device = self._open_char_device()

    def _delete_added(self, cookie: int) -> None:
        """What interrupts ADD_DEV, or ends our patience, may leave the device that it made."""
        assert self._controller is not None
        with suppress(OSError):
            for device in self._controller.devices():
                if device.cookie == cookie:
                    self._controller.delete(device.id, wait=False)

    def _open_char_device(self) -> CharDevice:
        until = time.monotonic() + 5.0
        while True:
            try:
                return CharDevice(open_private(self.char_path, os.O_RDWR))
            except OSError as error:
                # The node and its rights come a moment after the device.
                transient = error.errno in (errno.ENOENT, errno.EACCES, errno.EBUSY)
                if not transient:
                    raise
                if time.monotonic() > until:
                    if error.errno == errno.ENOENT:
                        raise errors.node_missing_error(self.char_path) from None
                    raise
            time.sleep(0.005)

    def _begin_serving(self, *, on_this_loop: bool) -> None:
        self._state = DeviceState.STARTING
        assert self._char_device is not None
        self._crew.begin(
            self._char_device,
            self._device_info(),
            table=None if self._sharing is None else self._sharing.table,
            cpus_of=self._cpus_of,
            on_this_loop=on_this_loop,
            failed=partial(_end_failed, weakref.ref(self)),
        )

    def _cpus_of(self, queues: list[int]) -> frozenset[int] | None:
        if self._affinity is None:
            return None
        if self._affinity != "auto":
            return frozenset[int]().union(*(self._affinity[queue] for queue in queues))
        assert self._controller is not None
        wanted = frozenset[int]().union(
            *(self._controller.queue_affinity(self.id, queue) for queue in queues)
        )
        return (wanted & os.sched_getaffinity(0)) or None

    def _go_live(self) -> None:
        """START_DEV, once every tag is fetched; the partition scan in it is served already."""
        assert self._controller is not None
        self._start_threads.add(this_thread())
        until = time.monotonic() + self._deadline
        if not self._crew.primed(self._deadline):
            raise errors.InternalError(f"a queue was not primed within {self._deadline:g} s")
        self._raise_if_over()  # START_DEV after somebody's STOP_DEV would crash the kernel
        self._controller.start(self.id, os.getpid())
        self._crew.raise_error()
        self._await_node(until)
        if self._io_scheduler == "auto":
            if Feature.ZONED not in self._device_info().flags:
                self._scheduler_removal = SchedulerRemoval(self.path)
        elif self._io_scheduler is not None:
            choose_io_scheduler(self.path, self._io_scheduler, self._deadline)
        self._info = self._controller.info(self.id)
        self._state = DeviceState.LIVE

    def _raise_if_over(self) -> None:
        self._crew.raise_error()
        if self._crew.one_ended():
            raise errors.DeviceLost(f"device {self.id} was stopped while it was started")

    def _await_node(self, until: float) -> None:
        """Waits until `path` is this disk. Another file of that name would take what clients write:
        programs that create what they write to leave one where a disk was gone before them."""
        assert self._controller is not None
        devt = self._controller.get_params(self.id).devt
        assert devt is not None
        ours = os.makedev(devt.disk_major, devt.disk_minor)
        while True:
            with suppress(FileNotFoundError):
                node = os.stat(self.path)
                if node.st_rdev == ours and stat.S_ISBLK(node.st_mode):
                    return
                if not stat.S_ISBLK(node.st_mode):
                    raise errors.DeviceLost(
                        f"{self.path} is not the disk but another file, which hides it: remove "
                        f"that file (a program made it that wrote there while no disk was)"
                    )
            self._raise_if_over()
            if time.monotonic() > until:
                raise errors.node_missing_error(self.path)
            time.sleep(0.005)

    # ---- while it lives ----

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the disk ends; for ever, or `timeout` seconds (then returns False).

        Returns True when the device was stopped from elsewhere, and, in the main thread, on SIGINT,
        SIGTERM and SIGHUP (whose handlers are put back afterwards). Raises what ended the serving
        of a queue by failure, which ends the disk (DeviceLost from it, when it is no Exception).
        """
        self._check_process()
        until = None if timeout is None else time.monotonic() + timeout
        try:
            with signals_raised():
                while True:
                    self._crew.attention.clear()  # what comes from here on is seen by the wait
                    if self._has_ended():
                        return True
                    left = LOOK_FOR_SIGNALS if until is None else until - time.monotonic()
                    if left <= 0:
                        return False
                    self._crew.attention.wait(min(left, LOOK_FOR_SIGNALS))
        except Signalled:
            pass
        return True

    def _has_ended(self) -> bool:
        if self._state is DeviceState.CREATED:
            raise errors.DeviceClosed("the device is created: start it first")
        self._raise_failure()
        return self._stopped.is_set() or self._crew.one_ended()

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As `wait`, without holding up the event loop, and without an eye on signals: those of a
        loop are its owner's (`loop.add_signal_handler`)."""
        import asyncio

        until = None if timeout is None else time.monotonic() + timeout
        while not self._has_ended():
            left = LOOK_FOR_END if until is None else until - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, LOOK_FOR_END))
        return True

    def resize(self, size: int) -> None:
        """Gives the live disk a new `size` in bytes (Linux 6.16), once the target has it too.

        Not that of a mapped target, whose layout says how large it is.
        """
        self._check_process()
        if isinstance(self.target, MappedTarget):
            raise ValueError(
                "a mapped target keeps its size as long as it is served: stop the disk, and "
                "serve it anew"
            )
        whole("size", size)
        block_size = self.target.block_size
        if size <= 0 or size % block_size:
            raise ValueError(f"size must be a positive multiple of {block_size}, not {size}")
        if self._controller is None or self._state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {self._state}, only a live one is resized")
        self._controller.update_size(self.id, size)
        self._params = self._controller.get_params(self.id)

    def share(
        self, size: int | None = None, *, fd: int | None = None, read_only: bool = False
    ) -> SharedMemory:
        """Shares memory with clients (Linux 7.1): `size` bytes of it, or the file behind `fd`.

        Data that a client reads or writes by direct I/O, in its own mapping of the same file, is
        never copied: `IO.buffer` is the shared memory. `read_only`: the server only reads it, which
        serves clients' writes alone. The device needs `shared_memory=True`. Not from a handler
        (RuntimeError): the kernel waits for every request in flight first.
        """
        self._check_process()
        check_share(size, fd)
        if Feature.SHMEM_ZC not in self._needed:
            raise ValueError("share needs a device made with shared_memory=True")
        if self._sharing is None or self._state is not DeviceState.LIVE:
            raise errors.DeviceClosed(f"the device is {self._state}, only a live one shares memory")
        return self._sharing.begin(size, fd, read_only=read_only)

    # ---- stopping ----

    def stop(self, timeout: float | None = None) -> None:
        """Stops and deletes the disk: written data is flushed through the target first.

        `timeout`: seconds without progress (default: the device's stop_timeout) after which
        handlers that hang are given up: their requests fail, the disk goes away all the same, and
        HandlerTimeout tells where they hang. From a handler's own thread, and from a start's, the
        stop goes on in the background. Stopping twice is allowed, also from a signal's handler on
        top of another stop; stopping a mounted disk takes it from its users.

        A disk whose queue failed has begun to stop by itself: what `wait` would raise is raised,
        unless `wait` has raised it, or another stop.
        """
        self._check_process()
        try:
            self._stop_once(timeout)
        except Exception as error:
            if self._crew.failure is None:
                raise
            log.warning("stopping %r, which failed: %s", self, error)
        if self._state is DeviceState.STOPPED and not self._failure_told:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._crew.failure is not None:
            self._failure_told = True
            raise self._crew.failure

    def _stop_once(self, timeout: float | None = None) -> None:
        here = this_thread()
        if here == self._stop_thread:
            return
        if here in self._start_threads or self._crew.runs_here():
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
        usual = max(self._stop_timeout, self.target.max_stall)
        patience = usual if timeout is None else timeout
        try:
            hung = run_shielded(partial(self._stop_serving, patience), self._lose_patience)
        finally:
            self._release()
        if hung:
            who = "a handler" if len(hung) == 1 else f"{len(hung)} handlers"
            outcome = (
                f"every request it held was failed, and {self.path} was deleted"
                if not self._kept_by_kernel
                else f"every request of a queue is in its hands, and Linux before 6.16 keeps such "
                f"a disk until its server ends: {self.path} goes half a minute after this process"
            )
            error = errors.HandlerTimeout(
                f"{who} of {type(self.target).__name__} never returned: {outcome}"
            )
            for stack in hung:
                error.add_note(stack)
            raise error

    def _lose_patience(self) -> None:
        self._impatient = True

    def _stop_serving(self, patience: float) -> list[str]:
        """STOP_DEV beside the serving threads; returns the stacks of those given up."""
        started = self._state is not DeviceState.CREATED
        self._state = DeviceState.STOPPING
        if not started or self._info is None:
            return []
        controller, device = self._controller, self.id
        assert controller is not None
        self._crew.primed(self._deadline)  # a fetch that came after the stop would stay
        failure: list[BaseException] = []
        stopped = threading.Event()

        def stop_device() -> None:
            try:
                controller.stop(device, deadline=max(self._deadline, patience) + 24 * 3600)
            except BaseException as error:
                failure.append(error)
            stopped.set()
            self._crew.moved.set()

        stopper = threading.Thread(target=stop_device, name=f"ublk{device}-stop", daemon=True)
        stopper.start()
        hung: list[str] = []
        try:
            if not self._crew.progress_until(
                lambda: stopped.is_set() and self._crew.all_ended(),
                patience=patience,
                idle=self._deadline,
                enough=lambda: self._impatient,
            ):
                hung = self._give_up_hanging()
        finally:
            if not self._kept_by_kernel:
                stopper.join(self._deadline)
        if self._kept_by_kernel:
            return hung
        if stopper.is_alive():
            raise errors.command_error(
                ControlCommand.STOP_DEV, errno.ETIMEDOUT, device=device, detail="still waiting"
            )
        if failure and getattr(failure[0], "errno", None) != errno.ENODEV:  # else: deleted already
            raise failure[0]
        return hung

    def _give_up_hanging(self) -> list[str]:
        hanging = self._crew.give_up()
        # The number stays theirs who were cut off from it, and may yet come to use it.
        if self._char_device is not None and self._crew.all_ended():
            self._char_device.close()
        self._char_device = None
        if hanging.holds_queue:
            assert self._controller is not None
            # These kernels learn of a server's end by a FETCH that it takes along, or, half a
            # minute later, by the end of the thread itself.
            self._kept_by_kernel = not self._controller.features().has(Feature.UPDATE_SIZE)
        return hanging.stacks

    def _release(self) -> None:
        """Gives everything back, also after a start that failed half-way."""
        # The kernel waited for it when it took the disk away, and the disk's name is not given anew
        # before it is deleted.
        if self._scheduler_removal is not None:
            self._scheduler_removal.finish()
            self._scheduler_removal = None
        if self._char_device is not None:
            self._char_device.close()
            self._char_device = None
        try:
            # What the kernel keeps, the helper deletes when this process ends.
            if not self._kept_by_kernel and self._controller is not None and self._info is not None:
                self._delete()
        finally:
            self._guard = None
            if self._sharing is not None:
                self._sharing.over(unused=self._crew.all_ended())
            if self._controller is not None:
                self._controller.close()
            self._final_stats = self.stats()
            self._crew.dismiss()
            self._state = DeviceState.STOPPED
            self._stopped.set()
            self._crew.attention.set()
            _open_devices.discard(self)
            opened, self._opened = self._opened, False
            self._crew.close_target(opened=opened)

    def _delete(self) -> None:
        assert self._controller is not None
        try:
            # Not DEL_DEV, which waits until everybody has closed the disk, and then for RCU.
            self._controller.delete(self.id, wait=False)
        except OSError as error:
            if error.errno != errno.ENODEV:  # else: somebody else deleted it
                raise

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
        if self._state is not DeviceState.LIVE:  # who starts or stops it does that
            return
        with suppress(BaseException):  # the program's log may do anything
            log.error("%r is stopped: a queue of it failed", self, exc_info=self._crew.failure)
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


def _caller() -> str:
    """The place outside this package that is making a Device."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyublk."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown place"


def _end_failed(device: "weakref.ref[Device]") -> None:
    """By the servant that failed, which has its clients' requests to refuse meanwhile."""
    if (failed := device()) is not None:
        with suppress(RuntimeError):  # no more threads: then who waits for it stops it
            threading.Thread(target=failed._stop_failed, name="ublk-stop").start()


_open_devices: "weakref.WeakSet[Device]" = weakref.WeakSet()


@atexit.register
def _stop_open_devices() -> None:
    """A disk left open at exit is stopped while its threads still run: its page cache counts."""
    for device in list(_open_devices):
        device._finish_quietly()
