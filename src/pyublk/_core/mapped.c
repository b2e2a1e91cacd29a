/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "work.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define NO_SLOT UINT32_MAX
#define VECTOR 16u		     /* pieces of memory in one operation */
#define SLOTS_BESIDE_DEPTH 64u
#define ZEROES_BYTES (UINT64_C(1) << 20)
#define BLOCK_DISCARD 0x1200u /* BLOCK_URING_CMD_DISCARD (Linux 6.12) */

enum { KIND_PART = PU_KIND_OTHER, KIND_REGISTER, KIND_UNREGISTER };

/* What legs that hang hold must leave every request a slot for each of its parts. */
static uint32_t slots_for(const struct pu_layout *layout, uint16_t depth)
{
	uint32_t for_each_tag = layout->leg_timeout_ns ? PU_FILES_PER_LEG * layout->nr_files : 2;

	return for_each_tag * depth + SLOTS_BESIDE_DEPTH;
}

uint32_t pu_mapped_entries(const struct pu_layout *layout, uint16_t depth)
{
	return slots_for(layout, depth) + depth; /* and each tag's registration */
}

static void complete(void *context, uint64_t user_data, int32_t result);

static bool mirrored(const struct pu_mapped *m)
{
	return m->layout->kind == PU_LAYOUT_MIRROR;
}

static bool every_file_mapped(const struct pu_layout *layout)
{
	for (uint32_t i = 0; i < layout->nr_files; i++)
		if (!layout->files[i].map)
			return false;
	return true;
}

int pu_mapped_open(struct pu_mapped *m, struct pu_queue *q, struct pu_layout *layout,
		   uint32_t version)
{
	memset(m, 0, sizeof(*m));
	m->q = q;
	m->layout = layout;
	m->version = version;
	m->nr_slots = slots_for(layout, q->depth);
	m->works = calloc(q->depth, sizeof(*m->works));
	m->slots = calloc(m->nr_slots, sizeof(*m->slots));
	m->vectors = calloc((size_t)m->nr_slots * VECTOR, sizeof(*m->vectors));
	m->waiting = calloc(q->depth, sizeof(*m->waiting));
	m->blocked = calloc(q->depth, sizeof(*m->blocked));
	m->zeroes_bytes = ZEROES_BYTES;
	m->zeroes = mmap(NULL, m->zeroes_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			 -1, 0);
	if (m->zeroes == MAP_FAILED)
		m->zeroes = NULL;
	if (!m->works || !m->slots || !m->vectors || !m->waiting || !m->blocked ||
	    !m->zeroes) {
		pu_mapped_close(m);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < m->nr_slots; i++)
		m->slots[i].next_free = i + 1 < m->nr_slots ? i + 1 : NO_SLOT;
	m->every_file_mapped = every_file_mapped(layout);
	q->complete = complete;
	q->completer = m;
	return 0;
}

void pu_mapped_close(struct pu_mapped *m)
{
	if (m->zeroes)
		munmap(m->zeroes, m->zeroes_bytes);
	for (uint32_t tag = 0; m->works && tag < m->q->depth; tag++)
		free(m->works[tag].mapped_parts);
	free(m->works);
	free(m->slots);
	free(m->vectors);
	free(m->waiting);
	free(m->blocked);
	m->works = NULL;
	m->slots = NULL;
	m->vectors = NULL;
	m->waiting = NULL;
	m->blocked = NULL;
	m->zeroes = NULL;
}

/* ---- one operation on one file ---- */

static void *data_address(const struct pu_mapped *m, const struct pu_slot *slot, uint64_t data)
{
	const struct pu_work *w = &m->works[slot->tag];

	if (w->by_writing)
		return m->zeroes;
	if (w->place == IN_REGISTERED)
		return (void *)(uintptr_t)data; /* counted from the start of the request's memory */
	return slot->memory + data;
}

