/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "work.h"

#include <errno.h>
#include <sys/mman.h>

bool pu_mirror_next_leg(const struct pu_layout *layout, uint64_t *nth)
{
	while (*nth < layout->nr_files && pu_layout_leg(layout, (uint32_t)*nth) == PU_LEG_FAILED)
		++*nth;
	return *nth < layout->nr_files;
}

void pu_mirror_read(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	int leg = pu_layout_readable(m->layout, w->offset, w->bad_legs);
	struct pu_part part = { .offset = w->offset, .length = w->length, .first = w->length };
	struct pu_slot *slot;

	if (leg < 0) {
		w->open++;
		w->error = w->error ? w->error : -EIO;
		pu_work_release(m, tag);
		return;
	}
	part.file = (uint32_t)leg;
	slot = pu_slot_take(m, tag, &part);
	if (slot)
		pu_slot_operate(m, slot);
	else
		pu_work_wait_for_slots(m, tag);
}

static void note_failure(struct pu_mapped *m, uint32_t leg, int error)
{
	m->failures[leg].error = error;
	m->failures[leg].file_generation = pu_layout_incarnation(m->layout, leg);
}

/* Another file may be in the leg's place now. It has not failed, and what was written to the file
 * before does not count for it. */
static bool was_replaced(const struct pu_mapped *m, uint32_t leg, uint32_t file_generation)
{
	return file_generation != pu_layout_incarnation(m->layout, leg);
}

void pu_mirror_leg_ends(struct pu_mapped *m, uint16_t tag, uint32_t leg, uint32_t file_generation,
			int64_t result)
{
	struct pu_work *w = &m->works[tag];
	bool replaced = was_replaced(m, leg, file_generation);

	if (result >= 0) {
		if (!replaced || w->op == PU_OP_READ)
			w->good_legs |= 1u << leg;
		return;
	}
	if (w->error != -EOPNOTSUPP)
		w->error = (int)result;
	/* What a file cannot do at all is no failure of it: zeroes will be written. */
	if (result == -EOPNOTSUPP && w->op == PU_OP_WRITE_ZEROES && !w->by_writing)
		return;
	if (!replaced) {
		note_failure(m, leg, (int)-result);
		__atomic_fetch_add(&m->layout->legs[leg].errors, 1, __ATOMIC_RELAXED);
	}
	if (!replaced || w->op != PU_OP_READ)
		w->bad_legs |= 1u << leg;
	if (w->op == PU_OP_READ && !w->unregistered &&
	    pu_layout_readable(m->layout, w->offset, w->bad_legs) >= 0)
		pu_mirror_read(m, tag);
}

/* What one leg in step has, the disk has; but only once it is on record which legs lack it, since a
 * restart would read those. A read is what it is. */
void pu_mirror_answer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	struct pu_leg_bits bits = pu_layout_leg_bits(m->layout);
	bool read = w->op == PU_OP_READ;

	if (!(read ? w->good_legs : w->good_legs & bits.in_step)) {
		pu_work_finish(m, tag, w->error ? w->error : -EIO);
		return;
	}
	w->told = w->bad_legs | (read ? 0 : bits.unrecorded);
	if (!w->told) {
		pu_work_finish(m, tag, 0);
		return;
	}
	m->failed_legs |= w->told;
	m->held++;
}

/* Of one that was held, when the legs that it was held for have been given up, or not: the last in
 * step stays, and a record may fail to be written. */
static int result_of(const struct pu_mapped *m, const struct pu_work *w)
{
	struct pu_leg_bits bits = pu_layout_leg_bits(m->layout);

	if (w->op == PU_OP_READ)
		return 0;
	if (w->told & bits.unrecorded)
		return -EIO;
	if (!(w->good_legs & bits.in_step) || w->bad_legs & bits.in_step)
		return w->error ? w->error : -EIO;
	return 0;
}

/* ---- legs that fail or hang ---- */

