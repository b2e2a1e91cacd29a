# SPDX-License-Identifier: MIT
"""`pyublk list` and `pyublk info`: what disks there are."""

import errno
from dataclasses import asdict
from typing import Any

import click

from pyublk import errors
from pyublk.cli.failures import NoDriver, message, open_controller
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import DeviceId, json_option
from pyublk.control import Controller, DeviceInfo
from pyublk.nbdkit import disks as nbd
from pyublk.service.inventory import DiskEntry, QueueEntry, disk
from pyublk.service.plan import DiskSpec
from pyublk.service.stopping import unless_gone
from pyublk.service.sysfs import Sysfs, whom_to_ask
from pyublk.service.usage import uses
from pyublk.sizes import format_size
from pyublk.uapi import Feature


def find(controller: Controller | Sysfs, number: int) -> DeviceInfo:
    """The device, or the failure that says which ones there are."""
    try:
        return controller.info(number)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        others = ", ".join(str(device.id) for device in controller.devices())
        others = f"; there are: {others}" if others else ", nor any other"
        raise errors.device_not_found(number, others) from error


def _source(controller: Controller) -> Controller | Sysfs:
    source = whom_to_ask(controller)
    if source is not controller:
        message("io_uring is forbidden: this comes from sysfs and the records, not the driver")
    return source


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the disks of this machine.

    Disks of other servers are listed too; the target is shown only for disks that `pyublk add`
    made.
    """
    by_nbd = nbd.disks()
    disks = []
    try:
        with open_controller() as controller:
            source = _source(controller)
            for device in source.devices():
                with unless_gone():
                    disks.append(disk(source, device, ask_server=as_json))
    except NoDriver:
        if not by_nbd:
            raise
    for one in disks:
        if one.record_trouble:
            message(f"the server of {one.device.path} is not known: {one.record_trouble}")
    if as_json:
        print_json([*(_summary(one) for one in disks), *(one.summary() for one in by_nbd)])
    elif disks or by_nbd:
        print_table(
            ["ID", "PATH", "TARGET", "SIZE", "STATE", "QUEUES", "SERVER", "USED BY"],
            [*(_row(one) for one in disks), *(_nbd_row(one) for one in by_nbd)],
        )
    else:
        message("there are no disks")


def _row(one: DiskEntry) -> list[str]:
    device = one.device
    return [
        str(device.id),
        device.path,
        one.record.plan.target if one.record else "?" if one.record_trouble else "-",
        format_size(one.size) if one.size else "-",
        device.status.name.lower(),
        f"{device.queues} x {device.depth}",
        f"{one.server_name or '?'} ({device.server_pid})" if device.server_pid else "-",
        ", ".join(str(use).partition(" is ")[2] for use in one.uses) or "-",
    ]


def _nbd_row(one: nbd.NBDDisk) -> list[str]:
    return [
        one.name,
        one.path,
        one.plan.target,
        format_size(one.size) if one.size else "-",
        one.state,
        "-",
        f"nbdkit ({one.server.pid})",
        ", ".join(str(use).partition(" is ")[2] for use in uses(one.name)) or "-",
    ]


def _target(plan: DiskSpec) -> str:
    """What is served, as it was asked for."""
    options = (f"{key}={value}" for key, value in plan.options.items())
    return " ".join([plan.target, *plan.arguments, *options])


def _nbd_lines(one: nbd.NBDDisk) -> list[tuple[str, str]]:
    return [
        ("state", one.state),
        ("size", f"{format_size(one.size)} ({one.size} bytes)" if one.size else "-"),
        ("server", f"nbdkit, process {one.server.pid}, for the nbd driver"),
        ("target", _target(one.plan)),
        ("log", str(one.log)),
        *([("used by", str(use)) for use in uses(one.name)] or [("used by", "nobody")]),
    ]


def _summary(one: DiskEntry) -> dict[str, Any]:
    device, record = one.device, one.record
    return {
        "id": device.id,
        "path": device.path,
        "target": record.plan.target if record else None,
        "size": one.size,
        "state": device.status.name.lower(),
        "queues": device.queues,
        "depth": device.depth,
        "server_pid": device.server_pid,
        "failed_requests": one.failed,
        "used_by": [asdict(use) for use in one.uses],
        "log": str(record.log) if record and record.log else None,
        "ours": device.ours,
    }


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=DeviceId(nbd_allowed=True))
@json_option
def info(ids: tuple[int | str, ...], as_json: bool) -> None:
    """Show all details of disks: queues, flags, parameters, server, log, users, I/O so far.

    ID is a number or a node such as /dev/ublkb0 or /dev/nbd0. With --json, prints a list.
    """
    disks: list[DiskEntry | nbd.NBDDisk] = [nbd.find(one) for one in ids if isinstance(one, str)]
    if len(disks) < len(ids):
        with open_controller() as controller:
            source = _source(controller)
            disks += [disk(source, find(source, one)) for one in ids if isinstance(one, int)]
    if as_json:
        told = (one.summary() if isinstance(one, nbd.NBDDisk) else _details(one) for one in disks)
        print_json([*told])
        return
    for place, one in enumerate(disks):
        if place:
            click.echo()
        if isinstance(one, nbd.NBDDisk):
            print_table(["DISK", one.path], _nbd_lines(one))
        else:
            print_table(["DISK", one.device.path], _lines(one))


def _details(one: DiskEntry) -> dict[str, Any]:
    device, record = one.device, one.record
    return _summary(one) | {
        "char_path": device.char_path,
        "max_io_size": device.max_io_size,
        "flags": _flags(device),
        "server_name": one.server_name,
        "cookie": device.cookie,
        "owner": {"uid": device.owner_uid, "gid": device.owner_gid},
        "plan": asdict(record.plan) if record else None,
        "data_path": record.data_path if record else None,
        "restart": record.restarts.told() if record and record.restarts else None,
        "record_trouble": one.record_trouble,
        "status": one.status,
        "stack": one.told.get("stack") if one.told else None,
        "threads": one.told.get("threads") if one.told else None,
        "faults": one.told.get("faults", []) if one.told else None,
        "limit": one.told.get("limit") if one.told else None,
        "server_silent": one.silence,
        "params": asdict(one.params) if one.params else None,
        "io_scheduler": one.io_scheduler,
        "shared_memory": one.shared_memory,
        "hardware_queues": [asdict(queue) for queue in one.queues],
        "served": asdict(one.served) if one.served else None,
    }


def _status_lines(status: dict[str, Any] | None) -> list[tuple[str, str]]:
    lines = []
    for name, value in (status or {}).items():
        values = value if isinstance(value, list) else [value]
        for one in values:
            words = one
            if isinstance(one, dict):
                words = ", ".join(f"{key} {what}" for key, what in one.items() if what is not None)
            lines.append((name, str(words)))
    return lines


def _stack_lines(stack: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A disk's layers and the target below them as a tree, each with what it says of itself."""
    lines = []
    for depth, one in enumerate(stack):
        branch = "   " * (depth - 1) + "└─ " if depth else ""
        lines.append(("" if depth else "stack", branch + one["class"]))
        for name, words in _status_lines(one["status"]):
            lines.append(("", f"{'   ' * depth}   {name}: {words}"))
    return lines