/* The pieces of memory of what is left of a part, as many as go into one operation. */
static uint32_t gather(struct pu_mapped *m, struct pu_slot *slot, struct iovec *vector)
{
	const struct pu_work *w = &m->works[slot->tag];
	uint64_t at = slot->done, contiguous;
	uint32_t count = 0;

	if (w->by_writing) {
		contiguous = slot->part.length - at;
		if (contiguous > m->zeroes_bytes)
			contiguous = m->zeroes_bytes;
		vector[0] = (struct iovec){ m->zeroes, contiguous };
		slot->asked = contiguous;
		return 1;
	}
	while (at < slot->part.length && count < VECTOR) {
		uint64_t data = pu_part_data(&slot->part, at, &contiguous);

		vector[count++] = (struct iovec){ data_address(m, slot, data), contiguous };
		at += contiguous;
	}
	slot->asked = at - slot->done;
	return count;
}

static int fallocate_mode(const struct pu_work *w)
{
	if (w->op == PU_OP_DISCARD || !(w->flags & PU_FLAG_NOUNMAP))
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
	struct pu_queue *q = m->q;
	uint64_t offset = slot->part.offset + slot->done, length;
	uint64_t data = pu_part_data(&slot->part, slot->done, &length);
	bool read = m->works[slot->tag].op == PU_OP_READ;
	uint8_t *buffer = slot->memory + data;
	int64_t done;
	int error;

	if (offset + length <= file->mapped && (!read || pu_file_holds(file, offset, length))) {
		error = pu_queue_copy(q, slot->tag, slot->generation, file->map + offset, data,
				      length, 0);
		if (!error)
			return (int64_t)length;
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

static int64_t do_now(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_work *w = &m->works[slot->tag];
	struct iovec vector[VECTOR];
	int fd = m->layout->files[slot->part.file].fd;
	off_t offset = (off_t)(slot->part.offset + slot->done);

	if (w->op == PU_OP_FLUSH)
		return or_errno(fdatasync(fd));
	if (!pu_has_data(w->op) && !w->by_writing)
		return or_errno(fallocate(fd, fallocate_mode(w), offset,
					  (off_t)slot->part.length));

	if (w->place == IN_FILES)
		return move_directly(m, slot);

	int count = (int)gather(m, slot, vector);
	int flags = w->flags & PU_FLAG_FUA ? RWF_DSYNC : 0;

	if (w->op == PU_OP_READ)
		return or_errno(count == 1 ? pread(fd, vector[0].iov_base, vector[0].iov_len, offset) :
					     preadv(fd, vector, count, offset));
	return or_errno(pwritev2(fd, vector, count, offset, flags));
}

static void fill_transfer(struct pu_mapped *m, struct pu_slot *slot, struct pu_sqe *sqe)
{
	const struct pu_work *w = &m->works[slot->tag];
	struct iovec *vector = &m->vectors[(size_t)(slot - m->slots) * VECTOR];
	uint32_t count = gather(m, slot, vector);
	bool read = w->op == PU_OP_READ;
	bool fixed = w->place == IN_REGISTERED && !w->by_writing;

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
	sqe->user_data = PU_USER_DATA(KIND_PART, slot - m->slots);
	if (pu_has_data(w->op) || w->by_writing) {
		fill_transfer(m, slot, sqe);
	} else if (w->op == PU_OP_FLUSH) {
		sqe->opcode = PU_OPCODE_FSYNC;
		sqe->op_flags = PU_FSYNC_DATASYNC;
	} else if (w->op == PU_OP_DISCARD && file->device && !slot->punch) {
		sqe->opcode = PU_OPCODE_URING_CMD;
		sqe->off = BLOCK_DISCARD;
		sqe->addr = slot->part.offset;
		sqe->cmd[0] = slot->part.length;
	} else {
		sqe->opcode = PU_OPCODE_FALLOCATE;
		sqe->off = slot->part.offset;
		sqe->addr = slot->part.length;
		sqe->len = (uint32_t)fallocate_mode(w);
	}
	if (m->layout->leg_timeout_ns)
		slot->begun_ns = pu_now_ns();
	m->q->foreign_inflight++;
	return 0;
}

static bool on_the_spot(const struct pu_mapped *m, const struct pu_slot *slot)
{
	const struct pu_work *w = &m->works[slot->tag];

	return m->layout->files[slot->part.file].memory && w->place != IN_REGISTERED &&
	       !w->by_writing;
}

/* ---- requests ---- */

static void advance(struct pu_mapped *m, struct pu_slot *slot, int64_t result);

void pu_slot_operate(struct pu_mapped *m, struct pu_slot *slot)
{
	int error;

	if (on_the_spot(m, slot)) {
		advance(m, slot, do_now(m, slot));
		return;
	}
	error = submit(m, slot);
	if (error)
		advance(m, slot, -ENOMEM);
}

struct pu_slot *pu_slot_take(struct pu_mapped *m, uint16_t tag, const struct pu_part *part)
{
	struct pu_slot *slot;

	if (m->free_slot == NO_SLOT)
		return NULL;
	slot = &m->slots[m->free_slot];
	m->free_slot = slot->next_free;
	slot->busy = true;
	slot->orphan = false;
	slot->punch = false;
	slot->done = 0;
	slot->part = *part;
	slot->tag = tag;
	slot->memory = m->works[tag].place == IN_SHARED ? pu_queue_shared(m->q, tag) :
							 pu_queue_buffer(m->q, tag);
	slot->generation = m->works[tag].generation;
	if (mirrored(m)) {
		slot->file_generation = pu_layout_incarnation(m->layout, part->file);
		slot->replaced = pu_layout_replaced(m->layout, part->file);
	}
	m->works[tag].open++;
	return slot;
}

void pu_slot_free(struct pu_mapped *m, struct pu_slot *slot)
{
	slot->busy = false;
	slot->next_free = m->free_slot;
	m->free_slot = (uint32_t)(slot - m->slots);
}

/* The next part of a request. False when all are cut. */
static bool next_part(struct pu_mapped *m, struct pu_work *w, struct pu_part *part)
{
	const struct pu_layout *layout = m->layout;
	uint64_t nth = w->cut;

	*part = (struct pu_part){ .offset = w->offset, .length = w->length, .first = w->length };
	if (w->op == PU_OP_FLUSH || mirrored(m)) {
		bool more = mirrored(m) ? pu_mirror_next_leg(layout, &nth) : nth < layout->nr_files;

		part->file = (uint32_t)nth;
		w->cut = nth + 1;
		return more;
	}
	if (layout->kind == PU_LAYOUT_PER_REQUEST) {
		if (nth >= w->nr_mapped_parts)
			return false;
		part->file = w->mapped_parts[nth].file;
		part->offset = w->mapped_parts[nth].offset;
		part->length = part->first = w->mapped_parts[nth].length;
		part->data = w->mapped_parts[nth].start;
		w->cut = nth + 1;
		return true;
	}
	if (!pu_layout_part(layout, w->offset, w->length, (uint32_t)nth, w->cut, part))
		return false;
	w->cut = layout->kind == PU_LAYOUT_STRIPE ? nth + 1 : w->cut + part->length;
	return true;
}

void pu_work_wait_for_slots(struct pu_mapped *m, uint16_t tag)
{
	if (m->works[tag].queued)
		return;
	m->works[tag].queued = true;
	m->waiting[m->nr_waiting++] = tag;
}

/* Gives parts to slots until all are cut, or no slot is left. */
static void cut(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	struct pu_part part;

	w->open++; /* parts that end on the spot must not end the request */
	for (;;) {
		if (m->free_slot == NO_SLOT) {
			pu_work_wait_for_slots(m, tag);
			break;
		}
		if (!next_part(m, w, &part))
			break;
		pu_slot_operate(m, pu_slot_take(m, tag, &part));
	}
	pu_work_release(m, tag);
}

void pu_work_proceed(struct pu_mapped *m, uint16_t tag)
{
	if (mirrored(m) && m->works[tag].op == PU_OP_READ)
		pu_mirror_read(m, tag);
	else
		cut(m, tag);
}

static int register_buffer(struct pu_mapped *m, uint16_t tag)
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
	sqe->user_data = PU_USER_DATA(KIND_REGISTER, tag);
	q->foreign_inflight++;
	m->works[tag].open++;
	m->works[tag].by_hand = true;
	return 0;
}

static void unregister_buffer(struct pu_mapped *m, uint16_t tag)
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
	sqe->user_data = PU_USER_DATA(KIND_UNREGISTER, tag);
	q->foreign_inflight++;
}

