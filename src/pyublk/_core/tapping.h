/* SPDX-License-Identifier: MIT
 * The taps of a queue: where its requests pass (taps.h has the state)
 */
#ifndef PU_TAPPING_H
#define PU_TAPPING_H

#include "queue.h"

/* 0 or -ENOMEM; pu_taps_close in either case. */
int pu_taps_open(struct pu_queue *q);
void pu_taps_close(struct pu_queue *q);

/* Whether the gate has something to do. */
static inline bool pu_taps_gated(const struct pu_queue *q)
{
	return __atomic_load_n(&q->taps.gate, __ATOMIC_ACQUIRE);
}

/* Before the requests that a wait has brought are taken. */
static inline void pu_taps_begin_batch(struct pu_queue *q)
{
	struct pu_taps *taps = &q->taps;

	taps->now = pu_now_ns();
	taps->countable = __atomic_load_n(&taps->armed, __ATOMIC_RELAXED) ? -1 : taps->now;
}

/* A request is there, and somebody wants to see it. Owner thread only. */
void pu_taps_arrive(struct pu_queue *q, uint16_t tag);
/* It goes to its target. Owner thread only. */
void pu_taps_issue(struct pu_queue *q, uint16_t tag);

/* Of a request that did not come with the last batch, or is watched. */
void pu_taps_list(struct pu_queue *q, uint16_t tag, int32_t value);

/* A request is answered, by the owner. Returns what the kernel is told. */
PU_ALWAYS_INLINE int32_t pu_taps_answer(struct pu_queue *q, uint16_t tag, int32_t value)
{
	const struct pu_tag *t = &q->tags[tag];

	if (__builtin_expect(t->arrived == q->taps.countable, 1)) {
		q->taps.answered_at_once[t->operation]++;
		return value;
	}
	if (pu_taps_gated(q))
		value = pu_gate_settle(q, tag, value);
	pu_taps_list(q, tag, value);
	return value;
}

/* What was answered goes to the kernel now. */
void pu_taps_flush(struct pu_queue *q);

/* A request that another thread answers: what there is to say of it, while it is that thread's. */
struct pu_posted {
	struct pu_desc desc;
	int64_t arrived, now;
	uint8_t operation;
};

struct pu_posted pu_taps_before_post(const struct pu_queue *q, uint16_t tag);
/* The kernel has the answer. With inbox_lock. */
void pu_taps_post(struct pu_queue *q, const struct pu_posted *posted, int32_t value);

/* Says again whether anybody wants to see requests, after a change of that. [any thread] */
void pu_taps_arm(struct pu_queue *q);

/* Records requests from now on, until another trace, or NULL, takes this one's place: when this
 * returns true, nobody writes to the one before any more. False: the owner has not come out of it,
 * so that its memory must stay for ever. [any thread] */
bool pu_taps_trace(struct pu_queue *q, struct pu_trace *trace);

/* What the queue has measured so far, added to `sum`. [any thread] */
void pu_taps_read(const struct pu_queue *q, struct pu_histogram *sum);

#endif