def fault_lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    """The rules of a disk, and its limit, as its server tells of them."""
    limit = told.get("limit")
    lines = [("limit", f"{limit['rule']}, {limit['fired']} waited")] if limit else []
    for rule in told.get("faults", []):
        lines.append((f"fault {rule['number']}", f"{rule['rule']}, fired {rule['fired']} times"))
    return lines


def _queue_words(queue: QueueEntry) -> str:
    cpus = ", ".join(map(str, queue.cpus))
    threads = ", ".join(map(str, queue.threads))
    return f"requests of CPU {cpus or '-'}, served by thread {threads or '?'}"


def _flags(device: DeviceInfo) -> list[str]:
    return [flag.name or hex(flag) for flag in Feature(device.flags)]


def _lines(one: DiskEntry) -> list[tuple[str, str]]:
    device, record = one.device, one.record
    lines = [
        ("server node", device.char_path),
        ("state", device.status.name.lower()),
        ("size", f"{format_size(one.size)} ({one.size} bytes)" if one.size else "-"),
        ("queues", f"{device.queues}, depth {device.depth}"),
        ("largest request", format_size(device.max_io_size)),
        ("flags", ", ".join(_flags(device)) or "-"),
        ("I/O scheduler", one.io_scheduler or "-"),
        ("server", f"{one.server_name or '?'}, process {device.server_pid or '-'}"),
        *((f"queue {queue.id}", _queue_words(queue)) for queue in one.queues),
        ("owner", f"uid {device.owner_uid}, gid {device.owner_gid}"),
    ]
    if record:
        lines.append(("target", _target(record.plan)))
        lines += [("layer", text) for text in record.plan.layers]
        lines.append(("data path", record.data_path or "unknown"))
        if (stack := (one.told or {}).get("stack")) is None:
            lines += _status_lines(one.status)
        else:
            lines += _stack_lines(stack)
        lines += fault_lines(one.told or {})
        if one.shared_memory:
            lines.append(("shared memory", one.shared_memory))
        if one.silence:
            lines.append(("status", f"unknown: {one.silence}"))
        if record.server_name:
            lines.append(("server's name", record.server_name))
        if record.restarts is not None:
            lines.append(("restart", record.restarts.words()))
            if (history := record.restarts.history()) is not None:
                lines.append(("restarts", history))
        lines.append(("log", str(record.log) if record.log else "on the server's terminal"))
    else:
        why = one.record_trouble or "not made by `pyublk add`"
        lines.append(("target", f"unknown: {why}"))
    lines += [("used by", str(use)) for use in one.uses] or [("used by", "nobody")]
    if one.served:
        lines += [
            (name.replace("_", " "), format_size(value) if name.startswith("bytes") else str(value))
            for name, value in asdict(one.served).items()
        ]
    if one.failed is not None:
        lines.append(("failed requests", str(one.failed)))
    if one.params:
        for group, fields in asdict(one.params).items():
            for name, value in (fields or {}).items():
                lines.append((f"{group}: {name.replace('_', ' ')}", str(value)))
    return lines
