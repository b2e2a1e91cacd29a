# SPDX-License-Identifier: MIT
"""The kernel's ublk interface: numbers, flags and layouts (linux/ublk_cmd.h of Linux 7.3).

A leaf: imports nothing of pyublk. Structs and their fields keep the kernel's names; enum members
drop its `UBLK_` prefixes. Integers are in the machine's byte order; a name that ends in `_sectors`
counts sectors of 512 bytes, whatever the device's logical block size.
"""

# ruff: noqa: N801 -- structs keep the kernel's names
import ctypes
import errno
import mmap
from enum import IntEnum, IntFlag

_READ, _READ_WRITE = 2, 3


def _ioc(direction: int, number: int, size: int) -> int:
    """An ioctl-style number of type 'u', for a payload of `size` bytes (asm-generic/ioctl.h)."""
    return direction << 30 | size << 16 | ord("u") << 8 | number


class ControlCommand(IntEnum):
    """Commands for /dev/ublk-control; the payload is a `ublksrv_ctrl_cmd` (32 bytes)."""

    GET_QUEUE_AFFINITY = _ioc(_READ, 0x01, 32)
    GET_DEV_INFO = _ioc(_READ, 0x02, 32)
    ADD_DEV = _ioc(_READ_WRITE, 0x04, 32)
    DEL_DEV = _ioc(_READ_WRITE, 0x05, 32)
    START_DEV = _ioc(_READ_WRITE, 0x06, 32)
    STOP_DEV = _ioc(_READ_WRITE, 0x07, 32)
    SET_PARAMS = _ioc(_READ_WRITE, 0x08, 32)
    GET_PARAMS = _ioc(_READ, 0x09, 32)
    START_USER_RECOVERY = _ioc(_READ_WRITE, 0x10, 32)
    END_USER_RECOVERY = _ioc(_READ_WRITE, 0x11, 32)
    GET_DEV_INFO2 = _ioc(_READ, 0x12, 32)
    GET_FEATURES = _ioc(_READ, 0x13, 32)
    DEL_DEV_ASYNC = _ioc(_READ, 0x14, 32)
    UPDATE_SIZE = _ioc(_READ_WRITE, 0x15, 32)
    QUIESCE_DEV = _ioc(_READ_WRITE, 0x16, 32)
    TRY_STOP_DEV = _ioc(_READ_WRITE, 0x17, 32)
    REG_BUF = _ioc(_READ_WRITE, 0x18, 32)
    UNREG_BUF = _ioc(_READ_WRITE, 0x19, 32)


class IOCommand(IntEnum):
    """Commands for /dev/ublkcN; the payload is 16 bytes (`ublksrv_io_cmd` or `ublk_batch_io`)."""

    FETCH_REQ = _ioc(_READ_WRITE, 0x20, 16)
    COMMIT_AND_FETCH_REQ = _ioc(_READ_WRITE, 0x21, 16)
    NEED_GET_DATA = _ioc(_READ_WRITE, 0x22, 16)
    REGISTER_IO_BUF = _ioc(_READ_WRITE, 0x23, 16)
    UNREGISTER_IO_BUF = _ioc(_READ_WRITE, 0x24, 16)
    PREP_IO_CMDS = _ioc(_READ_WRITE, 0x25, 16)
    COMMIT_IO_CMDS = _ioc(_READ_WRITE, 0x26, 16)
    FETCH_IO_CMDS = _ioc(_READ_WRITE, 0x27, 16)


class Feature(IntFlag):
    """Device flags (UBLK_F_*) and bits of GET_FEATURES; `pyublk.features` tells what each buys."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


class Op(IntEnum):
    """What a request asks for (bits 0 to 7 of op_flags)."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_SAME = 4
    WRITE_ZEROES = 5
    ZONE_OPEN = 10
    ZONE_CLOSE = 11
    ZONE_FINISH = 12
    ZONE_APPEND = 13
    ZONE_RESET_ALL = 14
    ZONE_RESET = 15
    REPORT_ZONES = 18


