#!/usr/sbin/nbdkit python
"""A disk in memory by version 2 of nbdkit's API: it tells its calls, and fails where asked to."""

import builtins
import errno

import nbdkit

API_VERSION = 2

size = 1 << 20
calls = None
native_zero = True
disk = None


def told(*what):
    if calls is not None:
        with builtins.open(calls, "a") as file:
            print(*what, file=file)


def config(key, value):
    global calls, size, native_zero
    if key == "calls":
        calls = value
    elif key == "size":
        size = nbdkit.parse_size(value)
    elif key == "zero":
        native_zero = value == "native"
    else:
        raise RuntimeError(f"unknown parameter {key}")


def config_complete():
    global disk
    if size % 512:
        raise ValueError("the size must be a multiple of 512")
    disk = bytearray(size)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def default_export(readonly, is_tls):
    return "the-default"


def open(readonly):
    told("open", readonly, nbdkit.export_name())
    return {"readonly": readonly}


def close(h):
    told("close", h["readonly"])


def get_size(h):
    return len(disk)


def is_rotational(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def block_size(h):
    return (512, 8192, 1 << 25)


def fail_in_the_last_blocks(offset):
    """In the last four sectors, each call fails in another way."""
    at = (len(disk) - offset) // 512
    if at == 4:
        nbdkit.set_error(errno.ENOSPC)
        raise RuntimeError("full")
    if at == 3:
        nbdkit.set_error(errno.EPERM)
        raise RuntimeError("not allowed")
    if at == 2:
        raise RuntimeError("no errno")
    if at == 1:
        nbdkit.set_error(errno.ENOSPC)  # without an exception, it is no error


def pread(h, buf, offset, flags):
    told("pread", len(buf), offset, flags)
    fail_in_the_last_blocks(offset)
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    told("pwrite", len(buf), offset, flags)
    fail_in_the_last_blocks(offset)
    disk[offset : offset + len(buf)] = buf


def flush(h, flags):
    told("flush", flags)


def trim(h, count, offset, flags):
    told("trim", count, offset, flags)
    disk[offset : offset + count] = bytes(count)


def zero(h, count, offset, flags):
    told("zero", count, offset, flags & ~nbdkit.FLAG_FUA)
    if not native_zero:
        nbdkit.set_error(errno.EOPNOTSUPP)
        if offset:
            raise RuntimeError("zeroes are to be written")
        return
    disk[offset : offset + count] = bytes(count)
