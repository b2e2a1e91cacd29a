/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "mapped.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "answer.h"
#include "clock.h"
#include "copy.h"
#include "deferred.h"
#include "operation.h"
#include "registering.h"
#include "work.h"

#define SLOTS_BESIDE_DEPTH 64u
#define ZEROES_BYTES (UINT64_C(1) << 20)

static uint32_t slots_for(const struct pu_policy *policy, uint16_t depth)
{
	return policy->slots_per_tag * depth + SLOTS_BESIDE_DEPTH;
}

uint32_t pu_mapped_entries(const struct pu_policy *policy, uint16_t depth)
{
	return slots_for(policy, depth) + depth; /* and each tag's registration */
}

static void complete(void *context, uint64_t user_data, int32_t result);

static void *map_anonymous(size_t bytes, int protection)
{
	void *map = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return map == MAP_FAILED ? NULL : map;
}

/* From the kernel, whose zeroes take no memory before they are used: calloc writes its own. */
static bool map_works(struct pu_mapped *m)
{
	size_t works = m->q->depth * sizeof(*m->works);
	size_t slots = m->nr_slots * sizeof(*m->slots);
	uint8_t *map;

	m->works_bytes = works + slots + m->nr_slots * PU_VECTOR * sizeof(*m->vectors);
	map = map_anonymous(m->works_bytes, PROT_READ | PROT_WRITE);
	if (!map)
		return false;
	m->works = (struct pu_work *)(void *)map;
	m->slots = (struct pu_slot *)(void *)(map + works);
	m->vectors = (struct iovec *)(void *)(map + works + slots);
	return true;
}

int pu_mapped_open(struct pu_mapped *m, struct pu_queue *q, struct pu_layout *layout,
		   const struct pu_policy *policy, uint32_t version)
{
	int error = 0;

	memset(m, 0, sizeof(*m));
	m->q = q;
	m->layout = layout;
	m->policy = policy->functions;
	m->context = policy;
	m->version = version;
	m->nr_slots = slots_for(policy, q->depth);
	m->waiting = calloc(q->depth, sizeof(*m->waiting));
	m->blocked = calloc(q->depth, sizeof(*m->blocked));
	m->outcomes = calloc(q->depth, sizeof(*m->outcomes));
	m->zeroes_bytes = ZEROES_BYTES;
	m->zeroes = map_anonymous(m->zeroes_bytes, PROT_READ);
	if (!map_works(m) || !m->waiting || !m->blocked || !m->outcomes || !m->zeroes)
		error = -ENOMEM;
	else if (m->policy->open)
		error = m->policy->open(m);
	if (!error)
		error = pu_layout_join(layout);
	if (error) {
		pu_mapped_close(m);
		return error;
	}
	/* With zero copy, files are also written by the ring, which knows nothing of the layout's lock. */
	m->straight = q->user_copy && !q->zero_copy && pu_layout_is_mapped(layout);
	q->complete = complete;
	q->completer = m;
	return 0;
}

void pu_mapped_close(struct pu_mapped *m)
{
	if (m->policy->close)
		m->policy->close(m);
	if (m->zeroes)
		munmap(m->zeroes, m->zeroes_bytes);
	for (uint32_t tag = 0; m->works && tag < m->q->depth; tag++)
		free(m->works[tag].mapped_parts);
	if (m->works)
		munmap(m->works, m->works_bytes);
	free(m->waiting);
	free(m->blocked);
	free(m->outcomes);
	m->works = NULL;
	m->slots = NULL;
	m->vectors = NULL;
	m->waiting = NULL;
	m->blocked = NULL;
	m->outcomes = NULL;
	m->zeroes = NULL;
}

static void release(struct pu_mapped *m, uint16_t tag);

/* ---- parts ---- */

/* The free one that comes next has its part already. */
static struct pu_slot *take_slot(struct pu_mapped *m, uint16_t tag)
{
	struct pu_slot *slot = &m->slots[m->free_slot];
	struct pu_work *w = &m->works[tag];

