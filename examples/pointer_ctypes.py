"""A disk served by a C function, compiled on the spot and called through ctypes' address.

python examples/pointer_ctypes.py
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import pyublk

SOURCE = Path(__file__).with_name("pattern.c")


class Pattern(pyublk.NativeTarget):
    def __init__(self, *, size: int = 1 << 30) -> None:
        super().__init__(size=size)
        self.served = ctypes.c_uint64()  # the handler's context: it must live as long as the disk

    def open(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "pattern.so")
            command = ["cc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE]
            subprocess.run(command, check=True)
            self.library = ctypes.CDLL(str(library))
        self.handler = ctypes.cast(self.library.pattern_handler, ctypes.c_void_p).value or 0
        self.context = ctypes.addressof(self.served)


if __name__ == "__main__":
    with pyublk.Device(Pattern()) as disk:
        print(disk.path, flush=True)
        disk.wait()
