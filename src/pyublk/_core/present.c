/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "present.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "deferred.h"
#include "work.h"

#define MOST_WISHES 256u
#define FETCH_BYTES (UINT64_C(1) << 20) /* the most in one wish */
/* What hits do not do: in a function with it, they would save registers for it. */
#define NOT_INLINE __attribute__((noinline))

/* What a write leaves out of its first or its last block, and copies up if that is absent. */
struct edge {
	uint64_t offset, length; /* on the disk; length 0: nothing */
	uint64_t cut; /* bytes that are being read */
	uint32_t open; /* reads under way */
	bool failed, written;
};

enum { HEAD, TAIL, EDGES };

/* What is to be known of a request that cannot be served at once. */
struct present_work {
	uint64_t first, end; /* the blocks that it touches */
	uint64_t since; /* failures from this number on are its own; 0: it wants nothing yet */
	uint32_t generation;
	bool known;   /* all of this is about the request of that generation; else nothing is set */
	bool edged;   /* it has edges */
	bool waiting; /* counted among those who wait for blocks */
	bool counted; /* in its regions */
	bool held;    /* the absent blocks among those that it touches */
	bool asked;   /* whether it may write */
	bool allowed; /* it may, whatever is said of its blocks */
	bool deferred; /* a flush that somebody else is to finish */
	struct edge edges[EDGES]; /* if it has some */
};

/* From the kernel, all of it: what is not used takes no memory, and most disks use little. */
struct present_queue {
	size_t bytes; /* with `works` */
	uint8_t *scratch; /* two blocks for each tag */
	size_t scratch_bytes;
	uint32_t nr_wishes, nr_told; /* in their order: who reads on is known by it */
	bool wake;
	struct pu_wish wishes[MOST_WISHES];
	struct present_work works[]; /* for each tag */
};

enum verdict { GO, WAIT, FAIL };

static struct present_queue *queue_of(const struct pu_mapped *m)
{
	return m->own;
}

static struct pu_presence *map_of(const struct pu_mapped *m)
{
	return (struct pu_presence *)(uintptr_t)m->context;
}

static void close_queue(struct pu_mapped *m)
{
	struct present_queue *pq = queue_of(m);

	if (!pq)
		return;
	for (uint32_t tag = 0; tag < m->q->depth; tag++)
		if (pq->works[tag].waiting)
			__atomic_fetch_sub(&map_of(m)->waiters, 1, __ATOMIC_SEQ_CST);
	if (pq->scratch)
		munmap(pq->scratch, pq->scratch_bytes);
	munmap(pq, pq->bytes);
	m->own = NULL;
}

static void *map_anonymous(size_t bytes)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return map == MAP_FAILED ? NULL : map;
}

static int open_queue(struct pu_mapped *m)
{
	size_t bytes = sizeof(struct present_queue) + m->q->depth * sizeof(struct present_work);
	struct present_queue *pq = map_anonymous(bytes);

	m->own = pq;
	if (!pq)
		return -ENOMEM;
	pq->bytes = bytes;
	pq->scratch_bytes = (size_t)m->q->depth * EDGES << map_of(m)->shift;
	pq->scratch = map_anonymous(pq->scratch_bytes);
	return pq->scratch ? 0 : -ENOMEM;
}

static uint8_t *scratch_of(const struct pu_mapped *m, uint16_t tag, int edge)
{
	return queue_of(m)->scratch + ((size_t)(tag * EDGES + edge) << map_of(m)->shift);
}

static struct pu_presence_counters *counters_of(const struct pu_mapped *m)
{
	return &map_of(m)->counters[m->q->id % PU_COUNTER_SHARDS];
}