	m->free_slot = slot->next_free ? slot->next_free - 1 : m->free_slot + 1;
	slot->busy = true;
	slot->orphan = false;
	slot->punch = false;
	slot->done = 0;
	slot->tag = tag;
	slot->generation = w->generation;
	w->open++;
	if (slot->part.own) {
		slot->op = slot->part.own_write ? PU_OP_WRITE : PU_OP_READ;
		slot->place = IN_BUFFER;
		slot->zeroes = false;
		slot->memory = slot->part.own;
		return slot;
	}
	slot->op = (uint8_t)w->op;
	slot->place = w->place;
	slot->zeroes = w->by_writing;
	slot->memory = w->place == IN_SHARED ? pu_queue_shared(m->q, tag) :
					       pu_queue_buffer(m->q, tag);
	return slot;
}

static void free_slot(struct pu_mapped *m, struct pu_slot *slot)
{
	slot->busy = false;
	slot->next_free = m->free_slot + 1;
	m->free_slot = (uint32_t)(slot - m->slots);
}

void pu_slot_end_part(struct pu_mapped *m, struct pu_slot *slot, int64_t result)
{
	uint16_t tag = slot->tag;

	if (m->policy->part_ended)
		m->policy->part_ended(m, slot, result);
	else if (result < 0 && !m->works[tag].error)
		m->works[tag].error = (int)result;
	release(m, tag);
}

/* An operation has ended: the part goes on, or is done. */
static void advance(struct pu_mapped *m, struct pu_slot *slot, int64_t result)
{
	while (result != PU_UNDER_WAY) {
		if (!pu_operation_goes_on(m, slot, &result)) {
			free_slot(m, slot);
			pu_slot_end_part(m, slot, result);
			return;
		}
		result = pu_operation_begin(m, slot);
	}
}

static int renew_buffer(struct pu_mapped *m, uint16_t tag)
{
	uint8_t *fresh = pu_buffers_map(m->q->buffers);

	if (!fresh)
		return -ENOMEM;
	pu_buffers_exchange(m->q->buffers, tag, fresh);
	m->q->tags[tag].buffer = fresh;
	return 0;
}

bool pu_slot_abandon(struct pu_mapped *m, struct pu_slot *slot)
{
	const struct pu_work *w = &m->works[slot->tag];

	/* The operation keeps its slot, and the memory that it may still read or fill; which parts
	 * that are still to be cut need, too. */
	if (pu_has_data(w->op) && (w->queued || renew_buffer(m, slot->tag)))
		return false;
	slot->orphan = true;
	m->q->orphans++;
	return true;
}

static void end_orphan(struct pu_mapped *m, struct pu_slot *slot)
{
	if (m->policy->orphan_ended)
		m->policy->orphan_ended(m, slot);
	m->q->orphans--;
	m->q->foreign_inflight--;
	free_slot(m, slot);
	/* What the tag does not use any more goes back, unless another part still does. */
	if (slot->memory == pu_queue_buffer(m->q, slot->tag) ||
	    slot->memory == pu_queue_next_buffer(m->q, slot->tag))
		return;
	for (uint32_t i = 0; i < m->nr_slots; i++)
		if (m->slots[i].busy && m->slots[i].memory == slot->memory)
			return;
	pu_buffers_unmap(m->q->buffers, slot->memory);
}

/* ---- requests ---- */

static void wait_for_slots(struct pu_mapped *m, uint16_t tag)
{
	if (m->works[tag].queued)
		return;
	m->works[tag].queued = true;
	m->waiting[m->nr_waiting++] = tag;
}

void pu_work_proceed(struct pu_mapped *m, uint16_t tag)
{
	m->works[tag].open++; /* parts that end on the spot must not end the request */
	for (enum pu_cut cut = PU_PART; cut == PU_PART;) {
		struct pu_slot *slot;

		if (m->free_slot == m->nr_slots) {
			wait_for_slots(m, tag);
			break;
		}
		cut = m->policy->next_part(m, tag, &m->slots[m->free_slot].part);
		if (cut == PU_NO_PART)
			break;
		slot = take_slot(m, tag);
		advance(m, slot, pu_operation_begin(m, slot));
	}
	release(m, tag);
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
	return m->straight ? IN_FILES : IN_USER_COPY;
}

