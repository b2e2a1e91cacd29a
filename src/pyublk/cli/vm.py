"""`pyublk vm`: run a command on a ublk kernel, on a machine that has none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pyublk.cli.parameters import Seconds
from pyublk.vm import Machine, VMError, attached


class _Memory(click.ParamType[int]):
    """A size of memory, such as 512M or 4GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        try:
            return attached.memory_size(str(value))
        except VMError as error:
            self.fail(str(error), param, ctx)


class _Kernel(click.ParamType[str]):
    """The name of a kernel."""

    name = "kernel"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that go on so."""
        from pyublk.cli.completing import kernel_names

        return kernel_names(incomplete)


@contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """Show a progress bar while a kernel is fetched; nothing when it is there already."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", visible=False)

        def show(what: str, fraction: float | None) -> None:
            total = None if fraction is None else 1
            bar.update(task, description=what, completed=fraction or 0, total=total, visible=True)

        yield show


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--kernel",
    type=_Kernel(),
    default="latest",
    show_default=True,
    metavar="NAME",
    help="latest, host (the kernel that this machine runs), or a series such as 6.12.",
)
@click.option("--refresh", is_flag=True, help="Ask the mirror for a newer kernel of that name.")
@click.option("--cpus", type=int, metavar="N", help="Processors of the machine.  [default: 2]")
@click.option(
    "--memory", type=_Memory(), default="2G", show_default=True, help="Memory of the machine."
)
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    help="End the machine when the command takes longer.",
)
@click.option(
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Keep what the command writes to this directory; may be repeated.",
)
@click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Pass an environment variable on, or set one; may be repeated.",
)
@click.option(
    "--count-instructions",
    is_flag=True,
    help="One processor, one nanosecond for each instruction: slow, but measurements repeat.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def vm(
    kernel: str,
    refresh: bool,
    cpus: int | None,
    memory: int,
    timeout: float | None,
    outputs: tuple[Path, ...],
    variables: tuple[str, ...],
    count_instructions: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND, or a shell, as root in a virtual machine whose kernel has ublk.

    The machine has all files of this one, at the same places, and the same working directory.
    What the command writes stays in the machine's memory and is gone afterwards, except in the
    directories given by --output.
    Ctrl-C goes to the command; twice within three seconds, it ends the machine. On a terminal,
    pressing Ctrl-] three times ends it too.

    The exit code is the command's; 2 when an option is wrong, 124 when --timeout ended it, 125 when
    the machine failed, 126 and 127 when the command could not be run or found, 128 + N when signal
    N ended it.
    """
    try:
        with _progress() as progress:
            machine = Machine(
                kernel,
                cpus=cpus,
                memory=memory,
                count_instructions=count_instructions,
                outputs=outputs,
                refresh=refresh,
                progress=progress,
            )
        code = attached.run(machine, command, env=attached.environment(variables), timeout=timeout)
    except VMError as error:
        code = attached.report(error)
    sys.exit(code)
