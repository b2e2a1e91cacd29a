# SPDX-License-Identifier: MIT
"""The kernel's numbers and layouts: against literal values, and against this machine's header."""

import ctypes
import re
import shutil
import subprocess
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from pyublk import uapi
from pyublk.uapi import ControlCommand, Feature, IOCommand, IOFlag, Op

HEADER = Path("/usr/include/linux/ublk_cmd.h")

CONTROL = {
    "GET_QUEUE_AFFINITY": 0x80207501,
    "GET_DEV_INFO": 0x80207502,
    "ADD_DEV": 0xC0207504,
    "DEL_DEV": 0xC0207505,
    "START_DEV": 0xC0207506,
    "STOP_DEV": 0xC0207507,
    "SET_PARAMS": 0xC0207508,
    "GET_PARAMS": 0x80207509,
    "START_USER_RECOVERY": 0xC0207510,
    "END_USER_RECOVERY": 0xC0207511,
    "GET_DEV_INFO2": 0x80207512,
    "GET_FEATURES": 0x80207513,
    "DEL_DEV_ASYNC": 0x80207514,
    "UPDATE_SIZE": 0xC0207515,
    "QUIESCE_DEV": 0xC0207516,
    "TRY_STOP_DEV": 0xC0207517,
    "REG_BUF": 0xC0207518,
    "UNREG_BUF": 0xC0207519,
}

IO = {
    "FETCH_REQ": 0xC0107520,
    "COMMIT_AND_FETCH_REQ": 0xC0107521,
    "NEED_GET_DATA": 0xC0107522,
    "REGISTER_IO_BUF": 0xC0107523,
    "UNREGISTER_IO_BUF": 0xC0107524,
    "PREP_IO_CMDS": 0xC0107525,
    "COMMIT_IO_CMDS": 0xC0107526,
    "FETCH_IO_CMDS": 0xC0107527,
}

#: Each struct's fields at their offsets, and last its size.
LAYOUTS = {
    "ublksrv_ctrl_cmd": "dev_id 0 queue_id 4 len 6 addr 8 data 16 dev_path_len 24 pad 26 "
    "reserved 28 size 32",
    "ublksrv_ctrl_dev_info": "nr_hw_queues 0 queue_depth 2 state 4 io_desc_size 6 "
    "max_io_buf_bytes 8 dev_id 12 ublksrv_pid 16 pad1 20 flags 24 ublksrv_flags 32 owner_uid 40 "
    "owner_gid 44 reserved 48 size 64",
    "ublksrv_io_desc": "op_flags 0 nr_sectors 4 start_sector 8 addr 16 size 24",
    "ublksrv_io_cmd": "q_id 0 tag 2 result 4 addr 8 size 16",
    "ublk_batch_io": "q_id 0 flags 2 nr_elem 4 elem_bytes 6 reserved 7 reserved2 8 size 16",
    "ublk_elem_header": "tag 0 buf_index 2 result 4 size 8",
    "ublk_shmem_buf_reg": "addr 0 len 8 flags 16 reserved 20 size 24",
    "ublk_param_basic": "attrs 0 logical_bs_shift 4 physical_bs_shift 5 io_opt_shift 6 "
    "io_min_shift 7 max_sectors 8 chunk_sectors 12 dev_sectors 16 virt_boundary_mask 24 size 32",
    "ublk_param_discard": "discard_alignment 0 discard_granularity 4 max_discard_sectors 8 "
    "max_write_zeroes_sectors 12 max_discard_segments 16 reserved0 18 size 20",
    "ublk_param_devt": "char_major 0 char_minor 4 disk_major 8 disk_minor 12 size 16",
    "ublk_param_zoned": "max_open_zones 0 max_active_zones 4 max_zone_append_sectors 8 "
    "reserved 12 size 32",
    "ublk_param_dma_align": "alignment 0 pad 4 size 8",
    "ublk_param_segment": "seg_boundary_mask 0 max_segment_size 8 max_segments 12 pad 14 size 16",
    "ublk_param_integrity": "flags 0 max_integrity_segments 4 interval_exp 6 metadata_size 7 "
    "pi_offset 8 csum_type 9 tag_size 10 pad 11 size 16",
    "ublk_params": "len 0 types 4 basic 8 discard 40 devt 60 zoned 76 dma 108 seg 120 "
    "integrity 136 size 152",
    "blk_zone": "start 0 len 8 wp 16 type 24 cond 25 non_seq 26 reset 27 resv 28 capacity 32 "
    "reserved 40 size 64",
}