static void count(uint64_t *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* ---- waiting ---- */

static void set_waiting(struct pu_mapped *m, struct present_work *l, bool waiting)
{
	if (l->waiting == waiting)
		return;
	l->waiting = waiting;
	if (waiting)
		__atomic_fetch_add(&map_of(m)->waiters, 1, __ATOMIC_SEQ_CST);
	else
		__atomic_fetch_sub(&map_of(m)->waiters, 1, __ATOMIC_SEQ_CST);
}

static void let_go(struct pu_mapped *m, struct present_work *l, bool present)
{
	if (!l->held)
		return;
	l->held = false;
	if (pu_presence_let_go(map_of(m), l->first, l->end, present)) {
		queue_of(m)->wake = true;
		m->to_tell = true;
	}
}

static void wish(struct pu_mapped *m, struct pu_wish wish)
{
	struct present_queue *pq = queue_of(m);

	pq->wishes[pq->nr_wishes++] = wish;
	m->to_tell = true;
}

/* All blocks of a range that are absent, and not held already, are to be fetched. */
static void wish_for(struct pu_mapped *m, uint64_t first, uint64_t end)
{
	struct present_queue *pq = queue_of(m);
	struct pu_presence *p = map_of(m);
	uint64_t most = FETCH_BYTES >> p->shift, blocks;

	for (uint64_t at = first;; at += blocks) {
		if (pq->nr_wishes == MOST_WISHES) { /* again, when these have been told */
			pq->wake = true;
			return;
		}
		blocks = pu_presence_claim(p, &at, end, most ? most : 1);
		if (!blocks)
			return;
		wish(m, (struct pu_wish){ .kind = PU_WISH_FETCH, .first = at, .end = at + blocks });
	}
}

/* Whether the blocks are there, when they must be fetched if they are not. */
static enum verdict fetched(struct pu_mapped *m, struct present_work *l, uint64_t first,
			    uint64_t end, int *error)
{
	struct pu_presence *p = map_of(m);

	if (pu_presence_has_all(p, first, end))
		return GO;
	if (!l->since)
		l->since = pu_presence_next_failure(p);
	*error = pu_presence_failure(p, l->since, first, end);
	if (*error)
		return FAIL;
	/* First: who lets go of a block later sees it. */
	set_waiting(m, l, true);
	wish_for(m, first, end);
	return pu_presence_has_all(p, first, end) ? GO : WAIT;
}

/* ---- requests that begin ---- */

static bool all_present(const struct pu_presence *p, const struct present_work *l)
{
	return pu_presence_has_all(p, l->first, l->end);
}

static enum verdict may_read(struct pu_mapped *m, struct present_work *l, int *error)
{
	const struct pu_presence *p = map_of(m);

	return p->bottom ? GO : fetched(m, l, l->first, l->end, error);
}

static enum verdict may_write_at_all(struct pu_mapped *m, uint16_t tag, struct present_work *l,
				     int *error)
{
	const struct pu_presence *p = map_of(m);

	if (l->allowed || pu_presence_is_writable(p, l->first, l->end))
		return GO;
	if (l->asked) {
		if (!pu_deferred_outcome(m, tag, error))
			return WAIT;
		l->asked = false;
		if (*error)
			return FAIL;
		if (p->writes_through) { /* each write asks, once */
			l->allowed = true;
			return GO;
		}
	}
	if (pu_presence_is_writable(p, l->first, l->end))
		return GO;
	if (queue_of(m)->nr_wishes == MOST_WISHES) {
		queue_of(m)->wake = true;
		return WAIT;
	}
	l->asked = true;
	wish(m, (struct pu_wish){ PU_WISH_WRITE, tag, l->generation, l->first, l->end });
	return WAIT;
}

/* What is left of a block from `at` to `end`, if that is absent. */
static struct edge edge_of(const struct pu_presence *p, uint64_t at, uint64_t end)
{
	if (at >= end || pu_presence_has(p, at >> p->shift))
		return (struct edge){ 0 };
	return (struct edge){ .offset = at, .length = end - at };
}

static void find_edges(const struct pu_mapped *m, uint16_t tag, struct present_work *l)
{
	const struct pu_presence *p = map_of(m);
	const struct pu_work *w = &m->works[tag];
	uint64_t size = pu_layout_size(m->layout), block_end = l->end << p->shift;

	l->edges[HEAD] = edge_of(p, l->first << p->shift, w->offset);
	l->edges[TAIL] = edge_of(p, w->offset + w->length, block_end < size ? block_end : size);
	l->edged = l->edges[HEAD].length || l->edges[TAIL].length;
}

static enum verdict may_write(struct pu_mapped *m, uint16_t tag, struct present_work *l, int *error)
{
	struct pu_presence *p = map_of(m);
	enum verdict verdict = may_write_at_all(m, tag, l, error);

	l->edged = false; /* whatever the last look found */
	if (verdict != GO || all_present(p, l))
		return verdict;
	if (!p->bottom) {
		find_edges(m, tag, l);
		if (l->edges[HEAD].length)
			verdict = fetched(m, l, l->first, l->first + 1, error);
		if (verdict != FAIL && l->edges[TAIL].length) {
			enum verdict tail = fetched(m, l, l->end - 1, l->end, error);

			verdict = tail == GO ? verdict : tail;
		}
		if (verdict != GO)
			return verdict;
	}
	if (!pu_presence_hold(p, l->first, l->end)) {
		set_waiting(m, l, true);
		if (!pu_presence_hold(p, l->first, l->end))
			return WAIT;
	}
	l->held = true;
	find_edges(m, tag, l); /* now that nobody else changes them */
	return GO;
}

/* After the last block that it touches. */
static uint64_t end_of(const struct pu_presence *p, const struct pu_work *w)
{
	return (w->offset + w->length + (UINT64_C(1) << p->shift) - 1) >> p->shift;
}

static void begin_anew(const struct pu_mapped *m, uint16_t tag, struct present_work *l)
{
	const struct pu_presence *p = map_of(m);
	const struct pu_work *w = &m->works[tag];

	memset(l, 0, offsetof(struct present_work, edges));
	l->known = true;
	l->generation = w->generation;
	l->first = w->offset >> p->shift;
	l->end = end_of(p, w);
}

/* It begins: what is known of its blocks is counted. */
static void note_use(struct pu_mapped *m, uint64_t first, uint64_t end, bool hit)
{
	struct pu_presence *p = map_of(m);

	count(hit ? &counters_of(m)->hits : &counters_of(m)->misses);
	if (p->touched)
		pu_presence_touch(p, first, end);
}

/* Reads and writes that need nothing of anybody: no more is kept of them, and none of what follows is
 * looked at when they end, but for their region. */
static bool begin_at_once(struct pu_mapped *m, const struct pu_work *w)
{
	struct pu_presence *p = map_of(m);
	uint64_t first = w->offset >> p->shift, end = end_of(p, w);
	bool reads = w->op == PU_OP_READ, present;

	if (!reads && (w->op != PU_OP_WRITE || p->writes_through))
		return false;
	if (p->evicts && !pu_regions_begin(&p->regions, w->offset, w->length))
		return false; /* it is found out once more */
	present = pu_presence_has_all(p, first, end);
	if (reads ? present || p->bottom : present && pu_presence_is_writable(p, first, end)) {
		note_use(m, first, end, present);
		return true;
	}
	if (p->evicts)
		pu_regions_end(&p->regions, w->offset, w->length);
	return false;
}

static NOT_INLINE bool admit_slowly(struct pu_mapped *m, uint16_t tag)
{
	struct pu_presence *p = map_of(m);
	struct pu_work *w = &m->works[tag];
	struct present_work *l = &queue_of(m)->works[tag];
	enum verdict verdict;
	int error = 0;

	/* What a request holds that was failed from outside stays held: its operations may still be
	 * under way. */
	if (!l->known || l->generation != w->generation) {
		set_waiting(m, l, false);
		begin_anew(m, tag, l);
	}
	if (w->op == PU_OP_FLUSH) {
		l->deferred = p->always_deferred || !pu_presence_is_synced(p);
		return true;
	}
	if (w->op == PU_OP_DISCARD)
		w->op = PU_OP_WRITE_ZEROES;
	if (p->evicts && !pu_regions_begin(&p->regions, w->offset, w->length))
		return false; /* who blocks the region wakes all queues */
	l->counted = p->evicts;
	verdict = w->op == PU_OP_READ ? may_read(m, l, &error) : may_write(m, tag, l, &error);
	if (verdict == GO) {
		set_waiting(m, l, false);
		note_use(m, l->first, l->end, !l->since && (!p->bottom || all_present(p, l)));
		return true;
	}
	if (l->counted)
		pu_regions_end(&p->regions, w->offset, w->length);
	l->counted = false;
	if (verdict == FAIL)
		pu_work_finish(m, tag, error);
	return false;
}

static bool admit(struct pu_mapped *m, uint16_t tag)
{
	if (!queue_of(m)->works[tag].known && begin_at_once(m, &m->works[tag]))
		return true;
	return admit_slowly(m, tag);
}

static void begin_again(struct pu_mapped *m, uint16_t tag)
{
	struct present_work *l = &queue_of(m)->works[tag];

	for (int i = 0; l->edged && i < EDGES; i++)
		l->edges[i] = (struct edge){ .offset = l->edges[i].offset,
					     .length = l->edges[i].length };
}

/* ---- their parts ---- */

static enum pu_cut read_part(struct pu_mapped *m, struct pu_work *w, struct pu_part *part)
{
	if (w->cut == w->length)
		return PU_NO_PART;
	if (!pu_presence_part(map_of(m), w->offset + w->cut, w->length - w->cut, part)) {
		w->error = -EIO;
		return PU_NO_PART;
	}
	part->data = w->cut;
	w->cut += part->length;
	return w->cut == w->length ? PU_LAST_PART : PU_PART;
}

/* The next piece of an edge, read from below all that is in the upper file. */
static bool read_edge(struct pu_mapped *m, uint16_t tag, int number, struct pu_part *part)
{
	struct edge *edge = &queue_of(m)->works[tag].edges[number];

	if (edge->cut == edge->length || edge->failed)
		return false;
	if (!pu_presence_part(map_of(m), edge->offset + edge->cut, edge->length - edge->cut, part)) {
		m->works[tag].error = -EIO;
		edge->failed = true;
		return false;
	}
	part->own = scratch_of(m, tag, number) + edge->cut;
	part->own_write = false;
	part->data = 0;
	edge->cut += part->length;
	edge->open++;
	return true;
}

static bool write_edge(struct pu_mapped *m, uint16_t tag, int number, struct pu_part *part)
{
	struct edge *edge = &queue_of(m)->works[tag].edges[number];

	if (!edge->length || edge->cut < edge->length || edge->open || edge->failed || edge->written)
		return false;
	edge->written = true;
	*part = (struct pu_part){
		.offset = edge->offset,
		.length = edge->length,
		.first = edge->length,
		.own = scratch_of(m, tag, number),
		.own_write = true,
	};
	count(&counters_of(m)->copy_ups);
	return true;
}

static enum pu_cut write_part(struct pu_mapped *m, uint16_t tag, struct pu_part *part)
{
	const struct present_work *l = &queue_of(m)->works[tag];
	struct pu_work *w = &m->works[tag];

	if (!w->cut) {
		w->cut = 1; /* it is with a slot */
		*part = (struct pu_part){ .offset = w->offset, .length = w->length, .first = w->length };
		return l->edged ? PU_PART : PU_LAST_PART;
	}
	for (int i = 0; l->edged && i < EDGES; i++)
		if (read_edge(m, tag, i, part) || write_edge(m, tag, i, part))
			return PU_PART;
	return PU_NO_PART;
}

/* Of the upper file only, and not if who finishes it syncs that anyway. */
static enum pu_cut flush_part(struct pu_mapped *m, uint16_t tag, struct pu_part *part)
{
	struct pu_work *w = &m->works[tag];

	if (w->cut || queue_of(m)->works[tag].deferred)
		return PU_NO_PART;
	w->cut = 1;
	*part = (struct pu_part){ 0 };
	return PU_LAST_PART;
}

static enum pu_cut next_part(struct pu_mapped *m, uint16_t tag, struct pu_part *part)
{
	struct pu_work *w = &m->works[tag];

	if (w->op == PU_OP_READ)
		return read_part(m, w, part);
	return w->op == PU_OP_FLUSH ? flush_part(m, tag, part) : write_part(m, tag, part);
}

static void part_ended(struct pu_mapped *m, struct pu_slot *slot, int64_t result)
{
	uint16_t tag = slot->tag;
	struct pu_work *w = &m->works[tag];
	struct edge *edge;

	if (result < 0 && !w->error)
		w->error = (int)result;
	if (!slot->part.own || slot->part.own_write)
		return;
	edge = &queue_of(m)->works[tag].edges[slot->part.own < scratch_of(m, tag, TAIL) ? HEAD : TAIL];
	edge->open--;
	if (result < 0)
		edge->failed = true;
	else if (edge->cut == edge->length && !edge->open)
		pu_work_proceed(m, tag);
}

/* ---- their ends ---- */

static NOT_INLINE void answer_slowly(struct pu_mapped *m, uint16_t tag)
{
	struct present_work *l = &queue_of(m)->works[tag];
	struct pu_work *w = &m->works[tag];
	bool writes = w->op == PU_OP_WRITE || w->op == PU_OP_WRITE_ZEROES;

	let_go(m, l, !w->error);
	if (!w->error && (l->deferred || (writes && map_of(m)->writes_through)))
		pu_defer(m, tag);
	else
		pu_work_finish(m, tag, w->error);
}

static void answer(struct pu_mapped *m, uint16_t tag)
{
	if (queue_of(m)->works[tag].known)
		answer_slowly(m, tag);
	else
		pu_work_finish(m, tag, m->works[tag].error);
}

static NOT_INLINE void finished_slowly(struct pu_mapped *m, uint16_t tag)
{
	struct present_work *l = &queue_of(m)->works[tag];
	const struct pu_work *w = &m->works[tag];

	let_go(m, l, false);
	set_waiting(m, l, false);
	if (l->counted)
		pu_regions_end(&map_of(m)->regions, w->offset, w->length);
	l->counted = l->edged = l->known = false;
}

static void finished(struct pu_mapped *m, uint16_t tag)
{
	struct pu_presence *p = map_of(m);
	const struct pu_work *w = &m->works[tag];

	if (queue_of(m)->works[tag].known)
		finished_slowly(m, tag);
	else if (p->evicts)
		pu_regions_end(&p->regions, w->offset, w->length);
}

/* ---- what others are told ---- */

bool pu_present_next_wish(struct pu_mapped *m, struct pu_wish *wish)
{
	struct present_queue *pq = queue_of(m);

	if (pq->nr_told == pq->nr_wishes) {
		pq->nr_told = pq->nr_wishes = 0;
		return false;
	}
	*wish = pq->wishes[pq->nr_told++];
	return true;
}

bool pu_present_take_wake(struct pu_mapped *m)
{
	bool wake = queue_of(m)->wake;

	queue_of(m)->wake = false;
	return wake;
}

static const struct pu_policy_functions functions = {
	.open = open_queue,
	.close = close_queue,
	.admit = admit,
	.begin_again = begin_again,
	.next_part = next_part,
	.part_ended = part_ended,
	.answer = answer,
	.finished = finished,
};

/* A write's own part, and its edges. */
const struct pu_policy *pu_present(struct pu_presence *presence)
{
	presence->policy.functions = &functions;
	presence->policy.slots_per_tag = 3;
	return &presence->policy;
}
