"""A disk served by Python that Numba compiles: no interpreter, no GIL, per request.

pip install numba
python examples/pointer_numba.py
"""

import numba
import numpy as np
from numba import carray, cfunc, types

import pyublk

SIGNATURE = types.int64(
    types.voidptr, types.uint32, types.uint32, types.uint64, types.uint64, types.voidptr
)


@numba.extending.intrinsic
def as_bytes(typing_context, address):  # type: ignore[no-untyped-def]
    """The address, as a pointer to bytes: Numba has no cast of its own for it."""
    pointer = types.CPointer(types.uint8)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(pointer))

    return pointer(types.voidptr), generate


@cfunc(SIGNATURE)
def handler(context, op, flags, offset, length, buffer):  # type: ignore[no-untyped-def]
    """Keeps every byte inverted."""
    if op > 1:
        return 0
    store = carray(as_bytes(context), offset + length)
    data = carray(as_bytes(buffer), length)
    for i in range(length):
        if op == 0:
            data[i] = store[offset + i] ^ 0xFF
        else:
            store[offset + i] = data[i] ^ 0xFF
    return 0


class Inverted(pyublk.NativeTarget):
    def __init__(self, *, size: int = 16 << 20) -> None:
        super().__init__(size=size)

    def open(self) -> None:
        self.store = np.full(self.size, 0xFF, np.uint8)
        self.handler = handler.address
        self.context = self.store.ctypes.data


if __name__ == "__main__":
    with pyublk.Device(Inverted()) as disk:
        print(disk.path, flush=True)
        disk.wait()
