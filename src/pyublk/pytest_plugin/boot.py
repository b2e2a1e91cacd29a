# SPDX-License-Identifier: MIT
"""The process that holds the virtual machine of a session: boots it and joins the session in it to
this process's own standard streams. SIGTERM ends it."""

import os
import sys
from pathlib import Path

from pyublk import launch
from pyublk.vm import Machine, VMError, attached


def main() -> int:
    """Returns the exit code of the session in the machine, or one that says that it failed."""
    launch.ctrl_c_interrupts()
    kernel, memory = sys.argv[1:]
    try:
        machine = Machine(kernel, memory=int(memory))
        session = [sys.executable, str(Path(__file__).with_name("guest.py"))]
        # The machine has a /run of its own.
        env = {name: text for name, text in os.environ.items() if name != "XDG_RUNTIME_DIR"}
        return attached.run(machine, session, env=env)
    except VMError as error:
        return attached.report(error)


if __name__ == "__main__":
    sys.exit(main())
