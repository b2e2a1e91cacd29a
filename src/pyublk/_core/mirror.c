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

void pu_mirror_leg_ends(struct pu_mapped *m, uint16_t tag, uint32_t leg, int64_t result)
{
	struct pu_work *w = &m->works[tag];

	if (result >= 0) {
		w->good_legs |= 1u << leg;
		return;
	}
	if (result == -EOPNOTSUPP && !pu_has_data(w->op)) {
		w->error = -EOPNOTSUPP; /* what a file cannot do at all is no failure of it */
		return;
	}
	w->bad_legs |= 1u << leg;
	w->error = (int)result;
	m->leg_error[leg] = (int)-result;
	__atomic_fetch_add(&m->layout->legs[leg].errors, 1, __ATOMIC_RELAXED);
	if (w->op == PU_OP_READ && !w->unregistered &&
	    pu_layout_readable(m->layout, w->offset, w->bad_legs) >= 0)
		pu_mirror_read(m, tag);
}

void pu_mirror_answer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];

	/* What one leg has, the disk has; but only once it is known that the other lacks it. */
	if (w->bad_legs && w->good_legs) {
		w->error = 0;
		m->failed_legs |= w->bad_legs;
		w->held = true;
		m->held++;
		return;
	}
	pu_work_finish(m, tag, w->error);
}

/* ---- legs that fail or hang ---- */

static int renew_buffer(struct pu_mapped *m, uint16_t tag)
{
	void *fresh = mmap(NULL, m->q->buffer_bytes, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (fresh == MAP_FAILED)
		return -ENOMEM;
	madvise(fresh, m->q->buffer_bytes, MADV_DONTFORK);
	m->q->tags[tag].buffer = fresh;
	return 0;
}

/* Whether the request can do without the leg. */
static bool dispensable(const struct pu_mapped *m, const struct pu_work *w, uint32_t leg)
{
	if (w->op == PU_OP_READ)
		return pu_layout_readable(m->layout, w->offset, w->bad_legs | 1u << leg) >= 0;
	return w->good_legs;
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

		if (!slot->busy || slot->orphan || now - slot->begun_ns < limit ||
		    !dispensable(m, w, slot->part.file))
			continue;
		/* The operation keeps its slot, and the memory that it may still read or fill. */
		if (pu_has_data(w->op) && renew_buffer(m, slot->tag))
			continue;
		slot->orphan = true;
		m->q->others--;
		pu_work_part_ends(m, slot->tag, slot->part.file, -ETIMEDOUT);
	}
}

bool pu_mapped_next_failure(struct pu_mapped *m, struct pu_leg_failure *failure)
{
	if (!m->failed_legs)
		return false;
	failure->leg = (uint32_t)__builtin_ctz(m->failed_legs);
	failure->error = m->leg_error[failure->leg];
	m->failed_legs &= ~(1u << failure->leg);
	return true;
}

void pu_mapped_recorded(struct pu_mapped *m)
{
	for (uint32_t tag = 0; m->held && tag < m->q->depth; tag++) {
		if (!m->works[tag].held)
			continue;
		m->works[tag].held = false;
		m->held--;
		pu_work_finish(m, (uint16_t)tag, 0);
	}
}