static enum place choose_place(const struct pu_mapped *m, const struct pu_work *w)
{
	const struct pu_queue *q = m->q;

	if (pu_has_data(w->op) && w->flags & PU_FLAG_SHMEM_ZC)
		return IN_SHARED;
	if (!pu_has_data(w->op) || (!q->user_copy && !q->zero_copy))
		return IN_BUFFER;
	if (q->zero_copy && !w->unregistered)
		return IN_REGISTERED;
	return m->every_file_mapped ? IN_FILES : IN_USER_COPY;
}

/* Finds the data, then serves. */
static void begin(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	struct pu_queue *q = m->q;
	int error = 0;

	w->cut = 0;
	w->open = 1;
	w->place = (uint8_t)choose_place(m, w);
	if (w->place == IN_SHARED)
		error = pu_queue_shared(q, tag) ? 0 : -EIO;
	else if (w->place == IN_USER_COPY)
		error = pu_queue_fill_buffer(q, tag, w->generation);
	/* The kernel registers before it takes the next entry of the ring. */
	else if (w->place == IN_REGISTERED &&
		 (!q->auto_buffer || q->desc[tag].op_flags & PU_FLAG_NEED_REG_BUF)) {
		if (q->auto_buffer)
			q->counters.fallbacks++;
		error = register_buffer(m, tag);
	}
	if (error)
		w->error = error;
	else
		pu_work_proceed(m, tag);
	pu_work_release(m, tag);
}