class IOFlag(IntFlag):
    """How a request asks for it: bits 8 to 31 of op_flags, at their places in op_flags."""

    FAILFAST_DEV = 1 << 8
    FAILFAST_TRANSPORT = 1 << 9
    FAILFAST_DRIVER = 1 << 10
    META = 1 << 11
    FUA = 1 << 13
    NOUNMAP = 1 << 15
    SWAP = 1 << 16
    NEED_REG_BUF = 1 << 17
    INTEGRITY = 1 << 18
    SHMEM_ZC = 1 << 19


class DeviceStatus(IntEnum):
    """Device states (UBLK_S_DEV_*): not started or stopped; served; waiting for a new server with
    requests queued; the same with requests failing.
    """

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3

    @property
    def awaits_server(self) -> bool:
        """Whether its server is gone, and another one may take the device over."""
        return self in (DeviceStatus.QUIESCED, DeviceStatus.FAIL_IO)


class ParamType(IntFlag):
    """Which parameter groups a `ublk_params` carries."""

    BASIC = 1 << 0
    DISCARD = 1 << 1
    DEVT = 1 << 2
    ZONED = 1 << 3
    DMA_ALIGN = 1 << 4
    SEGMENT = 1 << 5
    INTEGRITY = 1 << 6


class Attr(IntFlag):
    """Attributes of the basic parameters (UBLK_ATTR_*)."""

    READ_ONLY = 1 << 0
    ROTATIONAL = 1 << 1
    VOLATILE_CACHE = 1 << 2
    FUA = 1 << 3


class IntegrityFlag(IntFlag):
    """Flags of the integrity parameters."""

    INTEGRITY_CAPABLE = 1 << 0
    REF_TAG = 1 << 1


class Checksum(IntEnum):
    """Protection-information checksums of the integrity parameters."""

    NONE = 0
    IP = 1
    T10DIF = 2
    NVME = 4


class BatchFlag(IntFlag):
    """Flags of `ublk_batch_io`."""

    HAS_ZONE_LBA = 1 << 0
    HAS_BUF_ADDR = 1 << 1
    AUTO_BUF_REG_FALLBACK = 1 << 2


SECTOR_SIZE = 512
MAX_QUEUE_DEPTH = 4096
MAX_QUEUES = 4096
#: Device ids are below this (the kernel's 20 bits of minor number).
MAX_DEVICES = 1 << 20
#: Device id, or queue id, meaning "choose one" and "none".
ANY_DEVICE = 0xFFFFFFFF
NO_QUEUE = 0xFFFF

#: Bytes of the mask that GET_FEATURES gives.
FEATURES_LENGTH = 8

#: Results of FETCH_REQ and COMMIT_AND_FETCH_REQ. After ABORT, a tag is not fetched again.
IO_RES_OK = 0
IO_RES_NEED_GET_DATA = 1
IO_RES_ABORT = -errno.ENODEV

#: User copy addresses a request's bytes by an offset in the char device's file.
IO_BUF_OFFSET = 0x80000000
IO_BUF_BITS = 25
TAG_BITS = 16
QID_BITS = 12
TAG_OFFSET = IO_BUF_BITS
QID_OFFSET = TAG_OFFSET + TAG_BITS
INTEGRITY_BUF_BIT = 1 << 62
#: The most bytes of one request that user copy can address (32 MiB).
MAX_USER_COPY = 1 << IO_BUF_BITS

#: Flag of the automatic-registration word.
AUTO_BUF_REG_FALLBACK = 1 << 0
#: Flag of `ublk_shmem_buf_reg`.
SHMEM_BUF_READ_ONLY = 1 << 0
#: Where the buffer's index starts in the address of a request with IOFlag.SHMEM_ZC.
SHMEM_INDEX_OFFSET = 32
#: The smallest segment that the segment parameters may ask for (bytes).
MIN_SEGMENT_SIZE = 4096
#: The most tags one completion of FETCH_IO_CMDS brings.
MAX_BATCH_TAGS = 128


