"""Find the programs a machine is made of."""

import os
import shutil

from pyublk.vm.errors import MissingProgram


def find(program: str, package: str) -> str:
    """Return the absolute path of `program`.

    Raises:
        MissingProgram: it is not installed; the message names the Debian `package`.
    """
    # A user's PATH often lacks the directories of what is root's.
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    path = shutil.which(program, path=os.pathsep.join(places))
    if path is None:
        raise MissingProgram(
            f"{program} is not installed, and the virtual machine needs it: "
            f"run 'apt-get install {package}' as root"
        )
    return path
