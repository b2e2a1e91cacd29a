# SPDX-License-Identifier: MIT
"""`pyublk add`."""

import signal
from contextlib import AbstractContextManager
from functools import partial
from types import FrameType

import click
from click.shell_completion import CompletionItem

from pyublk.cli.failures import ExitCode, NotTold, message, open_controller
from pyublk.cli.output import print_json
from pyublk.cli.parameters import Cpus, Size, json_option
from pyublk.interruptions import handled
from pyublk.paths import DataPath
from pyublk.service import daemon
from pyublk.service.records import Record
from pyublk.service.server import ServeResult, serve
from pyublk.service.spec import DiskSpec


class _TargetName(click.ParamType[str]):
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


@click.command()
@click.argument("target", type=_TargetName())
@click.argument("arguments", metavar="[ARGUMENT]...", nargs=-1, type=click.Path())
@click.option("--size", type=Size(), help="Size of the disk, such as 1G or 512MiB.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    type=_Option(),
    metavar="KEY=VALUE",
    callback=_split_options,
    help="A parameter of the target's class; may be repeated.",
)
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option("--block-size", type=Size(), help="Smallest unit of I/O.  [default: the target's]")
@click.option("--queues", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Hardware queues, a thread each; at most one for each CPU.")  # fmt: skip
@click.option("--depth", type=click.IntRange(1, 4096), default=128, show_default=True, metavar="N",
              help="Requests in flight for each queue.")  # fmt: skip
@click.option("--max-io-size", type=Size(), default="512K", show_default=True,
              help="Largest request, and buffer of each.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=0), default=0, metavar="N",
              help="Threads for a parallel target whose methods block.")  # fmt: skip
@click.option("--path", type=click.Choice(["auto", *(path.value for path in DataPath)]),
              default="auto", show_default=True, metavar="WAY", help="How data travels: "
              f"auto, {', '.join(path.value for path in DataPath)}.")  # fmt: skip
@click.option("--batch/--no-batch", default=None,
              help="Commands that carry many tags.  [default: where the kernel can]")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Threads for each queue.")  # fmt: skip
@click.option("--id", "device_id", type=click.IntRange(min=0), metavar="N",
              help="The N of /dev/ublkbN.  [default: the lowest free]")  # fmt: skip
@click.option("--no-partition-scan", is_flag=True,
              help="Do not look for partitions when the disk starts (Linux 7.0).")  # fmt: skip
@click.option("--cpus", multiple=True, type=Cpus(), metavar="LIST",
              help="CPUs of a queue's thread, such as 0-3,8; once for each queue.  [default: those "
              "whose requests it gets]")  # fmt: skip
@click.option("--any-cpu", is_flag=True, help="Keep no thread to CPUs.")
@click.option("--preempt", is_flag=True,
              help="Let each request take the CPU from the client that runs on it, instead of "
              "gathering what clients send.")  # fmt: skip
@click.option("--io-scheduler", default="auto", show_default=True, metavar="NAME",
              help="The kernel's I/O scheduler for the disk; auto: none, but for zoned "
              "disks.")  # fmt: skip
@click.option("-f", "--foreground", is_flag=True,
              help="Serve in this process until Ctrl-C, instead of in the background.")  # fmt: skip
@click.option("--server", metavar="NAME",
              help="Have one server process of this name serve it, and others.")  # fmt: skip
@json_option
def add(
    target: str,
    arguments: tuple[str, ...],
    size: int | None,
    options: dict[str, str],
    read_only: bool,
    block_size: int | None,
    queues: int,
    depth: int,
    max_io_size: int,
    workers: int,
    path: str,
    batch: bool | None,
    threads: int,
    device_id: int | None,
    no_partition_scan: bool,
    cpus: tuple[list[int], ...],
    any_cpu: bool,
    preempt: bool,
    io_scheduler: str,
    foreground: bool,
    server: str | None,
    as_json: bool,
) -> None:
    """Serve TARGET as a disk, and print the disk's path once it can be used.

    TARGET is `null`, `ram`, `file`, `linear`, `stripe`, `mirror`, `slice`, `zoned`, another
    installed target, `package.module:Class`, or
    `file.py:Class`. ARGUMENTs are the class's first parameters, --option names any of them.

    \b
    pyublk add ram --size 4G
    pyublk add file disk.img
    pyublk add mydisk.py:Rot13 --size 1G --option key=13

    A server process stays in the background until `pyublk stop`; `pyublk info` names its log.
    """
    if cpus and any_cpu:
        raise click.UsageError("--cpus and --any-cpu exclude each other")
    if server is not None and foreground:
        raise click.UsageError("--server and --foreground exclude each other")
    spec = DiskSpec(
        target=target,
        arguments=arguments,
        options=options,
        size=size,
        block_size=block_size,
        read_only=read_only or None,
        queues=queues,
        depth=depth,
        id=device_id,
        max_io_size=max_io_size,
        workers=workers,
        path=path,
        batch=batch,
        threads=threads,
        partition_scan=not no_partition_scan,
        affinity=None if any_cpu else list(cpus) or "auto",
        preempt=preempt,
        io_scheduler=io_scheduler,
    )
    open_controller().close()  # no driver, no rights: said before anything is started
    show = partial(_show, as_json=as_json)
    if not foreground:
        with _ended_as_by_ctrl_c():
            daemon.start(spec, ready=show, server=server)
        return
    served = serve(spec, log_file=None, ready=show)
    if served is None:
        click.get_current_context().exit(ExitCode.INTERRUPTED)
    if as_json:
        print_json({"requests": served.total.requests, "seconds": round(served.seconds, 3)})
    message(_summary(served))


def _ended_as_by_ctrl_c() -> AbstractContextManager[None]:
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
        "target": record.spec.target,
        "server_pid": record.server.pid,
        "log": str(record.log) if record.log else None,
    }
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