static int renew_buffer(struct pu_mapped *m, uint16_t tag)
{
	uint8_t *fresh = pu_buffers_map(m->q->buffers);

	if (!fresh)
		return -ENOMEM;
	pu_buffers_exchange(m->q->buffers, tag, fresh);
	m->q->tags[tag].buffer = fresh;
	return 0;
}

/* Whether the request can do without the leg. */
static bool dispensable(const struct pu_mapped *m, const struct pu_work *w, uint32_t leg)
{
	if (w->op == PU_OP_READ)
		return pu_layout_readable(m->layout, w->offset, w->bad_legs | 1u << leg) >= 0;
	return w->good_legs & pu_layout_leg_bits(m->layout).in_step;
}

static uint32_t *orphans(struct pu_mapped *m, const struct pu_slot *slot)
{
	return &m->layout->legs[slot->part.file].orphans[slot->replaced & 1];
}

void pu_mirror_look_for_hanging(struct pu_mapped *m)
{
	int64_t now = pu_now_ns(), limit = m->layout->leg_timeout_ns;

	if (now < m->look_at_ns)
		return;
	m->look_at_ns = now + limit / 4;
	for (uint32_t i = 0; i < m->nr_slots; i++) {
		struct pu_slot *slot = &m->slots[i];
		struct pu_work *w = &m->works[slot->tag];
		uint32_t leg = slot->part.file;
		bool failed = pu_layout_leg(m->layout, leg) == PU_LEG_FAILED ||
			      was_replaced(m, leg, slot->file_generation);

		if (!slot->busy || slot->orphan || (!failed && now - slot->begun_ns < limit) ||
		    !pu_queue_holds(m->q, slot->tag, slot->generation) ||
		    !dispensable(m, w, leg))
			continue;
		/* The leg is given up first: one that stays must not write late what was answered. */
		if (!failed) {
			note_failure(m, leg, ETIMEDOUT);
			m->failed_legs |= 1u << leg;
			m->look_at_ns = 0;
			continue;
		}
		/* The operation keeps its slot, and the memory that it may still read or fill; which parts
		 * that are still to be cut need, too. */
		if (pu_has_data(w->op) && (w->queued || renew_buffer(m, slot->tag)))
			continue;
		slot->orphan = true;
		__atomic_fetch_add(orphans(m, slot), 1, __ATOMIC_RELAXED);
		m->q->orphans++;
		pu_work_part_ends(m, slot->tag, leg, slot->file_generation, -ETIMEDOUT);
	}
}

void pu_mirror_orphan_ends(struct pu_mapped *m, struct pu_slot *slot)
{
	__atomic_fetch_sub(orphans(m, slot), 1, __ATOMIC_RELEASE);
	m->q->orphans--;
	m->q->foreign_inflight--;
	pu_slot_free(m, slot);
	/* What the tag does not use any more goes back, unless another part still does. */
	if (slot->memory == pu_queue_buffer(m->q, slot->tag) ||
	    slot->memory == pu_queue_next_buffer(m->q, slot->tag))
		return;
	for (uint32_t i = 0; i < m->nr_slots; i++)
		if (m->slots[i].busy && m->slots[i].memory == slot->memory)
			return;
	pu_buffers_unmap(m->q->buffers, slot->memory);
}

bool pu_mapped_next_failure(struct pu_mapped *m, struct pu_leg_failure *failure)
{
	uint32_t leg;

	if (!m->failed_legs)
		return false;
	leg = (uint32_t)__builtin_ctz(m->failed_legs);
	*failure = m->failures[leg];
	failure->leg = leg;
	m->failures[leg].error = 0;
	m->failed_legs &= ~(1u << leg);
	return true;
}

void pu_mapped_recorded(struct pu_mapped *m)
{
	for (uint32_t tag = 0; m->held && tag < m->q->depth; tag++) {
		struct pu_work *w = &m->works[tag];

		if (!w->told)
			continue;
		m->held--;
		pu_work_finish(m, (uint16_t)tag, result_of(m, w));
		w->told = 0;
	}
}
