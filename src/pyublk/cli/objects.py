# SPDX-License-Identifier: MIT
"""`pyublk s3`: disks in object stores, without serving them."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import Size, json_option
from pyublk.sizes import format_size, short_size
from pyublk.targets.objects import disks
from pyublk.targets.objects.disks import DiskInfo
from pyublk.targets.objects.manifest import DEFAULT_CHUNK
from pyublk.targets.objects.store import Location, Objects, connect

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds for which a command tries: whoever waits for it can call it again.
PATIENCE = 10.0


class _Place(click.ParamType[Location]):
    """Where a disk is."""

    name = "disk"

    def __init__(self, *, snapshot: bool = False) -> None:
        self._snapshot = snapshot

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Location:
        if isinstance(value, Location):
            return value
        try:
            found = Location.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if found.snapshot is not None and not self._snapshot:
            self.fail(f"{value} is a snapshot, and a disk is asked for", param, ctx)
        return found


def _store_options(command: F) -> F:
    """Which server, as parameters for `connect`."""
    for option in (
        click.option("--anonymous", is_flag=True, help="Ask without credentials."),
        click.option("--region", metavar="NAME", help="Region of S3.  [default: AWS_REGION]"),
        click.option(
            "--endpoint", metavar="URL", help="Server of S3.  [default: AWS_ENDPOINT_URL]"
        ),
    ):
        command = option(command)
    return command


def _objects(place: Location, server: dict[str, Any]) -> Objects:
    return Objects(connect(place.store, **server), str(place), retry_for=PATIENCE)


@click.group()
def s3() -> None:
    """Make, list, copy and remove disks in object stores; `pyublk add s3` serves them.

    DISK is bucket/name in S3, or a URL such as gs://bucket/name or az://container/name; a snapshot
    of it is DISK@NAME. Credentials are taken from the environment: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY and others, or the machine's own role.
    """


@s3.command()
@click.argument("disk", type=_Place())
@click.option("--size", required=True, type=Size(), help="Size of the disk, such as 1G.")
@click.option(
    "--chunk-size", type=Size(), default=DEFAULT_CHUNK, metavar="SIZE",
    help=f"Bytes in one object.  [default: {format_size(DEFAULT_CHUNK)}; a power of two]",
)  # fmt: skip
@click.option(
    "--compression", type=click.Choice(["none", "zstd"]), default="none",
    help="How objects are compressed.  [default: none]",
)  # fmt: skip
@_store_options
@json_option
def create(
    disk: Location, size: int, chunk_size: int, compression: str, as_json: bool, **server: Any
) -> None:
    """Make an empty disk.

    Fails for a store that ignores conditions (If-Match): it could not keep a second writer out.
    """
    objects = _objects(disk, server)
    disks.create(objects, disk.name, size=size, chunk_size=chunk_size, compression=compression)
    if as_json:
        print_json(asdict(disks.info(objects, disk.name)))


@s3.command("list")
@click.argument("place", metavar="BUCKET[/PREFIX]")
@_store_options
@json_option
def list_(place: str, as_json: bool, **server: Any) -> None:
    """List the disks of a bucket.

    With PREFIX, those whose names begin with it and a slash.
    """
    try:
        # Any name would do: the store, and what is before it, are asked for.
        there = Location.parse(place.rstrip("/") + "/any")
    except ValueError:
        raise click.BadParameter(f"{place!r} is not a bucket", param_hint="'BUCKET'") from None
    objects = Objects(connect(there.store, **server), place, retry_for=PATIENCE)
    prefix = there.name.removesuffix("any").rstrip("/") or None
    found = [disks.info(objects, name) for name in disks.names_below(objects, prefix)]
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        print_table(
            ["NAME", "SIZE", "DATA", "SNAPSHOTS", "OPEN BY"],
            [
                [
                    one.name,
                    short_size(one.size),
                    short_size(one.chunks * one.chunk_size),
                    str(len(one.snapshots)),
                    one.writer or "-",
                ]
                for one in found
            ],
        )


@s3.command()
@click.argument("disk", type=_Place(snapshot=True))
@_store_options
@json_option
def info(disk: Location, as_json: bool, **server: Any) -> None:
    """Show a disk's state and snapshots."""
    found = disks.info(_objects(disk, server), disk.name, disk.snapshot)
    if as_json:
        print_json(asdict(found))
        return
    for name, value in _described(found):
        click.echo(f"{name + ':':<13}{value}")


def _described(found: DiskInfo) -> list[tuple[str, str]]:
    return [
        ("name", found.name),
        ("size", format_size(found.size)),
        ("chunks", f"{found.chunks} of {format_size(found.chunk_size)}"),
        ("compression", found.compression),
        ("state", f"flush {found.flushes} of writer {found.epoch}"),
        ("open by", found.writer or "nobody"),
        ("clone of", found.parent or "-"),
        ("clones", str(found.clones)),
        ("snapshots", ", ".join(found.snapshots) or "-"),
    ]


@s3.command()
@click.argument("snapshot", metavar="DISK@NAME", type=_Place(snapshot=True))
@_store_options
def snapshot(snapshot: Location, **server: Any) -> None:
    """Keep what a disk had when it was flushed.

    It is kept as DISK@NAME; the disk may be in use. No data is copied. A file system should be
    frozen or synced first (`sync`, `fsfreeze`).
    """
    if snapshot.snapshot is None:
        raise click.BadParameter("write DISK@NAME", param_hint="'DISK@NAME'")
    disks.take_snapshot(_objects(snapshot, server), snapshot.name, snapshot.snapshot)


@s3.command()
@click.argument("source", metavar="DISK[@NAME]", type=_Place(snapshot=True))
@click.argument("to", metavar="NEW", type=_Place())
@_store_options
def clone(source: Location, to: Location, **server: Any) -> None:
    """Make a disk that begins as another one is.

    NEW begins as DISK is, or as the snapshot DISK@NAME. No data is copied: both use the same
    objects until they write their own. NEW has to be in the same bucket.
    """
    if source.store != to.store:
        raise click.BadParameter(f"{to} is in another bucket than {source}", param_hint="'NEW'")
    disks.clone(_objects(source, server), source.name, source.snapshot, to.name)


@s3.command()
@click.argument("disk", type=_Place())
@click.option("--force", is_flag=True, help="End a clean-up that was killed, and begin anew.")
@_store_options
@json_option
def gc(disk: Location, force: bool, as_json: bool, **server: Any) -> None:
    """Delete objects that nothing needs any more.

    Those that the disk, its snapshots or its clones need are kept. What is overwritten leaves
    objects behind, and so does a writer that is killed. The disk may be in use.
    """
    count = disks.clean_up(_objects(disk, server), disk.name, force=force)
    if as_json:
        print_json({"deleted": count})
    else:
        click.echo(f"{count} objects deleted")


@s3.command()
@click.argument("disk", metavar="DISK[@NAME]", type=_Place(snapshot=True))
@click.option("--force", is_flag=True, help="Even if it has snapshots, or was not closed.")
@_store_options
def rm(disk: Location, force: bool, **server: Any) -> None:
    """Delete a disk, or a snapshot of one.

    A disk goes with all of its objects. What a snapshot alone needed is deleted by the next `gc`.
    """
    disks.remove(_objects(disk, server), disk.name, disk.snapshot, force=force)