def layout(struct: type[ctypes.Structure]) -> dict[str, int]:
    offsets = {field[0]: getattr(struct, field[0]).offset for field in struct._fields_}
    return offsets | {"size": ctypes.sizeof(struct)}


def test_control_commands_have_the_kernels_numbers() -> None:
    assert {command.name: command.value for command in ControlCommand} == CONTROL


def test_io_commands_have_the_kernels_numbers() -> None:
    assert {command.name: command.value for command in IOCommand} == IO


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    words = LAYOUTS[name].split()
    expected = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert layout(getattr(uapi, name)) == expected


def test_every_struct_has_its_layout_tested() -> None:
    structs = {
        name
        for name, value in vars(uapi).items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == uapi.__name__
        and not name.startswith("_")
    }
    assert structs == set(LAYOUTS)


def test_structs_start_zeroed_and_compare_by_their_bytes() -> None:
    assert bytes(uapi.ublksrv_ctrl_dev_info()) == bytes(64)
    assert uapi.ublk_elem_header(tag=3) == uapi.ublk_elem_header(tag=3)
    assert uapi.ublk_elem_header(tag=3) != uapi.ublk_elem_header(tag=4)
    assert uapi.ublksrv_io_cmd() != uapi.ublk_batch_io()
    with pytest.raises(TypeError):
        hash(uapi.ublk_elem_header())


def test_features_are_the_bits_in_order() -> None:
    assert [feature.value for feature in Feature] == [1 << bit for bit in range(21)]
    assert Feature.SUPPORT_ZERO_COPY.value == 0x1
    assert Feature.AUTO_BUF_REG.value == 0x800
    assert Feature.IO_DESC_SIZE.value == 0x100000


def test_features_of_known_kernels() -> None:
    linux_6_12 = Feature(0x1FE)
    assert Feature.ZONED in linux_6_12
    assert Feature.SUPPORT_ZERO_COPY not in linux_6_12
    linux_6_18 = Feature(0x7FFF)
    assert Feature.BUF_REG_OFF_DAEMON in linux_6_18
    assert Feature.BATCH_IO not in linux_6_18


def test_operations_and_their_flags() -> None:
    assert {op.name: op.value for op in Op} == {
        "READ": 0,
        "WRITE": 1,
        "FLUSH": 2,
        "DISCARD": 3,
        "WRITE_SAME": 4,
        "WRITE_ZEROES": 5,
        "ZONE_OPEN": 10,
        "ZONE_CLOSE": 11,
        "ZONE_FINISH": 12,
        "ZONE_APPEND": 13,
        "ZONE_RESET_ALL": 14,
        "ZONE_RESET": 15,
        "REPORT_ZONES": 18,
    }
    bits = {flag.name: flag.bit_length() - 1 for flag in IOFlag}
    assert bits == {
        "FAILFAST_DEV": 8,
        "FAILFAST_TRANSPORT": 9,
        "FAILFAST_DRIVER": 10,
        "META": 11,
        "FUA": 13,
        "NOUNMAP": 15,
        "SWAP": 16,
        "NEED_REG_BUF": 17,
        "INTEGRITY": 18,
        "SHMEM_ZC": 19,
    }


#: The enumerations whose members are only compared with a header where one is new enough: those
#: that the kernel gives no names (integrity, checksums) have no other test.
LITERALS: dict[type[IntEnum | IntFlag], dict[str, int]] = {
    uapi.DeviceStatus: {"DEAD": 0, "LIVE": 1, "QUIESCED": 2, "FAIL_IO": 3},
    uapi.ParamType: {
        "BASIC": 0x01,
        "DISCARD": 0x02,
        "DEVT": 0x04,
        "ZONED": 0x08,
        "DMA_ALIGN": 0x10,
        "SEGMENT": 0x20,
        "INTEGRITY": 0x40,
    },
    uapi.Attr: {"READ_ONLY": 1, "ROTATIONAL": 2, "VOLATILE_CACHE": 4, "FUA": 8},
    uapi.BatchFlag: {"HAS_ZONE_LBA": 1, "HAS_BUF_ADDR": 2, "AUTO_BUF_REG_FALLBACK": 4},
    uapi.IntegrityFlag: {"INTEGRITY_CAPABLE": 1, "REF_TAG": 2},
    uapi.Checksum: {"NONE": 0, "IP": 1, "T10DIF": 2, "NVME": 4},
}


