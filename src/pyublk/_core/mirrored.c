/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "mirrored.h"

#include <errno.h>
#include <stdlib.h>

#include "work.h"

struct leg_work {
	uint32_t good, bad; /* legs, a bit for each */
	uint32_t told;	    /* it is held until these legs' failures are on record */
	bool counted;	    /* in the mirror's regions, as a write under way */
};

/* A queue's view of its mirror. */
struct mirror_queue {
	struct leg_work *works; /* for each tag */
	uint32_t failed_legs; /* bits: to be given up, and put on record */
	struct pu_leg_failure failures[PU_MAX_LEGS];
};

static struct mirror_queue *queue_of(const struct pu_mapped *m)
{
	return m->own;
}

static struct pu_mirror *mirror_of(const struct pu_mapped *m)
{
	return (struct pu_mirror *)(uintptr_t)m->context;
}

static void close_queue(struct pu_mapped *m)
{
	struct mirror_queue *mq = queue_of(m);

	if (!mq)
		return;
	free(mq->works);
	free(mq);
	m->own = NULL;
}

static int open_queue(struct pu_mapped *m)
{
	struct mirror_queue *mq = calloc(1, sizeof(*mq));

	m->own = mq;
	if (!mq)
		return -ENOMEM;
	mq->works = calloc(m->q->depth, sizeof(*mq->works));
	m->look_every_ns = mirror_of(m)->leg_timeout_ns / 4;
	return mq->works ? 0 : -ENOMEM;
}

/* ---- requests ---- */

static bool admit(struct pu_mapped *m, uint16_t tag)
{
	const struct pu_work *w = &m->works[tag];
	struct leg_work *l = &queue_of(m)->works[tag];

	*l = (struct leg_work){ 0 };
	if (w->op == PU_OP_READ || w->op == PU_OP_FLUSH)
		return true;
	l->counted = pu_regions_begin(&mirror_of(m)->writes, w->offset, w->length);
	return l->counted;
}

static void begin_again(struct pu_mapped *m, uint16_t tag)
{
	struct leg_work *l = &queue_of(m)->works[tag];

	l->good = l->bad = 0;
}

/* A read from one leg, w->cut telling that one was asked, all others to each that has not failed. */
static enum pu_cut next_part(struct pu_mapped *m, uint16_t tag, struct pu_part *part)
{
	const struct pu_mirror *mirror = mirror_of(m);
	struct pu_work *w = &m->works[tag];
	int leg = (int)w->cut, legs = (int)m->layout->nr_files;
	bool read = w->op == PU_OP_READ;

	if (read)
		leg = w->cut ? -1 :
			       pu_mirror_readable(mirror, w->offset, queue_of(m)->works[tag].bad);
	else
		while (leg < legs && pu_mirror_leg_state(mirror, (uint32_t)leg) == PU_LEG_FAILED)
			leg++;
	if (leg < 0 || leg >= legs)
		return PU_NO_PART;
	*part = (struct pu_part){
		.file = (uint32_t)leg, .offset = w->offset, .length = w->length, .first = w->length
	};
	w->cut = (uint64_t)leg + 1;
	return read || leg + 1 == legs ? PU_LAST_PART : PU_PART;
}

static void operate(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_mirror *mirror = mirror_of(m);
	uint32_t leg = slot->part.file;

	if (!slot->done)
		slot->file = (struct pu_slot_file){ pu_mirror_file_generation(mirror, leg),
						    pu_mirror_replaced(mirror, leg) };
}

static void note_failure(struct pu_mapped *m, uint32_t leg, int error)
{
	struct pu_leg_failure *failure = &queue_of(m)->failures[leg];

	failure->error = error;
	failure->file_generation = pu_mirror_file_generation(mirror_of(m), leg);
}

static void tell(struct pu_mapped *m, uint32_t legs)
{
	queue_of(m)->failed_legs |= legs;
	m->to_tell = true;
}

/* Another file may be in the leg's place now. It has not failed, and what was written to the file
 * before does not count for it. */
static bool was_replaced(const struct pu_mapped *m, const struct pu_slot *slot)
{
	return slot->file.generation !=
	       pu_mirror_file_generation(mirror_of(m), slot->part.file);
}

static void part_ended(struct pu_mapped *m, struct pu_slot *slot, int64_t result)
{
	struct pu_mirror *mirror = mirror_of(m);
	struct pu_work *w = &m->works[slot->tag];
	struct leg_work *l = &queue_of(m)->works[slot->tag];
	uint32_t leg = slot->part.file;
	bool replaced = was_replaced(m, slot);

	if (result >= 0) {
		if (!replaced || w->op == PU_OP_READ)
			l->good |= 1u << leg;
		return;
	}
	if (w->error != -EOPNOTSUPP)
		w->error = (int)result;
	/* What a file cannot do at all is no failure of it: zeroes will be written. */
	if (result == -EOPNOTSUPP && w->op == PU_OP_WRITE_ZEROES && !w->by_writing)
		return;
	if (!replaced) {
		note_failure(m, leg, (int)-result);
		__atomic_fetch_add(&mirror->legs[leg].errors, 1, __ATOMIC_RELAXED);
	}
	if (!replaced || w->op != PU_OP_READ)
		l->bad |= 1u << leg;
	if (w->op == PU_OP_READ && !w->unregistered) { /* from another leg, if there is one */
		w->cut = 0;
		pu_work_proceed(m, slot->tag);
	}
}

