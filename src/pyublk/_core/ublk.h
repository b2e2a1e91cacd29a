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
	PU_OP_ZONE_OPEN = 10,
	PU_OP_ZONE_CLOSE = 11,
	PU_OP_ZONE_FINISH = 12,
	PU_OP_ZONE_APPEND = 13,
	PU_OP_ZONE_RESET_ALL = 14,
	PU_OP_ZONE_RESET = 15,
	PU_OP_REPORT_ZONES = 18,
	PU_OP_COUNT = 32, /* size of tables indexed by operation */
};

#define PU_FLAG_FUA (1u << 13)
#define PU_FLAG_NOUNMAP (1u << 15)
#define PU_FLAG_NEED_REG_BUF (1u << 17)
#define PU_FLAG_INTEGRITY (1u << 18)
#define PU_FLAG_SHMEM_ZC (1u << 19)

/* Feature flags of a device that decide how its data travels. */
#define PU_F_ZERO_COPY (UINT64_C(1) << 0)
#define PU_F_NEED_GET_DATA (UINT64_C(1) << 2)
#define PU_F_USER_COPY (UINT64_C(1) << 7)
#define PU_F_ZONED (UINT64_C(1) << 8)
#define PU_F_AUTO_BUF_REG (UINT64_C(1) << 11)
#define PU_F_BATCH_IO (UINT64_C(1) << 15)
#define PU_F_SHMEM_ZC (UINT64_C(1) << 19)

#define PU_STATE_LIVE 1

#define PU_CMD_GET_DEV_INFO 0x80207502u
#define PU_CMD_ADD_DEV 0xc0207504u
#define PU_CMD_DEL_DEV 0xc0207505u
#define PU_CMD_STOP_DEV 0xc0207507u
#define PU_CMD_DEL_DEV_ASYNC 0x80207514u
#define PU_IO_FETCH_REQ 0xc0107520u
#define PU_IO_COMMIT_AND_FETCH_REQ 0xc0107521u
#define PU_IO_NEED_GET_DATA 0xc0107522u
#define PU_IO_REGISTER_IO_BUF 0xc0107523u
#define PU_IO_UNREGISTER_IO_BUF 0xc0107524u
#define PU_IO_PREP_IO_CMDS 0xc0107525u
#define PU_IO_COMMIT_IO_CMDS 0xc0107526u
#define PU_IO_FETCH_IO_CMDS 0xc0107527u

#define PU_RES_NEED_GET_DATA 1
#define PU_AUTO_BUF_FALLBACK (UINT64_C(1) << 16)

/* Where pread and pwrite on the char device find a request's data (user copy). */
#define PU_USER_COPY_START UINT64_C(0x80000000)
#define PU_USER_COPY_INTEGRITY (UINT64_C(1) << 62)

enum { /* ublk_batch_io.flags */
	PU_BATCH_ZONE_LBA = 1u << 0,
	PU_BATCH_BUF_ADDR = 1u << 1,
	PU_BATCH_BUF_FALLBACK = 1u << 2,
};
#define PU_BATCH_MAX_TAGS 128u /* in one completion of FETCH_IO_CMDS */
#define PU_ZONE_BYTES 64u      /* struct blk_zone */

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

static inline uint64_t pu_user_copy_offset(uint16_t queue, uint16_t tag, uint64_t byte)
{
	return PU_USER_COPY_START + ((uint64_t)queue << 41) + ((uint64_t)tag << 25) + byte;
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