class _Struct(ctypes.Structure):
    """Equal when its bytes are; built zeroed."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]


def _fields(**fields: object) -> list[tuple[str, type]]:
    return list(fields.items())  # type: ignore[arg-type]


_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_i32 = ctypes.c_int32


class ublksrv_ctrl_cmd(_Struct):
    """Payload of a control command, at byte 48 of a 128-byte SQE (32 bytes).

    `len` counts the device path too, when there is one; `data` is the kernel's data[0].
    """

    _fields_ = _fields(
        dev_id=_u32,
        queue_id=_u16,
        len=_u16,
        addr=_u64,
        data=_u64,
        dev_path_len=_u16,
        pad=_u16,
        reserved=_u32,
    )


class ublksrv_ctrl_dev_info(_Struct):
    """A device as asked for and as granted (64 bytes; Linux < 7.3 has padding for io_desc_size)."""

    _fields_ = _fields(
        nr_hw_queues=_u16,
        queue_depth=_u16,
        state=_u16,
        io_desc_size=_u16,
        max_io_buf_bytes=_u32,
        dev_id=_u32,
        ublksrv_pid=_i32,
        pad1=_u32,
        flags=_u64,
        ublksrv_flags=_u64,
        owner_uid=_u32,
        owner_gid=_u32,
        reserved=_u64 * 2,
    )


class ublksrv_io_desc(_Struct):
    """One request, in the map of its queue at the index of its tag (24 bytes).

    `nr_sectors` is the number of zones when REPORT_ZONES asks.
    """

    _fields_ = _fields(op_flags=_u32, nr_sectors=_u32, start_sector=_u64, addr=_u64)


class ublksrv_io_cmd(_Struct):
    """Payload of an I/O command, at byte 48 of the SQE (16 bytes).

    `addr` is the buffer's address, a buffer table's index, or the LBA a zone append wrote.
    """

    _fields_ = _fields(q_id=_u16, tag=_u16, result=_i32, addr=_u64)


class ublk_batch_io(_Struct):
    """Payload of a batch command, at byte 48 of the SQE (16 bytes)."""

    _fields_ = _fields(
        q_id=_u16, flags=_u16, nr_elem=_u16, elem_bytes=_u8, reserved=_u8, reserved2=_u64
    )


class ublk_elem_header(_Struct):
    """Head of one element of a batch (8 bytes); a buffer address and an LBA may follow."""

    _fields_ = _fields(tag=_u16, buf_index=_u16, result=_i32)


class ublk_shmem_buf_reg(_Struct):
    """Shared memory to register by REG_BUF (24 bytes)."""

    _fields_ = _fields(addr=_u64, len=_u64, flags=_u32, reserved=_u32)


class ublk_param_basic(_Struct):
    """Sizes as shifts: the block size is 1 << shift bytes (32 bytes)."""

    _fields_ = _fields(
        attrs=_u32,
        logical_bs_shift=_u8,
        physical_bs_shift=_u8,
        io_opt_shift=_u8,
        io_min_shift=_u8,
        max_sectors=_u32,
        chunk_sectors=_u32,
        dev_sectors=_u64,
        virt_boundary_mask=_u64,
    )


class ublk_param_discard(_Struct):
    """Limits of discard and write-zeroes; alignment and granularity in bytes (20 bytes)."""

    _fields_ = _fields(
        discard_alignment=_u32,
        discard_granularity=_u32,
        max_discard_sectors=_u32,
        max_write_zeroes_sectors=_u32,
        max_discard_segments=_u16,
        reserved0=_u16,
    )


class ublk_param_devt(_Struct):
    """Device numbers, filled in by the kernel only (16 bytes)."""

    _fields_ = _fields(char_major=_u32, char_minor=_u32, disk_major=_u32, disk_minor=_u32)


class ublk_param_zoned(_Struct):
    """Limits of a zoned device (32 bytes)."""

    _fields_ = _fields(
        max_open_zones=_u32,
        max_active_zones=_u32,
        max_zone_append_sectors=_u32,
        reserved=_u8 * 20,
    )


class ublk_param_dma_align(_Struct):
    """`alignment` is a mask: 511 asks for multiples of 512 bytes (8 bytes)."""

    _fields_ = _fields(alignment=_u32, pad=_u8 * 4)


class ublk_param_segment(_Struct):
    """Limits of a request's scatter list (16 bytes)."""

    _fields_ = _fields(
        seg_boundary_mask=_u64, max_segment_size=_u32, max_segments=_u16, pad=_u8 * 2
    )


