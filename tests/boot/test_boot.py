"""A Debian that is booted from a web server: by `overlay` over `cache` over `url`, as the root of a
virtual machine whose process 1 is its systemd.

`./run boot` has this, since a boot takes minutes where processors are emulated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from image import debian

from pyublk.vm import GuestFailed, Machine
from pyublk.vm.emulator import Emulator
from pyublk.vm.initramfs import Archive

#: Seconds for a boot on an emulated machine.
PATIENCE = 900
HERE = Path(__file__).parent
SESSION = Path(sys.modules[Machine.__module__].__file__ or "").parent / "guest/session.sh"


class Booting(Machine):
    """A machine whose process 1 becomes that of the disk which its command names."""

    def _write_initramfs(
        self, emulator: Emulator, mark: str, job: bytes, *, terminal: bool
    ) -> None:
        super()._write_initramfs(emulator, mark, job, terminal=terminal)
        over = Archive()  # a later archive's files take the place of those before
        over.file("pyublk/session.sh", (HERE / "process_1.sh").read_bytes(), 0o755)
        over.file("pyublk/command.sh", SESSION.read_bytes(), 0o755)
        with emulator.initramfs.open("ab") as file:
            file.write(over.finish())


def boot(which: str, place: Path, image: Path) -> dict[str, Any]:
    """What the machine tells, once it has booted, and has ended as by `systemctl reboot`."""
    machine = Booting(cpus=4, memory=3 << 30, outputs=[place])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/sbin:/usr/sbin"
    with pytest.raises(GuestFailed, match="the machine stopped before the command ended") as end:
        machine.run(
            [sys.executable, str(HERE / "guest.py"), which, str(place), str(image)],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
    assert "reboot: Restarting system" in end.value.console
    found = json.loads((place / f"{which}.json").read_text())
    print(json.dumps(found, indent=2))
    assert isinstance(found, dict)
    return found


@pytest.mark.timeout(4000)
def test_a_machine_boots_from_a_web_server(tmp_path: Path) -> None:
    image = debian()
    with (tmp_path / "disk").open("wb") as own:
        own.truncate(2 << 30)
    mke2fs: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", tmp_path / "disk"]
    subprocess.run(mke2fs, check=True, env={"PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"})

    first = boot("first", tmp_path, image)
    assert first["waited"] > 5
    assert len(first["boots"]) == 1
    assert first["units that failed"] == ""
    assert first["kernel's errors"] == []
    assert first["fetched"] > first["fetched before"] + (1 << 20)
    (told,) = [line for line in first["told"] if " ERROR " in line]
    assert "the connection is refused, for 45 seconds: given up" in told

    second = boot("second", tmp_path, image)
    assert second["boots"][:-1] == first["boots"]
    assert second["units that failed"] == ""
    assert second["kernel's errors"] == []
    assert second["requests"] == 0