/* Finds the data, then serves. */
static void begin(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];
	struct pu_queue *q = m->q;
	int error = 0;

	w->cut = 0;
	w->open = 1;
	w->error = 0;
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
		error = pu_register_buffer(m, tag);
	}
	if (error)
		w->error = error;
	else
		pu_work_proceed(m, tag);
	release(m, tag);
}

static void begin_again(struct pu_mapped *m, uint16_t tag)
{
	if (m->policy->begin_again)
		m->policy->begin_again(m, tag);
	begin(m, tag);
}

/* Whether write-zeroes of this kind have failed before, since a file cannot do them. */
static bool *must_write_zeroes(struct pu_mapped *m, uint32_t flags)
{
	return flags & PU_FLAG_NOUNMAP ? &m->no_zero_range : &m->no_holes;
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
	if (m->works[tag].queued)
		take_out(m->waiting, &m->nr_waiting, tag);
	if (m->works[tag].blocked)
		take_out(m->blocked, &m->nr_blocked, tag);
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
	uint64_t size = pu_layout_size(m->layout);
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
	if (op > PU_OP_DISCARD && op != PU_OP_WRITE_ZEROES) {
		pu_queue_answer(m->q, tag, -EOPNOTSUPP);
		return;
	}
	/* Somebody gave the disk another size (UPDATE_SIZE): what is beyond is not the target's. */
	if (w->offset > size || w->length > size - w->offset) {
		pu_queue_answer(m->q, tag, -EIO);
		return;
	}
	if (m->policy->admit && !m->policy->admit(m, tag)) {
		if (failed_from_outside(m, tag)) /* or by the policy */
			return;
		w->blocked = true;
		m->blocked[m->nr_blocked++] = tag;
		return;
	}
	w->by_writing = w->op == PU_OP_WRITE_ZEROES && *must_write_zeroes(m, w->flags);
	/* After it was admitted: a file may have come meanwhile. */
	error = pu_take_up_files(m);
	if (error)
		pu_work_finish(m, tag, error);
	else
		begin(m, tag);
}

static void try_blocked(struct pu_mapped *m)
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
		pu_unregister_buffer(m, tag);
	if (m->policy->finished)
		m->policy->finished(m, tag);
	if (result >= 0 && w->place == IN_USER_COPY && w->op == PU_OP_READ)
		result = pu_queue_copy(m->q, tag, w->generation, pu_queue_buffer(m->q, tag), 0,
				       w->length, 0);
	pu_queue_answer(m->q, tag, result);
}

/* All parts of a request have ended. */
static void answer(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];

	if (w->held)
		return;
	if (w->unregistered && w->place == IN_REGISTERED) {
		m->q->counters.fallbacks++;
		begin_again(m, tag);
		return;
	}
	if (w->error == -EOPNOTSUPP && w->op == PU_OP_WRITE_ZEROES && !w->by_writing) {
		*must_write_zeroes(m, w->flags) = true;
		w->by_writing = true;
		begin_again(m, tag);
		return;
	}
	if (m->policy->answer)
		m->policy->answer(m, tag);
	else if (m->layout->defers_flushes && w->op == PU_OP_FLUSH && !w->error)
		pu_defer(m, tag);
	else
		pu_work_finish(m, tag, w->error);
}

static void finish_resolved(struct pu_mapped *m)
{
	int result;

	/* Mostly there is none, and a load costs less than the exchange. */
	if (!__atomic_load_n(&m->resolved, __ATOMIC_ACQUIRE) ||
	    !__atomic_exchange_n(&m->resolved, false, __ATOMIC_SEQ_CST))
		return;
	for (uint16_t tag = 0; tag < m->q->depth; tag++) {
		if (!m->works[tag].told || !pu_deferred_outcome(m, tag, &result))
			continue;
		m->works[tag].told = m->works[tag].held = false;
		if (!failed_from_outside(m, tag))
			pu_work_finish(m, tag, result);
	}
}