/* Whether write-zeroes of this kind have failed before, since a file cannot do them. */
static bool *must_write_zeroes(struct pu_mapped *m, uint32_t flags)
{
	return flags & PU_FLAG_NOUNMAP ? &m->no_zero_range : &m->no_holes;
}

/* Registers the files anew when one was replaced. */
static int take_up_files(struct pu_mapped *m)
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

static void take_out(uint16_t *list, uint32_t *count, uint16_t tag)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < *count; i++)
		if (list[i] != tag)
			list[kept++] = list[i];
	*count = kept;
}

/* Requests that were failed from outside may still wait for something when the tag brings another. */
static void forget(struct pu_mapped *m, uint16_t tag)
{
	const struct pu_work *w = &m->works[tag];

	if (w->queued)
		take_out(m->waiting, &m->nr_waiting, tag);
	if (w->blocked)
		take_out(m->blocked, &m->nr_blocked, tag);
	if (w->told)
		m->held--;
}

static bool failed_from_outside(const struct pu_mapped *m, uint16_t tag)
{
	return !pu_queue_holds(m->q, tag, m->works[tag].generation);
}

static void start(struct pu_mapped *m, uint16_t tag)
{
	const struct pu_desc *desc = &m->q->desc[tag];
	struct pu_work *w = &m->works[tag];
	struct pu_extent *mapped_parts = w->mapped_parts;
	uint32_t nr_mapped_parts = w->nr_mapped_parts, mapped_room = w->mapped_room;
	uint32_t op = desc->op_flags & 0xff;
	int error;

	forget(m, tag);
	*w = (struct pu_work){
		.generation = pu_tag_generation(&m->q->tags[tag]),
		.offset = pu_desc_offset(desc),
		.length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT,
		.op = op,
		.flags = desc->op_flags & ~0xffu,
		.mapped_parts = mapped_parts,
		.nr_mapped_parts = nr_mapped_parts,
		.mapped_room = mapped_room,
	};
	w->by_writing = op == PU_OP_WRITE_ZEROES && *must_write_zeroes(m, w->flags);
	if (op > PU_OP_DISCARD && op != PU_OP_WRITE_ZEROES) {
		pu_queue_answer(m->q, tag, -EOPNOTSUPP);
		return;
	}
	/* Somebody gave the disk another size (UPDATE_SIZE): what is beyond is not the target's. */
	if (w->offset > m->layout->size || w->length > m->layout->size - w->offset) {
		pu_queue_answer(m->q, tag, -EIO);
		return;
	}
	if (mirrored(m) && op != PU_OP_READ && op != PU_OP_FLUSH) {
		if (!pu_layout_write_begins(m->layout, w->offset, w->length)) {
			w->blocked = true;
			m->blocked[m->nr_blocked++] = tag;
			return;
		}
		w->writes_mirror = true;
	}
	/* After the region was asked for: it may have been copied to a file that came meanwhile. */
	error = take_up_files(m);
	if (error)
		pu_work_finish(m, tag, error);
	else
		begin(m, tag);
}

