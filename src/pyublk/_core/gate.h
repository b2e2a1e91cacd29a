/* SPDX-License-Identifier: MIT
 * What a disk's rules (rule.h) do to the requests of its queues
 *
 * A request meets the rules when it arrives. It goes to the target, perhaps changed; or it is answered
 * on the spot; or it is kept until a time, or until somebody releases it. A request that is kept is
 * held as one that a handler has: a stop fails it, and a swap waits for it. Nobody sleeps meanwhile: a
 * timer in the ring ends the queue's wait when the first of them is due.
 *
 * Descriptors are the kernel's, and cannot be written: a queue whose rules change requests looks at
 * copies of them from then on.
 */
#ifndef PU_GATE_H
#define PU_GATE_H

#include <stdbool.h>
#include <stdint.h>

#include "rules.h"

/* What becomes of a request; else, 0 or -errno, its answer. */
enum { PU_GATE_SERVE = 1, PU_GATE_KEEP = 2 };

struct pu_kept { /* what is known of a tag's request */
	uint32_t generation;
	uint32_t sectors; /* that it has, when its descriptor says something else; else 0 */
	int32_t verdict;  /* once it goes on */
	uint32_t place;	  /* in the heap, counted from 1; 0: it is not kept */
	int64_t due_ns;	  /* PU_UNTIL_RELEASED: never by itself */
	uint64_t change;   /* the last one of the rules that it met */
	struct pu_rule *holder;
	struct pu_rule *at_end; /* ROT: what is done to a read's data */
	struct pu_rule *past;	/* STALE: whose past it is a part of, or (stale) is to have */
	bool stale;
};

struct pu_gate {
	struct pu_rules *rules;
	struct pu_queue *q;
	struct pu_gate *next; /* of the same rules */
	uint64_t seen;	      /* of the rules' changes */
	struct pu_kept *kept; /* for each tag; NULL until there is a rule */
	uint16_t *heap;	      /* tags that are kept, the first one due at its top */
	uint32_t nr_kept;
	uint32_t nr_changed;	    /* requests at the target that are not as the kernel has them */
	const struct pu_desc *kernels; /* the kernel's descriptors; NULL: q->desc is */
	bool timing;		    /* the ring runs a timer */
	int64_t timer_ns;	    /* that ends then */
	int64_t timer[2];	    /* a __kernel_timespec */
};

/* 0 or -ENOMEM: q->gate. Owner thread only, as all that follows. */
int pu_gate_open(struct pu_queue *q, struct pu_rules *rules);
/* No rule reaches it any more. */
void pu_gate_close(struct pu_queue *q);
/* The kernel's descriptors are no more. 0 or -errno. [any thread] */
int pu_gate_leave_device(struct pu_queue *q);
void pu_gate_free(struct pu_queue *q);

/* A request is about to be looked at: brings its descriptor. */
void pu_gate_see(struct pu_queue *q, uint16_t tag);
/* A request that has arrived, and is owned. */
int32_t pu_gate_arrive(struct pu_queue *q, uint16_t tag);
/* The next request that is not kept any more, or -1; *verdict as above, but never to keep it. */
int32_t pu_gate_next(struct pu_queue *q, int32_t *verdict);
/* Before a wait: sets the timer. Returns how long it may last. */
int64_t pu_gate_before_wait(struct pu_queue *q, int64_t timeout_ns);
void pu_gate_timer_ended(struct pu_queue *q);
/* The target's answer, as the kernel is to have it. Of a request that is claimed. */
int32_t pu_gate_settle(struct pu_queue *q, uint16_t tag, int32_t value);
/* Nanoseconds until the first of what is kept goes on: 0 now, -1 not by itself. */
int64_t pu_gate_due(const struct pu_queue *q);
/* How many requests are kept. */
uint32_t pu_gate_kept(const struct pu_queue *q);

#endif
