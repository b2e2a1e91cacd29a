/* SPDX-License-Identifier: MIT
 * The part of the ublk kernel interface that the core itself speaks (include/uapi/linux/ublk_cmd.h).
 * uapi.py has all of it; a test compares the two. Written out here because the build machine's
 * kernel headers are usually older than the kernel that the disk runs on.
 */
#ifndef PU_UBLK_H
#define PU_UBLK_H

#include <stdint.h>

enum {
	PU_OP_READ = 0,
	PU_OP_WRITE = 1,
	PU_OP_FLUSH = 2,
	PU_OP_DISCARD = 3,
	PU_OP_WRITE_ZEROES = 5,
	PU_OP_COUNT = 32, /* size of tables indexed by operation */
};

#define PU_FLAG_FUA (1u << 13)
#define PU_FLAG_NOUNMAP (1u << 15)

#define PU_CMD_GET_DEV_INFO 0x80207502u
#define PU_CMD_DEL_DEV 0xc0207505u
#define PU_IO_FETCH_REQ 0xc0107520u
#define PU_IO_COMMIT_AND_FETCH_REQ 0xc0107521u

#define PU_MAX_DEPTH 4096u
#define PU_SECTOR_SHIFT 9

struct pu_desc { /* ublksrv_io_desc */
	uint32_t op_flags;
	uint32_t nr_sectors;
	uint64_t start_sector;
	uint64_t addr;
};

/* Bytes; a FLUSH, which the kernel gives the start -1, has none. */
static inline uint64_t pu_desc_offset(const struct pu_desc *desc)
{
	return (desc->op_flags & 0xff) == PU_OP_FLUSH ? 0 : desc->start_sector << PU_SECTOR_SHIFT;
}

struct pu_ctrl_cmd { /* ublksrv_ctrl_cmd */
	uint32_t dev_id;
	uint16_t queue_id;
	uint16_t len;
	uint64_t addr;
	uint64_t data;
	uint16_t dev_path_len;
	uint16_t pad;
	uint32_t reserved;
};

struct pu_dev_info { /* ublksrv_ctrl_dev_info */
	uint16_t nr_hw_queues;
	uint16_t queue_depth;
	uint16_t state;
	uint16_t io_desc_size;
	uint32_t max_io_buf_bytes;
	uint32_t dev_id;
	int32_t server_pid;
	uint32_t pad1;
	uint64_t flags;
	uint64_t server_flags;
	uint32_t owner_uid;
	uint32_t owner_gid;
	uint64_t reserved[2];
};

_Static_assert(sizeof(struct pu_desc) == 24, "ublksrv_io_desc");
_Static_assert(sizeof(struct pu_ctrl_cmd) == 32, "ublksrv_ctrl_cmd");
_Static_assert(sizeof(struct pu_dev_info) == 64, "ublksrv_ctrl_dev_info");

#endif
