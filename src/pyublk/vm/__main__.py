"""`python -m pyublk.vm`: the machine without the command's dependencies, for tests and scripts."""

import argparse
import signal
import sys

from pyublk import launch
from pyublk.vm import attached
from pyublk.vm.errors import VMError
from pyublk.vm.machine import LONGEST, Machine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyublk.vm",
        description="Run a command, or a shell, in a virtual machine with a ublk kernel.",
    )
    parser.add_argument("--kernel", default="latest", help="latest, host, or a series such as 6.12")
    parser.add_argument("--refresh", action="store_true", help="ask the mirror for a newer kernel")
    parser.add_argument("--cpus", type=int, help="processors of the guest (2)")
    parser.add_argument("--memory", default="2G", help="memory of the guest (2G)")
    parser.add_argument("--timeout", type=float, help="seconds the command may take")
    parser.add_argument("--count-instructions", action="store_true", help="repeatable measurements")
    parser.add_argument("--output", action="append", default=[], help="directory open for writing")
    parser.add_argument("--env", action="append", default=[], help="NAME or NAME=VALUE to pass on")
    parser.add_argument("command", nargs="*", help="the command, after --")
    return parser


class _Progress:
    """Tell each step once, on a line of its own."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str, _fraction: float | None) -> None:
        if what != self._last:
            print(f"pyublk vm: {what}", file=sys.stderr)
            self._last = what


def main() -> int:
    """Run the command line; returns the exit code."""
    launch.fill_streams()
    launch.ctrl_c_interrupts()
    parser = _parser()
    options = parser.parse_args()
    if options.timeout is not None and not 0 < options.timeout <= LONGEST:
        parser.error(f"--timeout must be above 0 seconds, not {options.timeout:g}")
    try:
        environment = attached.environment(options.env)
        machine = Machine(
            options.kernel,
            cpus=options.cpus,
            memory=attached.memory_size(options.memory),
            count_instructions=options.count_instructions,
            outputs=options.output,
            refresh=options.refresh,
            progress=_Progress(),
        )
        return attached.run(machine, options.command, env=environment, timeout=options.timeout)
    except VMError as error:
        return attached.report(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
