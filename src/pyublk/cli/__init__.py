# SPDX-License-Identifier: MIT
"""The command `pyublk`: reads the command line and prints; what it does, the library does.

Each command is imported when it is called, so that a slow or broken one troubles no other.
"""

import difflib
import importlib
import sys
from typing import Any

import click

from pyublk import launch
from pyublk.cli.failures import Failure, reported

#: Command -> (module in this package, its short help).
_COMMANDS = {
    "add": ("adding", "Serve a target as a disk."),
    "list": ("listing", "List the disks of this machine."),
    "info": ("listing", "Show all details of disks."),
    "stop": ("stopping", "Flush disks and stop them."),
    "del": ("stopping", "Stop and delete devices of any server, even a dead one."),
    "recover": ("recovering", "Serve a disk whose server is gone."),
    "upgrade": ("upgrading", "Serve a disk by a new server process while it is used."),
    "up": ("defining", "Serve the disks that files define."),
    "down": ("defining", "Stop the disks that files define."),
    "plan": ("defining", "Show what `up` would change."),
    "serve": ("service", "Serve a disk that files define, in this process."),
    "service": ("service", "Install systemd's units, or remove them."),
    "stats": ("asking", "Print a disk's counters."),
    "top": ("top", "Watch what all disks do."),
    "metrics": ("metrics", "Export the metrics of all disks to Prometheus."),
    "trace": ("tracing", "Record the requests of a disk, and read what was recorded."),
    "resize": ("asking", "Change the size of a disk while it is used."),
    "s3": ("objects", "Make, list, copy and remove disks in object stores."),
    "replace": ("asking", "Replace a mirror's failed leg."),
    "fault": ("faulting", "Make requests of a disk fail, wait, or go wrong."),
    "limit": ("faulting", "Limit a disk's requests and bytes a second."),
    "overlay": ("overlaying", "Make overlays, and bring them together with their bases."),
    "cache": ("caching", "Drain a disk's cache, or make it forget what it has."),
    "logs": ("logs", "Print the log of a disk's server."),
    "features": ("features", "Show which features this kernel's ublk has."),
    "doctor": ("doctor", "Find out what keeps this machine from serving disks."),
    "vm": ("vm", "Run a command in a virtual machine with a ublk kernel."),
    "nbdkit-plugin": ("nbdkit_plugin", "Print the path of the plugin for nbdkit."),
    "completion": ("completion", "Print the script that completes this command in a shell."),
}


class _Commands(click.Group):
    """A group that knows its commands' names and short helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"pyublk.cli.{_COMMANDS[cmd_name][0]}")
        return next(
            value
            for value in vars(module).values()
            if isinstance(value, click.Command) and value.name == cmd_name
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            close = difflib.get_close_matches(args[0], _COMMANDS)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        with reported(traceback=ctx.params["traceback"]):
            return super().invoke(ctx)

    def main(self, *args: Any, **extra: Any) -> Any:
        launch.fill_streams()
        try:
            return super().main(*args, **extra)
        except OSError as error:  # the help or the version could not be printed
            failure = Failure(error)
            failure.show()
            sys.exit(failure.exit_code)
        finally:
            launch.settle_streams()


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no ublk driver, 4 no permission, "
    "5 no such device, 6 in use, 7 timed out, 8 something to change, 130 interrupted.",
)
@click.version_option(package_name="pyublk")
@click.option(
    "--traceback",
    is_flag=True,
    envvar="PYUBLK_TRACEBACK",
    show_envvar=True,
    help="Show the traceback of a failure.",
)
def main(traceback: bool) -> None:
    """Linux block devices written in Python."""
