"""A disk served by a C function that cffi compiles from a string.

pip install cffi
python examples/pointer_cffi.py
"""

import importlib.util
import tempfile

import cffi

import pyublk

PROTOTYPE = """
int64_t mirror_handler(void *context, uint32_t op, uint32_t flags, uint64_t offset,
                       uint64_t length, void *buffer);
"""
#: Two copies of the disk in one block of memory; a read takes the second one.
CODE = """
#include <stdint.h>
#include <string.h>
struct memory { uint64_t size; char *bytes; };
static int64_t mirror_handler(void *context, uint32_t op, uint32_t flags, uint64_t offset,
                              uint64_t length, void *buffer)
{
    struct memory *memory = context;
    (void)flags;
    if (op == 0)
        memcpy(buffer, memory->bytes + memory->size + offset, length);
    if (op == 1) {
        memcpy(memory->bytes + offset, buffer, length);
        memcpy(memory->bytes + memory->size + offset, buffer, length);
    }
    return 0;
}
"""


class Mirrored(pyublk.NativeTarget):
    def __init__(self, *, size: int = 16 << 20) -> None:
        super().__init__(size=size)

    def open(self) -> None:
        builder = cffi.FFI()
        builder.cdef(PROTOTYPE + "struct memory { uint64_t size; char *bytes; };")
        builder.set_source("_pyublk_mirror", CODE)
        with tempfile.TemporaryDirectory() as folder:
            path = builder.compile(tmpdir=folder)
            spec = importlib.util.spec_from_file_location("_pyublk_mirror", path)
            assert spec is not None
            assert spec.loader is not None
            self.module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
        ffi, lib = self.module.ffi, self.module.lib
        self.bytes = ffi.new("char[]", 2 * self.size)
        self.memory = ffi.new("struct memory *", {"size": self.size, "bytes": self.bytes})
        self.handler = int(ffi.cast("uintptr_t", ffi.addressof(lib, "mirror_handler")))
        self.context = int(ffi.cast("uintptr_t", self.memory))


if __name__ == "__main__":
    with pyublk.Device(Mirrored()) as disk:
        print(disk.path, flush=True)
        disk.wait()
