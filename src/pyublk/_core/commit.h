/* SPDX-License-Identifier: MIT
 * Answers on their way to the kernel: each is a command, or an element of a batch
 *
 * What is committed goes with the next submission. Owner thread only, of a request that is claimed.
 */
#ifndef PU_COMMIT_H
#define PU_COMMIT_H

#include <errno.h>

#include "batch.h"
#include "queue.h"
#include "tapping.h"

/* Never a short result: kernels disagree about what it means. `length` is that of the request. */
static inline int32_t pu_commit_value(uint32_t op, uint64_t length, int64_t result)
{
	if (result < 0)
		return result < -4095 ? -EIO : (int32_t)result;
	if (op <= PU_OP_WRITE || op == PU_OP_ZONE_APPEND)
		return (int32_t)length;
	return op == PU_OP_REPORT_ZONES ? (int32_t)((length >> PU_SECTOR_SHIFT) * PU_ZONE_BYTES) : 0;
}

static inline int32_t pu_commit_value_of(const struct pu_desc *desc, int64_t result)
{
	return pu_commit_value(desc->op_flags & 0xff, (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT,
			       result);
}

/* A command of one tag: PU_IO_FETCH_REQ, PU_IO_COMMIT_AND_FETCH_REQ or PU_IO_NEED_GET_DATA.
 * 0 or -EAGAIN. */
int pu_commit_command(struct pu_queue *q, uint32_t cmd_op, uint16_t tag, int32_t value);
/* Where there is no batch. */
int pu_commit_alone(struct pu_queue *q, uint16_t tag, int32_t value);

PU_ALWAYS_INLINE void pu_commit_in_batch(struct pu_queue *q, uint16_t tag, int32_t value)
{
	struct pu_batch *b = q->batch;
	uint64_t *words;

	if (!b->plain) {
		pu_batch_commit(q, tag, value);
		return;
	}
	words = (uint64_t *)(void *)b->elements[b->filling] + ((size_t)b->filled++ << q->copies);
	words[0] = tag | (uint64_t)tag << 16 | (uint64_t)(uint32_t)value << 32;
	if (q->copies)
		words[1] = (uint64_t)(uintptr_t)pu_queue_next_buffer(q, tag);
}

/* 0 or -EAGAIN. */
PU_ALWAYS_INLINE int pu_commit(struct pu_queue *q, uint16_t tag, int32_t value)
{
	if (value < 0)
		pu_count(&q->counters.errors, 1);
	q->owned--;
	value = pu_taps_answer(q, tag, value);
	if (!q->batch)
		return pu_commit_alone(q, tag, value);
	pu_commit_in_batch(q, tag, value);
	return 0;
}

#endif
