# SPDX-License-Identifier: MIT
"""A new server for a disk whose server is gone."""

from contextlib import chdir
from dataclasses import replace

from pyublk import errors
from pyublk.control import Controller, DeviceInfo
from pyublk.options import DiskOptions
from pyublk.service import daemon
from pyublk.service.plan import DiskSpec, TakeOver
from pyublk.service.records import Record, record_trouble


def recover(
    controller: Controller,
    device: DeviceInfo,
    spec: DiskSpec | None = None,
    *,
    server: str | None = None,
    memory: str | None = None,
) -> Record:
    """Serves a disk that waits for a server, as its record says, or by another target.

    A `spec` is looked up in the caller's directory, and gets size, block size and whether it is
    read-only from the disk, which other software may have made. `server` is the name of one that
    may serve other disks too, by default that of the record. `memory` is the path of a file in
    memory which has the disk's data. Raises what `daemon.take_over` raises, and ValueError for a
    disk that nobody knows how to serve.
    """
    record = Record.of(device)
    if spec is not None:
        return daemon.take_over(
            TakeOver(device.id, empty=True),
            _fitted(controller, device, spec, record),
            server=server,
        )
    if record is None:
        trouble = record_trouble(device.id)
        raise ValueError(
            f"{trouble or f'{device.path} has no record'}: name the target that is to serve it"
        )
    try:
        with chdir(record.directory or "/"):
            return daemon.take_over(
                TakeOver(device.id, memory=memory),
                record.plan,
                server=server or record.server_name,
            )
    except FileNotFoundError as error:
        if error.filename != record.directory:
            raise
        raise errors.InvalidTarget(
            f"{record.directory}, where {device.path} was added, is gone: name its target again"
        ) from None


def _fitted(
    controller: Controller, device: DeviceInfo, spec: DiskSpec, record: Record | None
) -> DiskSpec:
    """The spec, with what the disk is, and what was asked of it and by whom."""
    basic = controller.get_params(device.id).basic
    before = record.plan if record is not None else spec
    disk: DiskOptions = {
        **before.disk,
        "size": basic.size,
        "block_size": basic.logical_block_size,
        "read_only": basic.read_only,
    }
    return replace(spec, disk=disk, name=before.name, file=before.file)