static void try_gated(struct pu_mapped *m)
{
	uint32_t count = m->nr_blocked;

	m->nr_blocked = 0; /* those that are still refused enter again, at a place already read */
	for (uint32_t i = 0; i < count; i++) {
		uint16_t tag = m->blocked[i];

		m->works[tag].blocked = false;
		if (!failed_from_outside(m, tag))
			start(m, tag);
	}
}

void pu_work_finish(struct pu_mapped *m, uint16_t tag, int64_t result)
{
	struct pu_work *w = &m->works[tag];

	if (w->by_hand && !w->unregistered)
		unregister_buffer(m, tag);
	if (w->writes_mirror)
		pu_layout_write_ends(m->layout, w->offset, w->length);
	if (result >= 0 && w->place == IN_USER_COPY && w->op == PU_OP_READ)
		result = pu_queue_copy(m->q, tag, w->generation, pu_queue_buffer(m->q, tag), 0,
				       w->length, 0);
	pu_queue_answer(m->q, tag, result);
}

/* All parts of a request have ended. */
static void answer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];

	if (w->told)
		return;
	if (w->unregistered && w->place == IN_REGISTERED) {
		m->q->counters.fallbacks++;
		w->error = 0;
		w->good_legs = w->bad_legs = 0;
		begin(m, tag);
		return;
	}
	if (w->error == -EOPNOTSUPP && w->op == PU_OP_WRITE_ZEROES && !w->by_writing) {
		*must_write_zeroes(m, w->flags) = true;
		w->by_writing = true;
		w->error = 0;
		w->good_legs = w->bad_legs = 0;
		begin(m, tag);
		return;
	}
	if (mirrored(m))
		pu_mirror_answer(m, tag);
	else
		pu_work_finish(m, tag, w->error);
}

void pu_work_release(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];

	if (--w->open == 0 && !w->queued)
		answer(m, tag);
}

static void resume_waiting(struct pu_mapped *m)
{
	while (m->nr_waiting && m->free_slot != NO_SLOT) {
		uint16_t tag = m->waiting[0];

		m->nr_waiting--;
		memmove(m->waiting, m->waiting + 1, m->nr_waiting * sizeof(*m->waiting));
		/* It stays half done, and its region of a mirror is never drained again: legs may differ. */
		if (failed_from_outside(m, tag))
			continue;
		m->works[tag].queued = false;
		pu_work_proceed(m, tag);
		if (m->works[tag].queued)
			return;
	}
}

void pu_work_part_ends(struct pu_mapped *m, uint16_t tag, uint32_t file, uint32_t file_generation,
		       int64_t result)
{
	struct pu_work *w = &m->works[tag];

	if (mirrored(m))
		pu_mirror_leg_ends(m, tag, file, file_generation, result);
	else if (result < 0 && !w->error)
		w->error = (int)result;
	pu_work_release(m, tag);
}

/* An operation has ended: the part goes on, or is done. */
static void advance(struct pu_mapped *m, struct pu_slot *slot, int64_t result)
{
	uint16_t tag = slot->tag;
	uint32_t file = slot->part.file;
	struct pu_work *w = &m->works[tag];
	bool transfer = pu_has_data(w->op) || w->by_writing;

	if (result == -EINTR) {
		pu_slot_operate(m, slot);
		return;
	}
	/* A kernel before 6.12 has no such command for devices: a hole is what they all can punch. */
	if (w->op == PU_OP_DISCARD && !slot->punch && (result == -EOPNOTSUPP || result == -EINVAL) &&
	    m->layout->files[file].device) {
		slot->punch = true;
		pu_slot_operate(m, slot);
		return;
	}
	if (result == -EOPNOTSUPP && w->op == PU_OP_DISCARD)
		result = 0; /* a hint: the bytes stay */
	if (result >= 0 && transfer) {
		slot->done += (uint64_t)result;
		if (slot->done < slot->part.length) {
			if (result > 0) {
				pu_slot_operate(m, slot);
				return;
			}
			result = -EIO; /* the file is shorter than was said */
		}
	}
	pu_slot_free(m, slot);
	pu_work_part_ends(m, tag, file, slot->file_generation, result < 0 ? result : 0);
}

