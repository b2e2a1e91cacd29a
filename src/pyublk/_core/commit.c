/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "commit.h"

#include "loopback.h"

int pu_commit_command(struct pu_queue *q, uint32_t cmd_op, uint16_t tag, int32_t value)
{
	struct pu_sqe *sqe = pu_ring_take_sqe(&q->ring);

	if (!sqe && pu_ring_submit(&q->ring, 0, 0, 0) >= 0)
		sqe = pu_ring_take_sqe(&q->ring);
	if (!sqe)
		return -EAGAIN;
	*sqe = (struct pu_sqe){
		.opcode = PU_OPCODE_URING_CMD,
		.flags = PU_SQE_FIXED_FILE,
		.off = cmd_op,
		.addr = q->auto_buffer ? pu_queue_buffer_index(q, tag) | PU_AUTO_BUF_FALLBACK : 0,
		.user_data = tag,
		.cmd = { q->id | (uint64_t)tag << 16 | (uint64_t)(uint32_t)value << 32,
			 q->copies ? (uint64_t)(uintptr_t)pu_queue_next_buffer(q, tag) :
				     q->tags[tag].zone_lba },
	};
	return 0;
}

int pu_commit_alone(struct pu_queue *q, uint16_t tag, int32_t value)
{
	q->in_kernel++;
	if (q->loopback)
		return pu_loopback_commit(q, tag, value);
	return pu_commit_command(q, PU_IO_COMMIT_AND_FETCH_REQ, tag, value);
}
