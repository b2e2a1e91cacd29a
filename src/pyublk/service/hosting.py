# SPDX-License-Identifier: MIT
"""The disks that a server has: each with its record, its channel and its log, from start to end."""

import ctypes
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pyublk import errors, layers
from pyublk.control import Controller
from pyublk.device import Device
from pyublk.lifecycle import DeviceState
from pyublk.options import DISK
from pyublk.recovery import Recovery, recovery_of
from pyublk.service import requests, restarts, rights, title
from pyublk.service.channel import server_place
from pyublk.service.listener import Conversation, Listener, Undoable
from pyublk.service.plan import DiskSpec, TakeOver, check_shareable, of_request
from pyublk.service.processes import ProcessId
from pyublk.service.records import Record, log_place, memory_place, socket_place
from pyublk.service.restarts import Restarts
from pyublk.sharing import SharedMemory
from pyublk.target import Target
from pyublk.targets import REGISTRY, Ram

log = logging.getLogger("pyublk.server")

#: Seconds that a server waits for its first disk.
FIRST_DISK = 60.0
#: Seconds at the end for who is starting a disk to see that it is not wanted any more.
CLEANUP = 5.0

_CLONE_FS = 0x200


class Served:
    """One disk of this process, with its record and its channel."""

    def __init__(self, device: Device, record: Record, listener: Listener) -> None:
        self.device = device
        self.record = record
        self._listener = listener
        self.began = time.monotonic()
        self._ending = threading.Lock()
        self.ending = self.ended = self.handed_over = False
        #: What its end failed with.
        self.failure: Exception | None = None
        record.write()
        try:
            self._memory = _share(record.plan, device)  # until the end
            if record.is_restarted:
                hang_timeout = record.plan.disk.get("hang_timeout")
                target = device.target
                memory = target.file if isinstance(target, Ram) else None
                restarts.watch_over(
                    record.id, record.cookie, memory=memory, hang_timeout=hang_timeout
                )
        except BaseException:
            record.remove()
            raise
        self._listen()

    def _listen(self) -> None:
        try:
            self._listener.open(
                socket_place(self.record.id),
                sorted(requests.REQUESTS),
                partial(requests.call, self),
            )
        except OSError as error:  # it can be served without
            log.warning("%s has no channel: %s", self.record.path, error)

    def resize(self, size: int, *, shrink: bool) -> None:
        self.device.resize(size, shrink=shrink)
        spec = self.record.plan
        if spec.disk.get("size") is not None:
            self.record = replace(self.record, plan=replace(spec, disk=spec.disk | {"size": size}))
            rights.note_size(self.record)

    def hand_over(self, taken: Callable[[], bool]) -> bool:
        """`Device.hand_over`. The record and the channel are the next server's then; else they are
        made anew, since that one may have put its own there."""
        if not self._ending.acquire(blocking=False):
            raise errors.DeviceBusy(
                f"{self.record.path} is already handed over to another server, or stopped"
            )
        try:
            if self.record.directory is not None:  # where the target may have to be opened again
                _work_in(self.record.directory)
            self.ended = self.handed_over = self.device.hand_over(taken)
            if self.handed_over:
                log.info("%s has another server now", self.record.path)
        except errors.DeviceLost as lost:  # it waits for a server, who needs the record
            self.ended, self.failure = self.device.state is DeviceState.STOPPED, lost
            raise
        finally:
            os.chdir("/")
            if not self.ended:
                self.record.write()
            self._listener.close(socket_place(self.record.id))
            if not self.ended:
                self._listen()
            self._ending.release()
        return self.handed_over

    def stop(self) -> None:
        """Stops the disk, and forgets it; who comes second waits, and gets the same failure."""
        with self._ending:
            if not self.ended:
                try:
                    self.device.stop()
                except Exception as error:
                    self.failure = error
                    raise
                finally:
                    self.ended = True
                    self._memory = None  # its number is what the link names
                    self._listener.close(socket_place(self.record.id))
                    rights.forget(self.record)
            elif self.failure is not None:
                raise self.failure


