"""A disk in memory by version 1 of nbdkit's API, which is what a plugin without API_VERSION has."""

import builtins

disk = bytearray(1 << 20)
calls = None


def told(*what):
    if calls is not None:
        with builtins.open(calls, "a") as file:
            print(*what, file=file)


def config(key, value):
    global calls
    assert key == "calls"
    calls = value


def open(readonly):
    return None


def get_size(h):
    return len(disk)


def pread(h, count, offset):
    told("pread", count, offset)
    if offset == len(disk) - 512:
        return b"too short"
    return disk[offset : offset + count]


def pwrite(h, buf, offset):
    told("pwrite", len(buf), offset)
    disk[offset : offset + len(buf)] = buf


def flush(h):
    told("flush")


def trim(h, count, offset):
    told("trim", count, offset)


def zero(h, count, offset, may_trim):
    told("zero", count, offset, may_trim)
    disk[offset : offset + count] = bytes(count)