static void release(struct pu_mapped *m, uint16_t tag)
{
	struct pu_work *w = &m->works[tag];

	if (--w->open == 0 && !w->queued)
		answer(m, tag);
}

static void resume_waiting(struct pu_mapped *m)
{
	while (m->nr_waiting && m->free_slot != m->nr_slots) {
		uint16_t tag = m->waiting[0];

		m->nr_waiting--;
		memmove(m->waiting, m->waiting + 1, m->nr_waiting * sizeof(*m->waiting));
		/* It stays half done, and for the policy it never ends. */
		if (failed_from_outside(m, tag))
			continue;
		m->works[tag].queued = false;
		pu_work_proceed(m, tag);
		if (m->works[tag].queued)
			return;
	}
}

static void complete(void *context, uint64_t user_data, int32_t result)
{
	struct pu_mapped *m = context;
	uint32_t number = (uint32_t)user_data;

	if (user_data >> PU_KIND_SHIFT == PU_KIND_PART) {
		struct pu_slot *slot = &m->slots[number];

		if (slot->orphan) {
			end_orphan(m, slot);
			return;
		}
		m->q->foreign_inflight--;
		if (slot->generation != pu_tag_generation(&m->q->tags[slot->tag])) {
			free_slot(m, slot);
			return;
		}
		/* Transient, says the kernel: resources were short. */
		advance(m, slot, result == -EAGAIN ? -EINTR : result);
		return;
	}
	m->q->foreign_inflight--;
	if (user_data >> PU_KIND_SHIFT == PU_KIND_UNREGISTER ||
	    pu_tag_state(&m->q->tags[number]) == PU_TAG_GONE)
		return;
	if (result < 0)
		m->works[number].unregistered = true;
	release(m, (uint16_t)number);
}

/* ---- serving ---- */

int pu_mapped_plan(struct pu_mapped *m, uint16_t tag, const struct pu_extent *parts, uint32_t count)
{
	struct pu_work *w = &m->works[tag];
	const struct pu_desc *desc = &m->q->desc[tag];
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT, sum = 0;
	bool changed = (desc->op_flags & 0xff) != PU_OP_READ;
	int error = pu_layout_check(m->layout, parts, count, length, changed);

	if (error)
		return error;
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
	int64_t limit = m->look_every_ns;

	if (!limit || !pu_queue_awaits(m->q) || (timeout_ns >= 0 && timeout_ns < limit))
		return timeout_ns;
	return m->look_at_ns ? limit : 0;
}

static void look(struct pu_mapped *m)
{
	if (m->turn_ns < m->look_at_ns)
		return;
	m->look_at_ns = m->turn_ns + m->look_every_ns;
	m->policy->look(m, m->turn_ns);
}

/* While the process is stopped, or kept from the processor, I/O that has ended cannot be seen to have.
 * So what lies between two turns counts for no more than a wait, and before anything is given up,
 * there were several. */
static void tick(struct pu_mapped *m)
{
	int64_t now = pu_now_ns(), since = now - m->turned_ns;

	m->turn_ns += since < m->look_every_ns ? since : m->look_every_ns;
	m->turned_ns = now;
}

int pu_mapped_turn(struct pu_mapped *m, int64_t timeout_ns)
{
	struct pu_queue *q = m->q;
	uint32_t need_plan = 0;
	int there;

	pu_take_up_files(m); /* one that cannot be is tried again by each request, which fails if it must */
	there = pu_queue_wait(q, limited(m, timeout_ns));
	if (there < 0)
		return there;
	if (m->look_every_ns)
		tick(m);
	for (uint32_t i = 0; i < q->nr_ready; i++) {
		uint16_t tag = q->ready[i];

		if (m->layout->kind == PU_LAYOUT_PER_REQUEST &&
		    (q->desc[tag].op_flags & 0xff) != PU_OP_FLUSH)
			q->ready[need_plan++] = tag;
		else
			start(m, tag);
	}
	finish_resolved(m);
	try_blocked(m);
	resume_waiting(m);
	if (m->look_every_ns)
		look(m);
	return (int)need_plan;
}
