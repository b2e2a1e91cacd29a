/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "operation.h"

#include <errno.h>
#include <linux/falloc.h>

#include "copy.h"
#include "libc.h"

#define BLOCK_DISCARD 0x1200u /* BLOCK_URING_CMD_DISCARD (Linux 6.12) */

static void *data_address(const struct pu_mapped *m, const struct pu_slot *slot, uint64_t data)
{
	if (slot->zeroes)
		return m->zeroes;
	if (slot->place == IN_REGISTERED)
		return (void *)(uintptr_t)data; /* counted from the start of the request's memory */
	return slot->memory + data;
}

/* The pieces of memory of what is left of a part, as many as go into one operation. */
static uint32_t gather(struct pu_mapped *m, struct pu_slot *slot, struct iovec *vector)
{
	uint64_t at = slot->done, contiguous;
	uint32_t count = 0;

	if (slot->zeroes) {
		contiguous = slot->part.length - at;
		if (contiguous > m->zeroes_bytes)
			contiguous = m->zeroes_bytes;
		vector[0] = (struct iovec){ m->zeroes, contiguous };
		slot->asked = contiguous;
		return 1;
	}
	while (at < slot->part.length && count < PU_VECTOR) {
		uint64_t data = pu_part_data(&slot->part, at, &contiguous);

		vector[count++] = (struct iovec){ data_address(m, slot, data), contiguous };
		at += contiguous;
	}
	slot->asked = at - slot->done;
	return count;
}

static int fallocate_mode(const struct pu_work *w, const struct pu_slot *slot)
{
	if (slot->op == PU_OP_DISCARD || !(w->flags & PU_FLAG_NOUNMAP))
		return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
}

static int64_t or_errno(int64_t result)
{
	return result < 0 ? -errno : result;
}

/* Between the request and a file's own memory; by way of the tag's buffer where a read would
 * allocate, or the memory cannot be had. */
static int64_t move_directly(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_file *file = &m->layout->files[slot->part.file];
	const struct pu_file_map *map = &file->map;
	struct pu_queue *q = m->q;
	uint64_t offset = slot->part.offset + slot->done, length;
	uint64_t data = pu_part_data(&slot->part, slot->done, &length);
	bool read = slot->op == PU_OP_READ;
	uint8_t *buffer = slot->memory + data;
	int64_t done;
	int error;

	if (offset + length <= map->length && (!read || pu_file_map_holds(map, offset, length))) {
		error = pu_queue_copy(q, slot->tag, slot->generation, map->bytes + offset, data,
				      length, 0);
		if (!error) {
			if (!read)
				pu_file_map_note(map, offset, length);
			return (int64_t)length;
		}
	}
	if (read) {
		done = or_errno(pread(file->fd, buffer, length, (off_t)offset));
		if (done <= 0)
			return done;
		error = pu_queue_copy(q, slot->tag, slot->generation, buffer, data, (uint64_t)done, 0);
		return error ? error : done;
	}
	error = pu_queue_copy(q, slot->tag, slot->generation, buffer, data, length, 0);
	return error ? error : or_errno(pwrite(file->fd, buffer, length, (off_t)offset));
}

static int64_t make_hole(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_file *file = &m->layout->files[slot->part.file];
	uint64_t offset = slot->part.offset + slot->done, length = slot->part.length;
	int mode = fallocate_mode(&m->works[slot->tag], slot);
	int64_t result = or_errno(fallocate(file->fd, mode, (off_t)offset, (off_t)length));

	pu_file_map_forget(&file->map, offset, length);
	return result;
}

static int64_t do_alone(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_work *w = &m->works[slot->tag];
	struct iovec vector[PU_VECTOR];
	int fd = m->layout->files[slot->part.file].fd;
	off_t offset = (off_t)(slot->part.offset + slot->done);

	if (slot->op == PU_OP_FLUSH)
		return or_errno(fdatasync(fd));
	if (!pu_has_data(slot->op) && !slot->zeroes)
		return make_hole(m, slot);
	if (slot->place == IN_FILES)
		return move_directly(m, slot);

	int count = (int)gather(m, slot, vector);
	int flags = w->flags & PU_FLAG_FUA ? RWF_DSYNC : 0;

	if (slot->op == PU_OP_READ)
		return or_errno(count == 1 ? pread(fd, vector[0].iov_base, vector[0].iov_len, offset) :
					     preadv(fd, vector, count, offset));
	return or_errno(pwritev2(fd, vector, count, offset, flags));
}

/* Calls on a file exclude each other in the kernel. Copies to and from its mapping do not: another
 * queue's write or hole would leave a block that is half of the one and half of the other. */