@pytest.mark.parametrize("kind", LITERALS, ids=lambda kind: kind.__name__)
def test_members_have_the_kernels_values(kind: type[IntEnum | IntFlag]) -> None:
    assert {member.name: member.value for member in kind} == LITERALS[kind]


def test_every_enumeration_has_its_values_tested() -> None:
    enumerations = {
        value
        for value in vars(uapi).values()
        if isinstance(value, type)
        and issubclass(value, IntEnum | IntFlag)
        and value.__module__ == uapi.__name__
    }
    assert enumerations == {ControlCommand, IOCommand, Feature, Op, IOFlag, *LITERALS}


@pytest.mark.parametrize(("page_size", "stride"), [(4096, 98304), (16384, 98304), (65536, 131072)])
def test_the_descriptor_maps_stride_is_that_of_the_largest_depth(
    page_size: int, stride: int
) -> None:
    assert uapi.descriptor_map_offset(0, page_size) == 0
    assert uapi.descriptor_map_offset(1, page_size) == stride
    assert uapi.descriptor_map_offset(7, page_size) == 7 * stride
    assert uapi.descriptor_map_length(uapi.MAX_QUEUE_DEPTH, page_size) == stride


@pytest.mark.parametrize(
    ("depth", "page_size", "length"),
    [
        (1, 4096, 4096),
        (128, 4096, 4096),
        (170, 4096, 4096),
        (171, 4096, 8192),
        (4096, 4096, 98304),
        (1, 16384, 16384),
        (1, 65536, 65536),
        (4096, 65536, 131072),
    ],
)
def test_descriptor_map_length(depth: int, page_size: int, length: int) -> None:
    assert uapi.descriptor_map_length(depth, page_size) == length


def test_larger_descriptors_stretch_length_and_stride() -> None:
    assert uapi.descriptor_map_offset(1, 4096, descriptor_size=64) == 262144
    assert uapi.descriptor_map_length(128, 4096, descriptor_size=64) == 8192


