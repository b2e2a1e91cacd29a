# SPDX-License-Identifier: MIT
"""`pyublk overlay`: what is done to overlays that no disk uses."""

from dataclasses import asdict
from pathlib import Path

import click

from pyublk import overlays
from pyublk.cli.adding import ended_as_by_ctrl_c
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import Size, json_option
from pyublk.sizes import format_size, short_size

_file = click.argument("file", metavar="FILE", type=click.Path(path_type=Path))


@click.group()
def overlay() -> None:
    """Make overlays, look at them, and bring them together with their bases.

    An overlay keeps what is written to a disk in two files, FILE and FILE.map, and leaves the base
    as it is. `pyublk add overlay FILE` serves it. BASE is a file, a block device, or NAME:ARGUMENT
    for any target, such as image:debian.qcow2; many overlays can have the same one.

    All commands except `info` refuse an overlay that a disk uses.
    """


@overlay.command()
@_file
@click.option("--base", metavar="BASE", required=True, help="What lies below.")
@click.option(
    "--size", type=Size(), metavar="SIZE", help="Of the disk, such as 20G.  [that of the base]"
)
@click.option(
    "--granularity",
    type=Size(),
    metavar="SIZE",
    default=overlays.GRANULARITY,
    help="What is copied up at once.  [4096]",
)
@click.option(
    "--clone", is_flag=True, help="Make a plain image instead, which shares the base's blocks."
)
@json_option
def create(
    file: Path, base: str, size: int | None, granularity: int, clone: bool, as_json: bool
) -> None:
    """Make the overlay FILE over a base.

    What identifies the base is recorded with it: an overlay over a base that has changed is
    refused. With --size, the disk is larger than the base, and reads as zeroes beyond it.

    With --clone, the file system copies FILE from the base at once, and its blocks are shared until
    they are written (xfs, btrfs, and others with FICLONE). FILE is a plain image then, which
    `pyublk add file FILE` serves, and which does not need the base.
    """
    if clone:
        if size is not None:
            raise click.UsageError("--clone and --size exclude each other: resize the disk later")
        overlays.clone(file, base)
        told: dict[str, object] = {"file": str(file), "size": file.stat().st_size, "clone": True}
    else:
        with ended_as_by_ctrl_c():
            made = overlays.create(file, base, size=size, granularity=granularity)
        told = {"file": str(file), "size": made.size, "clone": False}
    if as_json:
        print_json(told)
    else:
        click.echo(str(file))


@overlay.command()
@_file
@json_option
def info(file: Path, as_json: bool) -> None:
    """Show what an overlay is, and its base.

    It shows whether the base is unchanged, the size, and how much the overlay has itself. For an
    overlay that a disk uses, the latest writes may be missing.
    """
    found = overlays.info(file)
    if as_json:
        print_json(asdict(found))
        return
    base = found.base or "none on record: it is used as a layer"
    state = f"{found.state}: {found.why}" if found.why else found.state
    rows = [
        ("size", format_size(found.size)),
        ("base", base),
        ("state of the base", state),
        ("granularity", format_size(found.granularity)),
        ("present", f"{short_size(found.present)} ({found.present / found.size:.1%})"),
        ("on the file system", short_size(found.allocated)),
    ]
    for name, value in rows:
        click.echo(f"{name + ':':<20}{value}")


@overlay.command()
@_file
@click.option("--content", is_flag=True, help="Only what differs from the base, which is read.")
@json_option
def diff(file: Path, content: bool, as_json: bool) -> None:
    """List what an overlay has itself.

    Each range has an offset and a length in bytes. A block that was written is listed even if it
    has the same bytes as the base, unless --content is given.
    """
    runs = overlays.diff(file, content=content)
    if as_json:
        print_json([{"offset": offset, "length": length} for offset, length in runs])
    else:
        print_table(["OFFSET", "LENGTH"], [[str(one) for one in run] for run in runs])


@overlay.command()
@_file
@click.option("--force", is_flag=True, help="Even if other overlays are seen to lie over the base.")
@json_option
def commit(file: Path, force: bool, as_json: bool) -> None:
    """Write an overlay into its base.

    The overlay is empty afterwards. Nobody may use the base meanwhile. Other overlays over it are
    of no use afterwards: those in the directories of FILE and of the base are looked for, and the
    commit is refused if there are any.

    A commit that fails, or is interrupted, loses nothing: the overlay keeps everything until the
    base has it durably. Run it again; until then, the overlay cannot be served.
    """
    with ended_as_by_ctrl_c():
        written = overlays.commit(file, force=force)
    _tell(written, "written into the base", as_json=as_json)


@overlay.command()
@_file
@click.argument("base", metavar="BASE")
@click.option(
    "--moved", is_flag=True, help="BASE is the old base, moved or copied: compare some blocks only."
)
@click.option("--unsafe", is_flag=True, help="Compare nothing: only change the record.")
@json_option
def rebase(file: Path, base: str, moved: bool, unsafe: bool, as_json: bool) -> None:
    """Put an overlay over another base.

    The disk keeps its bytes: where the old base and BASE differ, the old one's blocks are copied
    into the overlay, for which both are read.

    With --moved, the old base is not needed: BASE must have its size, and its bytes in some blocks
    that are compared. With --unsafe, everything but the size is taken on trust: wherever the
    overlay has no block of its own, the disk then reads as BASE does.
    """
    if moved and unsafe:
        raise click.UsageError("--moved and --unsafe exclude each other")
    trust: overlays.Trust = "samples" if moved else "everything" if unsafe else "nothing"
    with ended_as_by_ctrl_c():
        copied = overlays.rebase(file, base, trust=trust)
    _tell(copied, "copied up", as_json=as_json)


@overlay.command()
@_file
@click.option(
    "--to",
    "image",
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Write the whole disk into a new file instead, and leave the overlay as it is.",
)
@json_option
def squash(file: Path, image: Path | None, as_json: bool) -> None:
    """Make one overlay of a chain, or an image.

    FILE then lies over the first base that is not an overlay. The overlays in between stay as they
    are. With --to, the overlay and its base become an image that needs neither.
    """
    with ended_as_by_ctrl_c():
        if image is None:
            _tell(overlays.squash(file), "copied up", as_json=as_json)
        else:
            _tell(overlays.extract(file, image), f"written to {image}", as_json=as_json)


def _tell(count: int, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"bytes": count})
    else:
        click.echo(f"{short_size(count)} {what}")
