/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "registering.h"

#include <errno.h>

int pu_register_buffer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_queue *q = m->q;
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->off = PU_IO_REGISTER_IO_BUF;
	sqe->cmd[0] = q->id | (uint64_t)tag << 16;
	sqe->cmd[1] = q->faults & PU_FAULT_REGISTER ? UINT16_MAX : tag;
	sqe->user_data = PU_USER_DATA(PU_KIND_REGISTER, tag);
	q->foreign_inflight++;
	m->works[tag].open++;
	m->works[tag].by_hand = true;
	return 0;
}

void pu_unregister_buffer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_queue *q = m->q;
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe) /* the ring's end gives it back */
		return;
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->off = PU_IO_UNREGISTER_IO_BUF;
	sqe->cmd[0] = q->id | (uint64_t)tag << 16;
	sqe->cmd[1] = tag;
	sqe->user_data = PU_USER_DATA(PU_KIND_UNREGISTER, tag);
	q->foreign_inflight++;
}

int pu_take_up_files(struct pu_mapped *m)
{
	uint32_t version = pu_layout_version(m->layout);
	struct { /* io_uring_files_update */
		uint32_t offset, resv;
		uint64_t fds;
	} update;

	if (version == m->version)
		return 0;
	for (uint32_t i = 0; i < m->layout->nr_files; i++) {
		int error;

		update.offset = i + 1;
		update.resv = 0;
		update.fds = (uint64_t)(uintptr_t)&m->layout->files[i].fd;
		error = pu_ring_register(&m->q->ring, PU_REGISTER_FILES_UPDATE, &update, 1);
		if (error < 0)
			return error;
	}
	m->version = version;
	return 0;
}