@pytest.mark.parametrize(
    ("queue", "tag", "offset"),
    [(0, 1, 0x82000000), (1, 0, 0x20080000000), (3, 7, 0x6008E000000)],
)
def test_user_copy_offset(queue: int, tag: int, offset: int) -> None:
    assert uapi.user_copy_offset(queue, tag) == offset
    assert uapi.user_copy_offset(queue, tag, 4096) == offset + 4096
    assert uapi.user_copy_offset(queue, tag, integrity=True) == offset | 1 << 62


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4096, 0, 0), "queue must be 0 to 4095, not 4096"),
        ((0, 65536, 0), "tag must be 0 to 65535, not 65536"),
        ((0, 0, 1 << 25), "offset must be 0 to 33554431, not 33554432"),
        ((-1, 0, 0), "queue must be 0 to 4095, not -1"),
    ],
)
def test_user_copy_never_reaches_another_request(
    arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        uapi.user_copy_offset(*arguments)


def test_auto_buf_reg_word() -> None:
    assert uapi.auto_buf_reg_word(5) == 5
    assert uapi.auto_buf_reg_word(5, fallback=True) == 0x10005
    assert uapi.auto_buf_reg_word(65535) == 0xFFFF
    for index in (-1, 65536):
        with pytest.raises(ValueError, match=f"^buffer index must be 0 to 65535, not {index}$"):
            uapi.auto_buf_reg_word(index)


def test_shmem_buffer() -> None:
    assert uapi.shmem_buffer(0x3000) == (0, 0x3000)
    assert uapi.shmem_buffer(7 << 32 | 0xFFFFF000) == (7, 0xFFFFF000)


#: Python's enumerations and the prefixes that the kernel gives their members.
PREFIXES: dict[type[IntEnum | IntFlag], str] = {
    ControlCommand: "UBLK_U_CMD_",
    IOCommand: "UBLK_U_IO_",
    Feature: "UBLK_F_",
    Op: "UBLK_IO_OP_",
    IOFlag: "UBLK_IO_F_",
    uapi.DeviceStatus: "UBLK_S_DEV_",
    uapi.ParamType: "UBLK_PARAM_TYPE_",
    uapi.Attr: "UBLK_ATTR_",
    uapi.BatchFlag: "UBLK_BATCH_F_",
}

CONSTANTS = {
    "UBLK_MAX_QUEUE_DEPTH": uapi.MAX_QUEUE_DEPTH,
    "UBLK_MAX_NR_QUEUES": uapi.MAX_QUEUES,
    "UBLK_FEATURES_LEN": uapi.FEATURES_LENGTH,
    "UBLK_IO_RES_OK": uapi.IO_RES_OK,
    "UBLK_IO_RES_NEED_GET_DATA": uapi.IO_RES_NEED_GET_DATA,
    "UBLK_IO_RES_ABORT": uapi.IO_RES_ABORT,
    "UBLKSRV_IO_BUF_OFFSET": uapi.IO_BUF_OFFSET,
    "UBLK_IO_BUF_BITS": uapi.IO_BUF_BITS,
    "UBLK_TAG_BITS": uapi.TAG_BITS,
    "UBLK_TAG_OFF": uapi.TAG_OFFSET,
    "UBLK_QID_BITS": uapi.QID_BITS,
    "UBLK_QID_OFF": uapi.QID_OFFSET,
    "UBLKSRV_IO_INTEGRITY_FLAG": uapi.INTEGRITY_BUF_BIT,
    "UBLK_AUTO_BUF_REG_FALLBACK": uapi.AUTO_BUF_REG_FALLBACK,
    "UBLK_SHMEM_BUF_READ_ONLY": uapi.SHMEM_BUF_READ_ONLY,
    "UBLK_SHMEM_ZC_IDX_OFF": uapi.SHMEM_INDEX_OFFSET,
    "UBLK_MIN_SEGMENT_SIZE": uapi.MIN_SEGMENT_SIZE,
}


def header_expressions(header: Path) -> dict[str, int]:
    """C expressions over what `header` defines, each with the value that Python has for it."""
    text = header.read_text()
    ours = CONSTANTS | {
        f"{prefix}{member.name}": member.value
        for kind, prefix in PREFIXES.items()
        for member in kind
    }
    expressions = {
        name: value for name, value in ours.items() if re.search(rf"#define\s+{name}\b", text)
    }
    for name in LAYOUTS:
        body = re.search(rf"^struct {name} \{{(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
        if body is None:
            continue
        whole = layout(getattr(uapi, name))
        size = whole.pop("size")
        there = {field for field in whole if re.search(rf"\b{field}\b[\[\d\]]*;", body[1])}
        for field in there:
            expressions[f"offsetof(struct {name}, {field})"] = whole[field]
        padding = {"reserved", "pad", "io_desc_size"}
        if set(whole) - there <= padding:
            expressions[f"sizeof(struct {name})"] = size
    return expressions


def test_this_machines_header_agrees(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    if not HEADER.exists():
        pytest.skip(f"no {HEADER} (linux-libc-dev)")
    expected = header_expressions(HEADER)
    assert "sizeof(struct ublksrv_io_desc)" in expected
    assert "UBLK_F_USER_RECOVERY" in expected
    lines = [f'printf("%lld\\n", (long long)({expression}));' for expression in expected]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <errno.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
        f'#include "{HEADER}"\nint main(void) {{\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "numbers"
    subprocess.run([compiler, "-o", program, source], check=True, timeout=60)
    output = subprocess.run([program], check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    found = dict(zip(expected, map(int, output.stdout.split()), strict=True))
    assert found == expected


def test_the_cores_numbers_are_these() -> None:
    """The C core has its own names for those that it uses."""
    header = (Path(uapi.__file__).parent / "_core" / "ublk.h").read_text()
    kinds = {"CMD": uapi.ControlCommand, "IO": uapi.IOCommand, "F": uapi.Feature}
    names = {"F_ZERO_COPY": "SUPPORT_ZERO_COPY"}
    found = re.findall(
        r"#define PU_((CMD|IO|F)_(\w+)) (?:\(UINT64_C\(1\) << (\d+)\)|(0x\w+)u)", header
    )
    assert {kind for _, kind, *_ in found} == set(kinds)
    for whole, kind, name, bit, number in found:
        value = 1 << int(bit) if bit else int(number, 16)
        assert kinds[kind][names.get(whole, name)] == value, whole