/* What one leg in step has, the disk has; but only once it is on record which legs lack it, since a
 * restart would read those. A read is what it is. */
static void answer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	struct leg_work *l = &queue_of(m)->works[tag];
	struct pu_leg_bits bits = { .in_step = UINT16_MAX };

	if (w->op != PU_OP_READ)
		bits = pu_mirror_leg_bits(mirror_of(m));
	if (!(l->good & bits.in_step)) {
		pu_work_finish(m, tag, w->error ? w->error : -EIO);
		return;
	}
	l->told = l->bad | bits.unrecorded;
	if (!l->told) {
		pu_work_finish(m, tag, 0);
		return;
	}
	w->held = true;
	tell(m, l->told);
}

/* Of one that was held, when the legs that it was held for have been given up, or not: the last in
 * step stays, and a record may fail to be written. */
static int result_of(const struct pu_mapped *m, uint16_t tag)
{
	const struct pu_work *w = &m->works[tag];
	const struct leg_work *l = &queue_of(m)->works[tag];
	struct pu_leg_bits bits = pu_mirror_leg_bits(mirror_of(m));

	if (w->op == PU_OP_READ)
		return 0;
	if (l->told & bits.unrecorded)
		return -EIO;
	if (!(l->good & bits.in_step) || l->bad & bits.in_step)
		return w->error ? w->error : -EIO;
	return 0;
}

static void finished(struct pu_mapped *m, uint16_t tag)
{
	const struct pu_work *w = &m->works[tag];

	if (queue_of(m)->works[tag].counted)
		pu_regions_end(&mirror_of(m)->writes, w->offset, w->length);
}

/* ---- legs that fail or hang ---- */

/* Whether the request can do without the leg. */
static bool dispensable(const struct pu_mapped *m, uint16_t tag, uint32_t leg)
{
	const struct pu_work *w = &m->works[tag];
	const struct leg_work *l = &queue_of(m)->works[tag];

	if (w->op == PU_OP_READ)
		return pu_mirror_readable(mirror_of(m), w->offset, l->bad | 1u << leg) >= 0;
	return l->good & pu_mirror_leg_bits(mirror_of(m)).in_step;
}

static uint32_t *orphans(struct pu_mapped *m, const struct pu_slot *slot)
{
	return &mirror_of(m)->legs[slot->part.file].orphans[slot->file.replaced & 1];
}

/* Whether it told of a leg that must be given up first: one that stays must not write late what was
 * answered. */
static bool give_up(struct pu_mapped *m, struct pu_slot *slot, bool in_time)
{
	uint32_t leg = slot->part.file;
	bool failed = pu_mirror_leg_state(mirror_of(m), leg) == PU_LEG_FAILED ||
		      was_replaced(m, slot);

	if ((!failed && in_time) || !pu_queue_holds(m->q, slot->tag, slot->generation) ||
	    !dispensable(m, slot->tag, leg))
		return false;
	if (!failed) {
		note_failure(m, leg, ETIMEDOUT);
		tell(m, 1u << leg);
		return true;
	}
	if (pu_slot_abandon(m, slot)) {
		__atomic_fetch_add(orphans(m, slot), 1, __ATOMIC_RELAXED);
		pu_slot_end_part(m, slot, -ETIMEDOUT);
	}
	return false;
}

/* Gives up what legs have held for too long, where the request can do without. */
static void look(struct pu_mapped *m, int64_t now_ns)
{
	for (uint32_t i = 0; i < m->nr_slots; i++) {
		struct pu_slot *slot = &m->slots[i];

		bool in_time = now_ns - slot->begun_ns < mirror_of(m)->leg_timeout_ns;

		if (slot->busy && !slot->orphan && give_up(m, slot, in_time))
			m->look_at_ns = 0;
	}
}

static void orphan_ended(struct pu_mapped *m, struct pu_slot *slot)
{
	__atomic_fetch_sub(orphans(m, slot), 1, __ATOMIC_RELEASE);
}

bool pu_mirrored_next_failure(struct pu_mapped *m, struct pu_leg_failure *failure)
{
	struct mirror_queue *mq = queue_of(m);
	uint32_t leg;

	m->to_tell = mq->failed_legs;
	if (!m->to_tell)
		return false;
	leg = (uint32_t)__builtin_ctz(mq->failed_legs);
	*failure = mq->failures[leg];
	failure->leg = leg;
	mq->failures[leg].error = 0;
	mq->failed_legs &= ~(1u << leg);
	return true;
}

void pu_mirrored_recorded(struct pu_mapped *m)
{
	for (uint32_t tag = 0; tag < m->q->depth; tag++) {
		struct pu_work *w = &m->works[tag];

		if (!w->held)
			continue;
		pu_work_finish(m, (uint16_t)tag, result_of(m, (uint16_t)tag));
		w->held = false;
	}
}

static const struct pu_policy_functions functions = {
	.open = open_queue,
	.close = close_queue,
	.admit = admit,
	.begin_again = begin_again,
	.next_part = next_part,
	.operate = operate,
	.part_ended = part_ended,
	.orphan_ended = orphan_ended,
	.answer = answer,
	.finished = finished,
	.look = look,
};

/* What legs that hang hold must leave every request a slot for each of its parts. */
const struct pu_policy *pu_mirrored(struct pu_mirror *mirror)
{
	mirror->policy.functions = &functions;
	mirror->policy.slots_per_tag =
		mirror->leg_timeout_ns ? PU_FILES_PER_LEG * mirror->layout->nr_files : 2;
	return &mirror->policy;
}
