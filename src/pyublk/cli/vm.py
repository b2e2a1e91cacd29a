"""`pyublk vm`: run a command on a ublk kernel, on a machine that has none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pyublk.cli.output import print_json
from pyublk.cli.parameters import Seconds, json_option
from pyublk.vm import Machine, VMError, attached, staying

_F = TypeVar("_F", bound=Callable[..., Any])
_V = TypeVar("_V")


class _Checked(click.ParamType[_V]):
    """A value of a text, by a function of the machine's that says what is wrong with one."""

    def __init__(self, name: str, value_of: Callable[[str], _V]) -> None:
        self.name = name
        self._value_of = value_of

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> _V:
        """Return the value."""
        try:
            return self._value_of(str(value))
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


class _VM(click.Group):
    """A command that runs others in a new machine, and has commands for machines that stay. After
    ``--`` stands a program, whatever it is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave what is none of the group's own commands to `vm` itself."""
        given = list(args)
        super().parse_args(ctx, args)
        rest = [*ctx._protected_args, *ctx.args]
        after_dashes = given[: len(given) - len(rest)][-1:] == ["--"]
        if rest and (after_dashes or rest[0] not in self.commands):
            ctx.params["command"] = tuple(rest)
            ctx._protected_args, ctx.args = [], []
        return ctx.args

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return what the usage line shows."""
        return ["[OPTIONS] [[--] COMMAND]..."]


def _machine_options(command: _F) -> _F:
    """Add the options that say what a machine is like."""
    options = (
        click.option(
            "--kernel",
            type=_Kernel(),
            default="latest",
            show_default=True,
            metavar="NAME",
            help="latest, host (the kernel that this machine runs), or a series such as 6.12.",
        ),
        click.option(
            "--refresh", is_flag=True, help="Ask the mirror for a newer kernel of that name."
        ),
        click.option(
            "--cpus", type=int, metavar="N", help="Processors of the machine.  [default: 2]"
        ),
        click.option(
            "--memory",
            type=_Checked("size", attached.memory_size),
            default="2G",
            show_default=True,
            help="Memory of the machine.",
        ),
        click.option(
            "--output",
            "outputs",
            multiple=True,
            type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
            help="Keep what the command writes to this directory; may be repeated.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


_environment_option = click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Pass an environment variable on, or set one; may be repeated.",
)
_name_option = click.option(
    "--name",
    type=_Checked("name", staying.check_name),
    default="default",
    show_default=True,
    help="The machine that is meant.",
)


@click.group(
    cls=_VM, invoke_without_command=True, context_settings={"allow_interspersed_args": False}
)
@_machine_options
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    help="End the machine when the command takes longer.",
)
@_environment_option
@click.option(
    "--count-instructions",
    is_flag=True,
    help="One processor, one nanosecond for each instruction: slow, but measurements repeat.",
)
@click.pass_context
def vm(
    context: click.Context,
    kernel: str,
    refresh: bool,
    cpus: int | None,
    memory: int,
    timeout: float | None,
    outputs: tuple[Path, ...],
    variables: tuple[str, ...],
    count_instructions: bool,
    command: tuple[str, ...] = (),
) -> None:
    """Run COMMAND, or a shell, as root in a virtual machine whose kernel has ublk.

    The machine has all files of this one, at the same places, and the same working directory.
    What the command writes stays in the machine's memory and is gone afterwards, except in the
    directories given by --output. The machine, and every disk in it, ends with the command: a disk
    is made and used in one shell.
    Ctrl-C goes to the command; twice within three seconds, it ends the machine. On a terminal,
    pressing Ctrl-] three times ends it too.

    The exit code is the command's; 2 when an option is wrong, 124 when --timeout ended it, 125 when
    the machine failed, 126 and 127 when the command could not be run or found, 128 + N when signal
    N ended it.

    start, exec, list and stop are for a machine that stays. A program of such a name is run by
    `pyublk vm -- NAME`.
    """
    if context.invoked_subcommand is not None:
        return
    try:
        environment = attached.environment(variables)
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
        code = attached.run(machine, command, env=environment, timeout=timeout)
    except VMError as error:
        code = attached.report(error)
    sys.exit(code)


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except VMError as error:
        sys.exit(attached.report(error))


@vm.command(short_help="Start a machine that stays.")
@_name_option
@_machine_options
def start(
    name: str,
    kernel: str,
    refresh: bool,
    cpus: int | None,
    memory: int,
    outputs: tuple[Path, ...],
) -> None:
    """Start a machine that stays until it is stopped.

    Its commands (`pyublk vm exec`) need not wait for a boot. What they write stays in its memory
    until then.
    """
    settings = {
        "kernel": kernel,
        "cpus": cpus,
        "memory": memory,
        "outputs": list(map(str, outputs)),
    }
    with _reported():
        with _progress() as progress:
            Machine(kernel, cpus=cpus, memory=memory, outputs=outputs, refresh=refresh,
                    progress=progress)  # fmt: skip
        started = staying.start(name, settings)
    click.echo(f"{started.name}: Linux {started.release}")


@vm.command(
    name="exec",
    short_help="Run a command in a machine that stays.",
    context_settings={"allow_interspersed_args": False},
)
@_name_option
@_environment_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str, variables: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Run COMMAND in a machine that stays, as root, in this working directory.

    It sees the files of this machine as they are now. Input and output are passed on, and Ctrl-C;
    the exit code is the command's. It has no terminal.
    """
    with _reported():
        code = staying.execute(name, command, env=attached.environment(variables))
    sys.exit(code)


@vm.command(name="list", short_help="List the machines that stay.")
@json_option
def list_machines(as_json: bool) -> None:
    """List the machines that stay, and those that have died."""
    found = staying.machines()
    if as_json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        state = f"Linux {one.release}, process {one.pid}" if one.alive else "has died"
        click.echo(f"{one.name}: {state}")


@vm.command(short_help="Stop a machine that stays.")
@_name_option
def stop(name: str) -> None:
    """Stop a machine that stays; what was written in it is gone."""
    with _reported():
        if not staying.stop(name):
            click.echo(f"{name} had died; what it has left is removed", err=True)