static void complete(void *context, uint64_t user_data, int32_t result)
{
	struct pu_mapped *m = context;
	uint32_t number = (uint32_t)user_data;

	if (user_data >> PU_KIND_SHIFT == KIND_PART) {
		struct pu_slot *slot = &m->slots[number];

		if (slot->orphan) {
			pu_mirror_orphan_ends(m, slot);
			return;
		}
		m->q->foreign_inflight--;
		if (slot->generation != pu_tag_generation(&m->q->tags[slot->tag])) {
			pu_slot_free(m, slot);
			return;
		}
		/* Transient, says the kernel: resources were short. */
		advance(m, slot, result == -EAGAIN ? -EINTR : result);
		return;
	}
	m->q->foreign_inflight--;
	if (user_data >> PU_KIND_SHIFT == KIND_UNREGISTER ||
	    pu_tag_state(&m->q->tags[number]) == PU_TAG_GONE)
		return;
	if (result < 0)
		m->works[number].unregistered = true;
	pu_work_release(m, (uint16_t)number);
}

/* ---- serving ---- */

int pu_mapped_plan(struct pu_mapped *m, uint16_t tag, const struct pu_extent *parts, uint32_t count)
{
	struct pu_work *w = &m->works[tag];
	uint64_t left = (uint64_t)m->q->desc[tag].nr_sectors << PU_SECTOR_SHIFT, sum = 0;

	for (uint32_t i = 0; i < count; i++) {
		if (parts[i].file >= m->layout->nr_files || !parts[i].length ||
		    parts[i].length > left)
			return -EINVAL;
		left -= parts[i].length;
	}
	if (left)
		return -EINVAL;
	if (count > w->mapped_room) {
		struct pu_extent *more = realloc(w->mapped_parts, count * sizeof(*more));

		if (!more)
			return -ENOMEM;
		w->mapped_parts = more;
		w->mapped_room = count;
	}
	for (uint32_t i = 0; i < count; i++) {
		w->mapped_parts[i] = parts[i];
		w->mapped_parts[i].start = sum; /* in the request's data */
		sum += parts[i].length;
	}
	w->nr_mapped_parts = count;
	start(m, tag);
	return 0;
}

static int64_t limited(const struct pu_mapped *m, int64_t timeout_ns)
{
	int64_t limit = m->layout->leg_timeout_ns / 4;

	if (!limit || !pu_queue_awaits(m->q) || (timeout_ns >= 0 && timeout_ns < limit))
		return timeout_ns;
	return m->look_at_ns ? limit : 0;
}

int pu_mapped_turn(struct pu_mapped *m, int64_t timeout_ns)
{
	struct pu_queue *q = m->q;
	uint32_t need_plan = 0;
	int there;

	take_up_files(m); /* one that cannot be is tried again by each request, which fails if it must */
	there = pu_queue_wait(q, limited(m, timeout_ns));
	if (there < 0)
		return there;
	for (uint32_t i = 0; i < q->nr_ready; i++) {
		uint16_t tag = q->ready[i];

		if (m->layout->kind == PU_LAYOUT_PER_REQUEST &&
		    (q->desc[tag].op_flags & 0xff) != PU_OP_FLUSH)
			q->ready[need_plan++] = tag;
		else
			start(m, tag);
	}
	try_gated(m);
	resume_waiting(m);
	if (m->layout->leg_timeout_ns)
		pu_mirror_look_for_hanging(m);
	return (int)need_plan;
}
