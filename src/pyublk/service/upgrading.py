# SPDX-License-Identifier: MIT
"""A new server for a disk that is served: with newer code, or other options of its target."""

import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import replace

from pyublk import errors, layers
from pyublk.control import Controller, DeviceInfo
from pyublk.recovery import resends
from pyublk.service import daemon
from pyublk.service.plan import TakeOver
from pyublk.service.records import Record, record_trouble
from pyublk.uapi import DeviceStatus, Feature

#: Seconds for a server to serve a disk again that was not taken over.
_TAKEN_BACK = 60.0


def upgrade(
    controller: Controller,
    device: DeviceInfo,
    options: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
) -> Record:
    """Starts a server that takes the disk over from the present one, as its record says, but for
    these `options` of the target and `changes` of its layers (`pyublk.layers.changed`). Clients'
    requests wait for it, and none fails.

    Raises FeatureMissing before Linux 6.16, ValueError for a disk that cannot be handed over,
    DeviceBusy for one that waits for a server, and what kept the new server from serving it; then
    the present one serves on, which a note says.
    """
    record = Record.of(device)
    if record is None:
        trouble = record_trouble(device.id)
        raise ValueError(
            trouble or f"{device.path} was not made by `pyublk add`: only such a disk is upgraded"
        )
    controller.features().require(Feature.QUIESCE)
    _check(device, record)
    spec = replace(
        record.plan,
        options={**record.plan.options, **(options or {})},
        layers=layers.changed(record.plan.layers, changes),
    )
    try:
        with chdir(record.directory or "/"):
            return daemon.take_over(TakeOver(device.id, served=True), spec)
    except Exception as error:
        error.add_note(_outcome(controller, device, record))
        raise


def _check(device: DeviceInfo, record: Record) -> None:
    process = record.server.open()
    with process or nullcontext():
        if process is None or process.wait(0):
            raise errors.DeviceBusy(
                f"{device.path} has no server: `pyublk recover {device.id}` starts one"
            )
    if device.status.awaits_server:
        raise errors.DeviceBusy(f"{device.path} is just handed over to another server")
    if device.status is not DeviceStatus.LIVE:
        raise errors.DeviceLost(f"{device.path} is stopped")
    if not resends(device.flags):
        raise ValueError(
            f"{device.path} cannot be upgraded: it was not made with --recovery resend, so its "
            "clients' requests would not wait; stop it and add it again"
        )
    if record.log is None:
        raise ValueError(
            f"{device.path} cannot be upgraded: it is served in the foreground; restart its service"
            f"{_unit(record)}"
        )
    if record.plan.disk.get("user") is not None:
        raise ValueError(
            f"{device.path} cannot be upgraded: its server has no rights to hand it over (--user); "
            "stop it and add it again"
        )
    if record.server_name is not None:
        raise ValueError(
            f"{device.path} cannot be upgraded: it shares the server {record.server_name}; stop "
            "it and add it again"
        )


def _unit(record: Record) -> str:
    """The command that does so, if it has the unit that ships."""
    if record.plan.name is None:
        return ""
    return f": systemctl restart pyublk@{record.plan.name}"


def _outcome(controller: Controller, device: DeviceInfo, record: Record) -> str:
    """What has become of a disk that no new server has."""
    until = time.monotonic() + _TAKEN_BACK
    while True:
        try:
            now = controller.info(device.id)
        except OSError:
            return f"{device.path} is gone"
        if now.status is DeviceStatus.LIVE and now.server_pid is not None:
            before = ", as before" if now.server_pid == record.server.pid else ""
            return f"{device.path} is served by process {now.server_pid}{before}"
        if time.monotonic() > until:
            return f"{device.path} has no server now: `pyublk recover {device.id}` starts one"
        time.sleep(0.02)
