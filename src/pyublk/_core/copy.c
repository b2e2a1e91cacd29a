/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "copy.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

void *pu_queue_shared(const struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];

	if (!q->client_memory)
		return NULL;
	return pu_shared_find(q->client_memory, desc->addr,
			      (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
}

static int copy_in_memory(const struct pu_queue *q, uint16_t tag, bool out, uint8_t *bytes,
			  uint64_t at, uint64_t length)
{
	bool shared = q->desc[tag].op_flags & PU_FLAG_SHMEM_ZC;
	uint8_t *buffer = shared ? pu_queue_shared(q, tag) : pu_queue_buffer(q, tag);

	if (!buffer)
		return -EIO;
	buffer += at;
	memcpy(out ? buffer : bytes, out ? bytes : buffer, length);
	return 0;
}

static int copy_by_device(const struct pu_queue *q, uint64_t place, bool out, uint8_t *bytes,
			  uint64_t length)
{
	while (length) {
		ssize_t done = out ? pwrite(q->cdev, bytes, length, (off_t)place) :
				     pread(q->cdev, bytes, length, (off_t)place);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		bytes += done;
		place += (uint64_t)done;
		length -= (uint64_t)done;
	}
	return 0;
}

int pu_queue_copy(struct pu_queue *q, uint16_t tag, uint32_t generation, void *memory, uint64_t at,
		  uint64_t length, uint64_t where)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	bool out = op == PU_OP_READ || op == PU_OP_REPORT_ZONES;
	int error;

	/* Else the bytes might be those of the tag's next request. */
	if (!pu_tag_pin(&q->tags[tag], generation))
		return -ESTALE;
	if (q->user_copy && (where || !(desc->op_flags & PU_FLAG_SHMEM_ZC)))
		error = copy_by_device(q, pu_user_copy_offset(q->id, tag, at) | where, out, memory,
				       length);
	else
		error = where ? -EOPNOTSUPP : copy_in_memory(q, tag, out, memory, at, length);
	pu_tag_unpin(&q->tags[tag], generation);
	return error;
}

int pu_queue_fill_buffer(struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	int error;

	if (!q->user_copy || q->tags[tag].fetched || (op != PU_OP_WRITE && op != PU_OP_ZONE_APPEND))
		return 0;
	error = pu_queue_copy(q, tag, generation, pu_queue_buffer(q, tag), 0,
			      (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT, 0);
	q->tags[tag].fetched = !error;
	return error;
}