class ublk_param_integrity(_Struct):
    """Layout of per-interval metadata; an interval is 1 << interval_exp bytes (16 bytes)."""

    _fields_ = _fields(
        flags=_u32,
        max_integrity_segments=_u16,
        interval_exp=_u8,
        metadata_size=_u8,
        pi_offset=_u8,
        csum_type=_u8,
        tag_size=_u8,
        pad=_u8 * 5,
    )


class ublk_params(_Struct):
    """All parameters of a device (152 bytes; older kernels know a prefix of it)."""

    _fields_ = _fields(
        len=_u32,
        types=_u32,
        basic=ublk_param_basic,
        discard=ublk_param_discard,
        devt=ublk_param_devt,
        zoned=ublk_param_zoned,
        dma=ublk_param_dma_align,
        seg=ublk_param_segment,
        integrity=ublk_param_integrity,
    )


class blk_zone(_Struct):
    """One zone of a report (include/uapi/linux/blkzoned.h)."""

    _fields_ = _fields(
        start=_u64,
        len=_u64,
        wp=_u64,
        type=_u8,
        cond=_u8,
        non_seq=_u8,
        reset=_u8,
        resv=_u8 * 4,
        capacity=_u64,
        reserved=_u8 * 24,
    )


#: Bytes of a descriptor, unless the device was added with Feature.IO_DESC_SIZE.
DESCRIPTOR_SIZE = ctypes.sizeof(ublksrv_io_desc)


def _page_round(size: int, page_size: int) -> int:
    return -(-size // page_size) * page_size


def descriptor_map_offset(
    queue: int, page_size: int = mmap.PAGESIZE, *, descriptor_size: int = DESCRIPTOR_SIZE
) -> int:
    """Where in the char device a queue's descriptors are mapped (bytes).

    The stride is that of the largest depth, whatever the device's own depth is.
    """
    return queue * _page_round(MAX_QUEUE_DEPTH * descriptor_size, page_size)


def descriptor_map_length(
    depth: int, page_size: int = mmap.PAGESIZE, *, descriptor_size: int = DESCRIPTOR_SIZE
) -> int:
    """Bytes of a queue's descriptor map; the kernel takes no other length."""
    return _page_round(depth * descriptor_size, page_size)


def user_copy_offset(queue: int, tag: int, offset: int = 0, *, integrity: bool = False) -> int:
    """The char-device file offset of byte `offset` of a request's data, or of its metadata.

    Raises ValueError for a part that would run into its neighbour's bits: another request's data.
    """
    for name, value, bits in (
        ("queue", queue, QID_BITS),
        ("tag", tag, TAG_BITS),
        ("offset", offset, IO_BUF_BITS),
    ):
        if value >> bits:
            raise ValueError(f"{name} must be 0 to {(1 << bits) - 1}, not {value}")
    position = IO_BUF_OFFSET + (queue << QID_OFFSET) + (tag << TAG_OFFSET) + offset
    return position | INTEGRITY_BUF_BIT if integrity else position


def auto_buf_reg_word(index: int, *, fallback: bool = False) -> int:
    """The word (SQE.addr) that asks for automatic registration at table slot `index`.

    With `fallback`, a registration that fails is reported by IOFlag.NEED_REG_BUF; without it the
    client's request fails and the server never sees it.
    """
    if not 0 <= index < 1 << 16:
        raise ValueError(f"buffer index must be 0 to 65535, not {index}")
    return index | (AUTO_BUF_REG_FALLBACK if fallback else 0) << 16


def shmem_buffer(address: int) -> tuple[int, int]:
    """The shared buffer's index and the byte offset in it, from a SHMEM_ZC request's `addr`."""
    return address >> SHMEM_INDEX_OFFSET & 0xFFFF, address & 0xFFFFFFFF
