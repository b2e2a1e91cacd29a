# SPDX-License-Identifier: MIT
"""`pyublk add`."""

import signal
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import click
from click.shell_completion import CompletionItem

from pyublk.cli.failures import ExitCode, NoDriver, NotTold, message, open_controller
from pyublk.cli.output import print_json
from pyublk.cli.parameters import disk_options, disk_options_given, json_option
from pyublk.interruptions import handled
from pyublk.service import daemon
from pyublk.service.plan import DiskSpec, check_rules
from pyublk.service.records import Record, memory_place
from pyublk.service.server import ServeResult, serve


class TargetName(click.ParamType[str]):
    """A target by name, or a class by its place."""

    name = "target"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from pyublk.cli.completing import target_names

        return target_names(incomplete)


class _Option(click.ParamType[str]):
    """KEY=VALUE."""

    name = "option"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from pyublk.cli.completing import option_names

        # An option whose value is to come keeps click from sorting what there is.
        target = ctx.params.get("target") or next(iter(ctx.args), "")
        return option_names(target, incomplete)


class LayerText(click.ParamType[str]):
    """NAME[:KEY=VALUE,...]."""

    name = "layer"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from pyublk.cli.completing import layer_texts

        return layer_texts(incomplete)


def _split_options(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is no KEY=VALUE", ctx, param)
        if key in options:
            raise click.BadParameter(
                f"{key} is given twice: several values go with commas between them", ctx, param
            )
        options[key] = value
    return options


target_options = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    type=_Option(),
    metavar="KEY=VALUE",
    callback=_split_options,
    help="A parameter of the target's class; may be repeated.",
)


layer_options = click.option(
    "--layer",
    "layers",
    multiple=True,
    type=LayerText(),
    metavar="NAME[:KEY=VALUE,...]",
    help="A layer over the target, and over the layers before it; may be repeated.",
)


@click.command()
@click.argument("target", type=TargetName(), required=False)
@click.argument("arguments", metavar="[ARGUMENT]...", nargs=-1, type=click.Path())
@target_options
@layer_options
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Read target and options from a file; those on the command line override it.",
)
@disk_options
@click.option("-f", "--foreground", is_flag=True,
              help="Serve in this process until Ctrl-C, instead of in the background.")  # fmt: skip
@click.option("--server", metavar="NAME",
              help="Serve it in the server process NAME, which disks can share.")  # fmt: skip
@click.option("--via", type=click.Choice(["ublk", "nbd"]), default="ublk", show_default=True,
              help="The driver: nbd is for kernels without ublk, and needs nbdkit.")  # fmt: skip
@json_option
def add(
    target: str | None,
    arguments: tuple[str, ...],
    options: dict[str, str],
    layers: tuple[str, ...],
    spec: Path | None,
    foreground: bool,
    server: str | None,
    via: str,
    as_json: bool,
    **_: object,
) -> None:
    """Serve TARGET as a disk, and print the disk's path once it can be used.

    TARGET is `null`, `ram`, `file`, `linear`, `stripe`, `mirror`, `slice`, `overlay`, `cache`,
    `nbd`, `url`, `s3`, `image`, `rbd`, `nbdkit`, `integrity`, `zoned`, another installed target,
    `package.module:Class`, or `file.py:Class`. ARGUMENTs are the class's
    first parameters; --option sets any of them by name. TARGET:ARGUMENT is the same as TARGET
    ARGUMENT. Each --layer lies over what was named before it.

    \b
    pyublk add ram --size 4G
    pyublk add file disk.img
    pyublk add mydisk.py:Rot13 --size 1G --option key=13
    pyublk add --spec examples/disk.toml

    A server process runs in the background until `pyublk stop`; `pyublk info` names its log.
    """
    if server is not None and foreground:
        raise click.UsageError("--server and --foreground exclude each other")
    context = click.get_current_context()
    wanted = _wanted(context, target, arguments, options, layers, spec)
    if via == "nbd":
        if server is not None or foreground:
            raise click.UsageError("--via nbd excludes --server and --foreground")
        _add_by_nbd(wanted, as_json=as_json)
        return
    try:
        open_controller().close()  # no driver, no rights: said before anything is started
    except NoDriver:
        wanted.make_target()  # its author may write it here, and only serve it elsewhere
        raise
    show = partial(_show, as_json=as_json)
    if not foreground:
        with ended_as_by_ctrl_c():
            daemon.start(wanted, ready=show, server=server)
        return
    served = serve(wanted, log_file=None, ready=show)
    if served is None:
        context.exit(ExitCode.INTERRUPTED)
    if as_json:
        print_json({"requests": served.total.requests, "seconds": round(served.seconds, 3)})
    message(_summary(served))


def _add_by_nbd(wanted: DiskSpec, *, as_json: bool) -> None:
    from pyublk.nbdkit import disks as nbd

    with ended_as_by_ctrl_c():
        disk = nbd.start(wanted)
    message(f"{disk.path} is {nbd.LOST}")
    if as_json:
        print_json(disk.summary())
    else:
        click.echo(disk.path)


def _wanted(
    ctx: click.Context,
    target: str | None,
    arguments: tuple[str, ...],
    options: dict[str, str],
    layers: tuple[str, ...],
    file: Path | None,
) -> DiskSpec:
    """What the file describes, with what the command line says in its place."""
    disk = disk_options_given(ctx)
    for name, value in disk.items():
        try:
            check_rules(name, value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param_hint=f"'--{name}'") from None
    if file is None:
        if target is None:
            raise click.MissingParameter(ctx=ctx, param_type="argument", param_hint="'TARGET'")
        return DiskSpec(
            target=target, arguments=arguments, options=options, layers=layers, disk=disk
        )
    if target is not None:
        raise click.UsageError("TARGET and --spec exclude each other: the file names the target")
    described = DiskSpec.from_toml(file)
    return replace(
        described,
        options=described.options | options,
        layers=layers or described.layers,
        disk={**described.disk, **disk},
    )


def ended_as_by_ctrl_c() -> AbstractContextManager[None]:
    """SIGTERM, and a terminal that goes, undo what was begun, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    plain = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    return handled(dict.fromkeys(plain, interrupt))


def _show(record: Record, *, as_json: bool) -> None:
    """Raises NotTold when it cannot: nobody would know of the disk."""
    fields = {
        "id": record.id,
        "path": record.path,
        "target": record.plan.target,
        "server_pid": record.server.pid,
        "log": str(record.log) if record.log else None,
    }
    if (memory := memory_place(record.id)).exists():
        fields["shared_memory"] = str(memory)
        message(f"clients find the memory that they share with {record.path} at {memory}")
    try:
        if as_json:
            print_json(fields)
        else:
            click.echo(record.path)
    except OSError as error:
        raise NotTold(
            f"{record.path} was made, but that could not be printed: {error.strerror}; it is "
            "stopped again"
        ) from error


def _summary(served: ServeResult) -> str:
    total = served.total
    rate = total.requests / served.seconds if served.seconds else 0.0
    return (
        f"{total.requests} requests served in {served.seconds:.1f} s ({rate:.0f} per second), "
        f"{total.errors} failed"
    )