static int64_t do_now(struct pu_mapped *m, struct pu_slot *slot)
{
	struct pu_lock *lock = &m->layout->lock;
	uint64_t offset = slot->part.offset, length = slot->part.length;
	int64_t result;

	if (!m->straight || slot->op == PU_OP_FLUSH ||
	    !__atomic_load_n(&m->layout->locked, __ATOMIC_ACQUIRE))
		return do_alone(m, slot);
	if (slot->op == PU_OP_READ)
		pu_lock_read(lock, offset, length);
	else
		pu_lock_write(lock, offset, length);
	result = do_alone(m, slot);
	pu_lock_unlock(lock, offset, length);
	return result;
}

static void fill_transfer(struct pu_mapped *m, struct pu_slot *slot, struct pu_sqe *sqe)
{
	const struct pu_work *w = &m->works[slot->tag];
	struct iovec *vector = &m->vectors[(size_t)(slot - m->slots) * PU_VECTOR];
	uint32_t count = gather(m, slot, vector);
	bool read = slot->op == PU_OP_READ;
	bool fixed = slot->place == IN_REGISTERED && !slot->zeroes;

	sqe->off = slot->part.offset + slot->done;
	if (fixed)
		sqe->buf_index = slot->tag;
	if (w->flags & PU_FLAG_FUA && !read)
		sqe->op_flags = RWF_DSYNC;
	if (count == 1) {
		sqe->addr = (uint64_t)(uintptr_t)vector[0].iov_base;
		sqe->len = (uint32_t)vector[0].iov_len;
		sqe->opcode = fixed ? (read ? PU_OPCODE_READ_FIXED : PU_OPCODE_WRITE_FIXED) :
				      (read ? PU_OPCODE_READ : PU_OPCODE_WRITE);
		return;
	}
	sqe->addr = (uint64_t)(uintptr_t)vector;
	sqe->len = count;
	sqe->opcode = fixed ? (read ? PU_OPCODE_READV_FIXED : PU_OPCODE_WRITEV_FIXED) :
			      (read ? PU_OPCODE_READV : PU_OPCODE_WRITEV);
}

static int submit(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_work *w = &m->works[slot->tag];
	const struct pu_file *file = &m->layout->files[slot->part.file];
	struct pu_sqe *sqe = pu_ring_next_sqe(&m->q->ring);

	if (!sqe)
		return -EAGAIN;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->fd = (int32_t)slot->part.file + 1;
	sqe->user_data = PU_USER_DATA(PU_KIND_PART, slot - m->slots);
	if (pu_has_data(slot->op) || slot->zeroes) {
		fill_transfer(m, slot, sqe);
	} else if (slot->op == PU_OP_FLUSH) {
		sqe->opcode = PU_OPCODE_FSYNC;
		sqe->op_flags = PU_FSYNC_DATASYNC;
	} else if (slot->op == PU_OP_DISCARD && file->device && !slot->punch) {
		sqe->opcode = PU_OPCODE_URING_CMD;
		sqe->off = BLOCK_DISCARD;
		sqe->addr = slot->part.offset;
		sqe->cmd[0] = slot->part.length;
	} else {
		sqe->opcode = PU_OPCODE_FALLOCATE;
		sqe->off = slot->part.offset;
		sqe->addr = slot->part.length;
		sqe->len = (uint32_t)fallocate_mode(w, slot);
	}
	if (m->look_every_ns)
		slot->begun_ns = m->turn_ns;
	m->q->foreign_inflight++;
	return 0;
}

/* Zeroes, too, where data moves straight: what the ring's threads write would meet the copies of this
 * queue's own next requests. */
static bool on_the_spot(const struct pu_mapped *m, const struct pu_slot *slot)
{
	return m->layout->files[slot->part.file].memory && slot->place != IN_REGISTERED &&
	       (!slot->zeroes || m->straight);
}

int64_t pu_operation_begin(struct pu_mapped *m, struct pu_slot *slot)
{
	if (m->policy->operate)
		m->policy->operate(m, slot);
	if (on_the_spot(m, slot))
		return do_now(m, slot);
	return submit(m, slot) ? -ENOMEM : PU_UNDER_WAY;
}

bool pu_operation_goes_on(struct pu_mapped *m, struct pu_slot *slot, int64_t *result)
{
	if (*result == -EINTR)
		return true;
	/* A kernel before 6.12 has no such command for devices: a hole is what they all can punch. */
	if (slot->op == PU_OP_DISCARD && !slot->punch &&
	    (*result == -EOPNOTSUPP || *result == -EINVAL) &&
	    m->layout->files[slot->part.file].device) {
		slot->punch = true;
		return true;
	}
	if (*result == -EOPNOTSUPP && slot->op == PU_OP_DISCARD)
		*result = 0; /* a hint: the bytes stay */
	if (*result >= 0 && (pu_has_data(slot->op) || slot->zeroes)) {
		slot->done += (uint64_t)*result;
		if (slot->done < slot->part.length) {
			if (*result > 0)
				return true;
			*result = -EIO; /* the file is shorter than was said */
		}
	}
	if (*result > 0)
		*result = 0;
	return false;
}
