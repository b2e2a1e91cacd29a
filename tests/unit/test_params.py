# SPDX-License-Identifier: MIT
"""Device parameters: what is refused and how it is said, and the way to the kernel and back."""

import dataclasses
import mmap
import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyublk.params import Basic, Devt, Discard, DmaAlign, Integrity, Params, Segment, Zoned
from pyublk.uapi import Checksum, Feature, ParamType, ublk_params

PAGE = mmap.PAGESIZE
GIB = 1 << 30
SECTORS_MAX = ((1 << 32) - 1) * 512


def basic(**changes: Any) -> Basic:
    return Basic(**{"size": GIB} | changes)


def zoned(basic_changes: dict[str, Any], **zoned_fields: Any) -> Params:
    fields = {"max_append_size": 65536} | zoned_fields
    return Params(basic=basic(**{"chunk_size": 1 << 28} | basic_changes), zoned=Zoned(**fields))


def with_blocks(block_size: int, **groups: Any) -> Params:
    return Params(basic=basic(logical_block_size=block_size), **groups)


REFUSALS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: basic(size=1000),
        "size must be a multiple of the logical block size (512 bytes) from 512 to "
        "9223372036854775296 bytes, not 1000",
    ),
    (lambda: basic(size=0), "(512 bytes) from 512 to 9223372036854775296 bytes, not 0"),
    (lambda: basic(size=-512), "bytes, not -512"),
    (lambda: basic(size=1e9), "bytes, not 1000000000.0"),
    (
        lambda: basic(size=512, logical_block_size=4096),
        "size must be a multiple of the logical block size (4096 bytes) from 4096 to",
    ),
    (
        lambda: basic(logical_block_size=1000),
        f"logical_block_size must be a power of two from 512 to {PAGE} bytes, not 1000",
    ),
    (lambda: basic(logical_block_size=256), f"from 512 to {PAGE} bytes, not 256"),
    (lambda: basic(logical_block_size=2 * PAGE), f"from 512 to {PAGE} bytes, not {2 * PAGE}"),
    (
        lambda: basic(logical_block_size=4096, physical_block_size=512),
        "physical_block_size must be a power of two from 4096 to 268435456 bytes, not 512",
    ),
    (lambda: basic(physical_block_size=1 << 29), "from 512 to 268435456 bytes, not 536870912"),
    (
        lambda: basic(physical_block_size=4096, io_min=1024),
        "io_min must be a power of two from 4096 to 268435456 bytes, not 1024",
    ),
    (lambda: basic(io_min=1536), "io_min must be a power of two from 512 to 268435456 bytes"),
    (
        lambda: basic(io_min=8192, io_opt=4096),
        "io_opt must be 0, or a power of two from 8192 to 268435456 bytes, not 4096",
    ),
    (lambda: basic(io_opt=1 << 29), "io_opt must be 0, or a power of two from 512 to 268435456"),
    (
        lambda: basic(max_io_size=PAGE - 512),
        "max_io_size must be a multiple of the logical block size (512 bytes) from "
        f"{PAGE} to {SECTORS_MAX} bytes, not {PAGE - 512}",
    ),
    (lambda: basic(max_io_size=PAGE + 1), f"bytes, not {PAGE + 1}"),
    (lambda: basic(max_io_size=1 << 41), "bytes, not 2199023255552"),
    (
        lambda: basic(chunk_size=100),
        "chunk_size must be a multiple of the logical block size (512 bytes) from 0 to",
    ),
    (
        lambda: basic(virt_boundary_mask=4096),
        "virt_boundary_mask must be 0 or one less than a power of two, not 0x1000",
    ),
    (
        lambda: basic(virt_boundary_mask=-1),
        "virt_boundary_mask must be a whole number from 0 to 18446744073709551615, not -1",
    ),
    (lambda: basic(fua=True), "fua needs volatile_cache: the kernel would ignore it"),
    (
        lambda: Discard(granularity=0),
        "discard.granularity must be a multiple of a sector (512 bytes) from 512 to 4294966784 "
        "bytes, not 0",
    ),
    (lambda: Discard(granularity=1000), "discard.granularity must be a multiple of a sector"),
    (lambda: Discard(granularity=512, alignment=7), "discard.alignment must be a multiple of a"),
    (
        lambda: Discard(granularity=512, max_discard_size=1),
        "discard.max_discard_size must be a multiple of a sector (512 bytes) from 0 to "
        f"{SECTORS_MAX} bytes, not 1",
    ),
    (
        lambda: Discard(granularity=512, max_write_zeroes_size=1 << 42),
        "discard.max_write_zeroes_size must be a multiple of a sector (512 bytes) from 0 to",
    ),
    (
        lambda: with_blocks(4096, discard=Discard(granularity=512)),
        "discard.granularity must be a multiple of the logical block size (4096 bytes) from 4096",
    ),
    (
        lambda: with_blocks(4096, discard=Discard(granularity=4096, max_discard_size=512)),
        "discard.max_discard_size must be a multiple of the logical block size (4096 bytes)",
    ),
    (
        lambda: Zoned(max_append_size=0),
        "zoned.max_append_size must be a multiple of a sector (512 bytes) from 512 to "
        f"{SECTORS_MAX} bytes, not 0",
    ),
    (
        lambda: Zoned(max_append_size=512, max_open_zones=-1),
        "zoned.max_open_zones must be a whole number from 0 to 4294967295, not -1",
    ),
    (
        lambda: Zoned(max_append_size=512, max_open_zones=3, max_active_zones=2),
        "zoned.max_open_zones must be at most max_active_zones (2), not 3",
    ),
    (
        lambda: zoned({"chunk_size": 0}),
        f"chunk_size of a zoned disk must be a power of two from 512 to {SECTORS_MAX} bytes, not 0",
    ),
    (lambda: zoned({"chunk_size": 1536}), "chunk_size of a zoned disk must be a power of two"),
    (
        lambda: zoned({}, max_open_zones=5),
        "zoned.max_open_zones must be a whole number from 0 to 4, not 5",
    ),
    (
        lambda: zoned({}, max_active_zones=5),
        "zoned.max_active_zones must be a whole number from 0 to 4, not 5",
    ),
    (
        lambda: DmaAlign(alignment=511),
        f"dma_align.alignment must be a power of two from 1 to {PAGE} bytes, not 511",
    ),
    (lambda: DmaAlign(alignment=2 * PAGE), f"from 1 to {PAGE} bytes, not {2 * PAGE}"),
    (lambda: DmaAlign(alignment=0), f"from 1 to {PAGE} bytes, not 0"),
    (
        lambda: Segment(boundary=2048),
        "segment.boundary must be a power of two from 4096 to 9223372036854775808 bytes, not 2048",
    ),
    (lambda: Segment(boundary=0), "bytes, not 0"),
    (
        lambda: Segment(boundary=4096, max_segment_size=512),
        "segment.max_segment_size must be a whole number from 4096 to 4294967295, not 512",
    ),
    (
        lambda: Segment(boundary=4096, max_segments=0),
        "segment.max_segments must be a whole number from 1 to 65535, not 0",
    ),
    (
        lambda: Integrity(metadata_size=0),
        "integrity.metadata_size must be a whole number from 1 to 255, not 0",
    ),
    (
        lambda: Integrity(metadata_size=8, interval=256),
        f"integrity.interval must be a power of two from 512 to {PAGE} bytes, not 256",
    ),
    (
        lambda: with_blocks(512, integrity=Integrity(metadata_size=8, interval=1024)),
        "integrity.interval must be a power of two from 512 to 512 bytes, not 1024",
    ),
    (
        lambda: Integrity(metadata_size=8, checksum=3),  # type: ignore[arg-type]
        "integrity.checksum must be one of NONE, IP, T10DIF, NVME, not 3",
    ),
    (
        lambda: Integrity(metadata_size=8, checksum=Checksum.NVME),
        "integrity.metadata_size must be at least 16 for the checksum NVME, not 8",
    ),
    (
        lambda: Integrity(metadata_size=16, checksum=Checksum.T10DIF, pi_offset=9),
        "integrity.pi_offset must be a whole number from 0 to 8, not 9",
    ),
    (
        lambda: Integrity(metadata_size=8, tag_size=256),
        "integrity.tag_size must be a whole number from 0 to 255, not 256",
    ),
    (
        lambda: Integrity(metadata_size=8, max_segments=65536),
        "integrity.max_segments must be a whole number from 0 to 65535, not 65536",
    ),
    (
        lambda: Integrity(metadata_size=8, ref_tag=True),
        "integrity.ref_tag needs a checksum, not NONE",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_a_wrong_parameter_is_named_with_what_is_allowed(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_block_size_hints_follow_from_each_other() -> None:
    assert basic(logical_block_size=4096).physical_block_size == 4096
    assert basic(physical_block_size=4096).io_min == 4096
    assert basic().io_opt == 0


def test_limits_themselves_are_allowed() -> None:
    basic(size=(1 << 63) - 512, max_io_size=SECTORS_MAX, io_opt=1 << 28, io_min=1 << 28)
    basic(logical_block_size=PAGE, max_io_size=PAGE)
    DmaAlign(alignment=PAGE)
    Segment(boundary=1 << 63)
    Integrity(metadata_size=255, checksum=Checksum.NVME, pi_offset=239, ref_tag=True)
    zoned({}, max_open_zones=4, max_active_zones=4)


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        basic().size = 1  # type: ignore[misc]


def test_the_packed_struct_is_what_the_kernel_reads() -> None:
    params = Params(
        basic=Basic(
            size=8 << 30,
            logical_block_size=512,
            physical_block_size=4096,
            io_min=8192,
            io_opt=65536,
            max_io_size=1 << 20,
            chunk_size=1 << 26,
            read_only=True,
            rotational=True,
            volatile_cache=True,
            fua=True,
            virt_boundary_mask=4095,
        ),
        discard=Discard(
            granularity=4096, alignment=512, max_discard_size=1 << 30, max_write_zeroes_size=1 << 20
        ),
        zoned=Zoned(max_append_size=65536, max_open_zones=3, max_active_zones=4),
        dma_align=DmaAlign(alignment=512),
        segment=Segment(boundary=8192, max_segment_size=4096, max_segments=32),
        integrity=Integrity(
            metadata_size=64,
            pi_offset=48,
            checksum=Checksum.NVME,
            ref_tag=True,
            capable=True,
            tag_size=2,
            max_segments=7,
        ),
        devt=Devt(char_major=240, char_minor=1, disk_major=259, disk_minor=2),
    )
    expected = struct.pack("=II", 152, 0b1111011)
    expected += struct.pack("=IBBBBIIQQ", 15, 9, 12, 16, 13, 2048, 131072, 16 << 20, 4095)
    expected += struct.pack("=IIIIHH", 512, 4096, 2 << 20, 2048, 1, 0)
    expected += bytes(16)  # device numbers are the kernel's
    expected += struct.pack("=III20x", 3, 4, 128)
    expected += struct.pack("=I4x4x", 511)
    expected += struct.pack("=QIH2x", 8191, 4096, 32)
    expected += struct.pack("=IHBBBBB5x", 3, 7, 9, 64, 48, 4, 2)
    assert params.pack() == expected


def test_without_discards_no_discard_segment_is_announced() -> None:
    raw = Params(basic=basic(), discard=Discard(granularity=512, max_write_zeroes_size=512)).pack()
    assert ublk_params.from_buffer_copy(raw).discard.max_discard_segments == 0


#: No clock, and the same examples every time.
repeatably = settings(derandomize=True, database=None, deadline=None)


def powers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low.bit_length() - 1, high.bit_length() - 1).map(lambda bit: 1 << bit)


def multiples(unit: int, low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(-(-low // unit), high // unit).map(lambda count: count * unit)


@st.composite
def basics(draw: st.DrawFn, *, chunk: st.SearchStrategy[int] | None = None) -> Basic:
    block = draw(powers(512, PAGE))
    physical = draw(powers(block, 1 << 28))
    least = draw(powers(physical, 1 << 28))
    cache = draw(st.booleans())
    return Basic(
        size=draw(multiples(block, block, (1 << 63) - 512)),
        logical_block_size=block,
        physical_block_size=physical,
        io_min=least,
        io_opt=draw(st.just(0) | powers(least, 1 << 28)),
        max_io_size=draw(multiples(block, PAGE, SECTORS_MAX)),
        chunk_size=draw(multiples(block, 0, SECTORS_MAX) if chunk is None else chunk),
        read_only=draw(st.booleans()),
        rotational=draw(st.booleans()),
        volatile_cache=cache,
        fua=cache and draw(st.booleans()),
        virt_boundary_mask=draw(st.just(0) | powers(1, 1 << 64).map(lambda power: power - 1)),
    )


@st.composite
def integrities(draw: st.DrawFn, block_size: int) -> Integrity:
    checksum = draw(st.sampled_from(Checksum))
    room = {Checksum.NONE: 0, Checksum.NVME: 16}.get(checksum, 8)
    metadata = draw(st.integers(max(room, 1), 255))
    return Integrity(
        metadata_size=metadata,
        interval=draw(powers(512, block_size)),
        pi_offset=draw(st.integers(0, metadata - room)),
        checksum=checksum,
        ref_tag=checksum != Checksum.NONE and draw(st.booleans()),
        capable=draw(st.booleans()),
        tag_size=draw(st.integers(0, 255)),
        max_segments=draw(st.integers(0, 65535)),
    )


@st.composite
def all_params(draw: st.DrawFn) -> Params:
    has_zones = draw(st.booleans())
    first = draw(basics(chunk=powers(PAGE, 1 << 40) if has_zones else None))
    block = first.logical_block_size
    limits = multiples(block, 0, SECTORS_MAX)
    zones = min(first.size // first.chunk_size, (1 << 32) - 1) if has_zones else 0
    active = draw(st.integers(0, zones))
    discards = st.builds(
        Discard,
        granularity=multiples(block, block, (1 << 32) - 1),
        alignment=multiples(block, 0, (1 << 32) - 1),
        max_discard_size=limits,
        max_write_zeroes_size=limits,
    )
    segments = st.builds(
        Segment,
        boundary=powers(4096, 1 << 63),
        max_segment_size=st.integers(4096, (1 << 32) - 1),
        max_segments=st.integers(1, 65535),
    )
    return Params(
        basic=first,
        discard=draw(st.none() | discards),
        zoned=Zoned(
            max_append_size=draw(multiples(512, 512, SECTORS_MAX)),
            max_open_zones=draw(st.integers(0, active)),
            max_active_zones=active,
        )
        if has_zones
        else None,
        dma_align=draw(st.none() | st.builds(DmaAlign, alignment=powers(1, PAGE))),
        segment=draw(st.none() | segments),
        integrity=draw(st.none() | integrities(block)),
    )


@repeatably
@given(all_params())
def test_packing_and_unpacking_gives_the_same(params: Params) -> None:
    raw = params.pack()
    assert len(raw) == 152
    assert Params.unpack(raw) == params
    assert params.difference(Params.unpack(raw)) == []
    assert Params.unpack(raw).types == params.types


@repeatably
@given(st.binary(min_size=8, max_size=200))
def test_anything_that_a_kernel_stored_can_be_read(raw: bytes) -> None:
    data = bytearray(raw.ljust(40, b"\0"))
    data[4] |= ParamType.BASIC
    params = Params.unpack(data)
    assert ParamType.BASIC in params.types
    assert params.difference(params) == []


def test_an_older_kernels_shorter_struct_lacks_what_does_not_fit() -> None:
    wish = Params(
        basic=basic(), discard=Discard(granularity=512), dma_align=DmaAlign(alignment=512)
    )
    assert Params.unpack(wish.pack()[:64]) == dataclasses.replace(wish, dma_align=None)
    assert Params.unpack(wish.pack()[:112]) == dataclasses.replace(wish, dma_align=None)
    assert Params.unpack(wish.pack()[:136]) == wish


def test_types_of_newer_kernels_are_left_out() -> None:
    raw = ublk_params.from_buffer_copy(Params(basic=basic()).pack())
    raw.types |= 1 << 30
    assert Params.unpack(bytes(raw) + bytes(64)) == Params(basic=basic())


def test_device_numbers_are_read_and_never_sent() -> None:
    raw = ublk_params.from_buffer_copy(Params(basic=basic()).pack())
    raw.types |= ParamType.DEVT
    raw.devt.char_major, raw.devt.disk_minor = 240, 5
    params = Params.unpack(bytes(raw))
    assert params.devt == Devt(char_major=240, char_minor=0, disk_major=0, disk_minor=5)
    assert params.types == ParamType.BASIC | ParamType.DEVT
    assert params.pack() == Params(basic=basic()).pack()


def test_another_servers_odd_parameters_are_shown_not_judged() -> None:
    raw = ublk_params.from_buffer_copy(Params(basic=basic()).pack())
    raw.basic.dev_sectors = 0
    raw.basic.io_min_shift = 0
    raw.types |= ParamType.INTEGRITY
    raw.integrity.csum_type = 200
    params = Params.unpack(bytes(raw))
    assert params.basic.size == 0
    assert params.basic.io_min == 0
    assert params.integrity is not None
    assert params.integrity.checksum == 200


def test_a_device_without_parameters_says_so() -> None:
    only_numbers = ublk_params(len=0, types=ParamType.DEVT)
    with pytest.raises(ValueError, match=r"^the device has no parameters: none were ever set$"):
        Params.unpack(bytes(only_numbers))


def test_what_the_kernel_changed_is_named() -> None:
    wish = Params(
        basic=basic(max_io_size=1 << 20, volatile_cache=True),
        discard=Discard(granularity=512),
        segment=Segment(boundary=4096),
    )
    got = Params(
        basic=basic(max_io_size=1 << 19),
        segment=Segment(boundary=4096),
        devt=Devt(char_major=1, char_minor=2, disk_major=3, disk_minor=4),
    )
    assert wish.difference(got) == [
        "basic.max_io_size 524288 instead of 1048576",
        "basic.volatile_cache False instead of True",
        "no discard",
    ]
    assert got.difference(dataclasses.replace(got, devt=None)) == []


@pytest.mark.parametrize(
    ("params", "flags", "message"),
    [
        (
            Params(basic=basic(max_io_size=1 << 20)),
            Feature(0),
            "max_io_size must be at most 524288 bytes, which is what the device was granted, "
            "not 1048576",
        ),
        (
            zoned({}),
            Feature.USER_COPY,
            "zoned parameters and Feature.ZONED go together: give both or neither",
        ),
        (
            Params(basic=basic()),
            Feature.USER_COPY | Feature.ZONED,
            "zoned parameters and Feature.ZONED go together: give both or neither",
        ),
        (
            Params(basic=basic(), integrity=Integrity(metadata_size=8)),
            Feature.USER_COPY,
            "integrity parameters need a device with Feature.INTEGRITY",
        ),
    ],
)
def test_parameters_must_fit_the_device_as_granted(
    params: Params, flags: Feature, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        params.check_granted(max_io_size=524288, flags=flags)


def test_parameters_that_fit_the_device() -> None:
    Params(basic=basic()).check_granted(max_io_size=524288, flags=Feature(0x26042))
    zoned({}).check_granted(max_io_size=524288, flags=Feature.ZONED | Feature.USER_COPY)