class Host:
    """Several disks of one server, which takes more by its own channel (`add`)."""

    def __init__(self, name: str, log_file: Path) -> None:
        self._name = name
        self._log = log_file
        self._listener = Listener()
        self._place = server_place(name)
        self._lock = threading.Lock()
        self._import_lock = threading.Lock()
        self._path = list(sys.path)
        self._directories: list[str] = []
        self.disks: list[Served] = []
        self.failed = False
        self._adding = 0
        self._waits_until = time.monotonic() + FIRST_DISK
        self._closing = False
        self._listener.open(self._place, ["add", "disks"], self._answer)
        self._show()

    def _answer(self, name: str, arguments: dict[str, Any], _: Conversation) -> Any:
        if name == "disks":
            return [disk.record.id for disk in list(self.disks)]
        if arguments.keys() - {"take_over"} != {"spec", "directory"}:
            raise ValueError("add needs 'spec' and 'directory'")
        spec, take_over = of_request(arguments)
        check_shareable(spec)
        disk = self._add(spec, arguments["directory"], take_over)
        told = {"id": disk.record.id}
        # Who is not told of a new disk knows of none; one that was there is better served.
        return Undoable(told, disk.stop) if take_over is None else told

    def _add(self, spec: DiskSpec, directory: str, take_over: TakeOver | None) -> Served:
        with self._lock:
            if self._closing:
                raise errors.DeviceClosed(f"the server {self._name} is ending")
            self._adding += 1
        try:
            _work_in(directory)
            with self._imports_of(spec, directory):
                device, restarted = made(spec, take_over, background=True)
            device.start()
            try:
                disk = self._begun(spec, device, restarted)
            except BaseException:
                device.stop()
                raise
        finally:
            os.chdir("/")  # of this thread, and those that the disk has: no directory is kept busy
            with self._lock:
                self._adding -= 1
                self._waits_until = 0.0
        log.info("serving %s as %s by %s", spec.target, disk.record.path, disk.record.data_path)
        return disk

    def _begun(self, spec: DiskSpec, device: Device, restarted: Restarts) -> Served:
        place = log_place(device.id)
        record = replace(record_of(spec, device, place, restarted), server_name=self._name)
        with suppress(FileNotFoundError):
            place.unlink()  # of the server that had this id before
        os.link(self._log, place)
        with self._lock:
            if self._closing:
                place.unlink()
                raise errors.DeviceClosed(f"the server {self._name} is ending")
            disk = Served(device, record, self._listener)
            self.disks.append(disk)
        self._show()
        return disk

    def _show(self) -> None:
        disks = [(disk.record.id, disk.record.plan.target) for disk in list(self.disks)]
        title.show(*title.of_server(self._name, disks))

    @contextmanager
    def _imports_of(self, spec: DiskSpec, directory: str) -> Iterator[None]:
        """Modules of the caller's directory are found, and those of other callers are not."""
        names = [REGISTRY.split(spec.target)[0]]
        names += [layers.REGISTRY.split(text)[0] for text in spec.layers]
        modules = [name.partition(":")[0] for name in names if ":" in name]
        with self._import_lock:
            for module in modules:
                if module.endswith(".py"):
                    continue
                _refuse_other_module(module.partition(".")[0], directory, self._directories)
            sys.path[:] = [directory, *self._path]
            try:
                yield
            finally:
                if directory not in self._directories:
                    self._directories.append(directory)
                sys.path[:] = [*self._directories, *self._path]  # for what is imported later

    def goes_on(self) -> bool:
        """Whether there is a disk, or may be one; if not, nobody can add one any more."""
        ended = [disk for disk in self.disks if disk.ended]
        while ended:
            self._forget(ended.pop())
            gc.collect()  # a disk in memory gives it back
        for disk in list(self.disks):
            if not disk.ending and not disk.ended and _has_ended(disk.device):
                disk.ending = True
                threading.Thread(target=self._end, args=(disk,), daemon=True).start()
        with self._lock:
            if self.disks or self._adding or time.monotonic() < self._waits_until:
                return True
            self._closing = True
            self._listener.close(self._place)
        return False

    def _end(self, disk: Served) -> None:
        with suppress(Exception):  # it is told in the log
            disk.stop()

    def _forget(self, disk: Served) -> None:
        """Its name of the log goes, unless there is something to be read there."""
        with self._lock:
            if disk not in self.disks:
                return
            self.disks.remove(disk)
        self._show()
        if disk.failure is not None:
            self.failed = True
            log.error("%s ended with an error", disk.record.path, exc_info=disk.failure)
            return
        requests_served = disk.device.stats().total.requests
        log.info("%s stopped after %d requests", disk.record.path, requests_served)
        place = log_place(disk.record.id)
        with suppress(OSError):
            if place.samefile(self._log):
                place.unlink()

    def close(self) -> None:
        """Stops all disks at the same time."""
        with self._lock:
            self._closing = True
            self._listener.close(self._place)
            disks = list(self.disks)
        threads = [threading.Thread(target=self._end, args=(disk,)) for disk in disks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for disk in disks:
            self._forget(disk)
        until = time.monotonic() + CLEANUP
        while self._adding and time.monotonic() < until:
            time.sleep(0.01)
        self._listener.close_all()


def made(
    spec: DiskSpec,
    take_over: TakeOver | None,
    *,
    background: bool,
    prepare: Callable[[Target], None] | None = None,
    ask: Callable[[], None] | None = None,
) -> tuple[Device, Restarts]:
    """What is to be started, and whether its server is to be restarted; `background`: by a process
    of its own; `prepare` is called with its target; `ask` as for `Device.take_over`. Raises what
    `DiskSpec.device` and `restarts.decide` raise."""
    target = spec.make_target()
    if prepare is not None:
        prepare(target)
    with Controller() as controller:
        there = None
        if take_over is not None:
            there = recovery_of(controller.info(take_over.device).flags)
        restarted = restarts.decide(
            spec.disk, target, controller.features(), background=background, there=there
        )
    # A disk whose memory is lost is not one with another: see `DiskSpec.device`.
    if restarted.on and isinstance(target, Ram) and (take_over is None or take_over.may_be_kept):
        target.keep(None if take_over is None else take_over.memory)
    recovery = Recovery.RESEND if restarted.on else None
    device = spec.device(take_over, target=target, recovery=recovery, ask=ask)
    if restarted.on:
        device._life.stays_guarded = True  # until `watch_over`: no moment is without either
    return device, restarted


def record_of(spec: DiskSpec, device: Device, log_file: Path | None, restarted: Restarts) -> Record:
    """The record of a disk that this process serves; its thread is where it was asked for."""
    info = device.info()
    before = Record.of(info)
    if before is not None and before.restarts is not None:
        restarted = replace(before.restarts, why_not=restarted.why_not)
    return Record(
        id=device.id,
        cookie=info.cookie,
        server=ProcessId.own(),
        plan=spec,
        log=log_file,
        data_path=str(device.data_path),
        directory=os.getcwd(),
        recovery=str(recovery_of(info.flags)),
        restarts=restarted,
    )


def _share(spec: DiskSpec, device: Device) -> SharedMemory | None:
    """Shares memory with clients, if that was asked for, by a link that they can open."""
    if not spec.disk.get("shared_memory"):
        return None
    size = spec.disk.get("shared_memory_size", DISK["shared_memory_size"].default)
    memory = device.share(size)
    place = memory_place(device.id)
    place.unlink(missing_ok=True)
    place.symlink_to(f"/proc/{os.getpid()}/fd/{memory.fd}")
    return memory


def _has_ended(device: Device) -> bool:
    try:
        return device.wait(0)
    except Exception:  # its stop raises it once more
        return True


def _work_in(directory: str) -> None:
    """This thread, and those that it starts, have a working directory of their own from now on:
    the caller's, by which relative names are meant."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_FS):
        number = ctypes.get_errno()
        raise OSError(number, f"a thread cannot have its own directory: {os.strerror(number)}")
    os.chdir(directory)


def _refuse_other_module(name: str, directory: str, others: list[str]) -> None:
    """A process has one module of a name; that of another caller is not this one's."""
    loaded = getattr(sys.modules.get(name), "__spec__", None)
    origin = loaded.origin if loaded is not None else None
    if origin is None or not any(Path(origin).is_relative_to(other) for other in others):
        return
    found = PathFinder.find_spec(name, [directory])
    if found is None or found.origin != origin:
        raise ValueError(
            f"this server has the module {name!r} from {origin} already: name the class by its "
            "file (file.py:Class), or use another server"
        )
