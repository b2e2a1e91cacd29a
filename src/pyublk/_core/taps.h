/* SPDX-License-Identifier: MIT
 * What a queue does to its requests, or tells of them, whatever serves them: the state
 *
 * A request passes two places. Where it arrives, its time is kept, and if anybody asked for more
 * (`armed`), it goes another way: a trace records it, a gate may keep it. Where it is answered,
 * it is counted, by its kind, if it came with the last batch, since all of these take as long; what
 * came before, or is recorded, is put on a list. Just before the answers go to the kernel the clock
 * is read, once for all, and they go into the histogram. The functions are in tapping.h.
 */
#ifndef PU_TAPS_H
#define PU_TAPS_H

#include <stdbool.h>
#include <stdint.h>

#include "histogram.h"
#include "trace.h"

/* The page of a histogram is more than all else that a disk has which is only looked at by partition
 * scans. So the first latencies are in the queue itself, as buckets. */
#define PU_FIRST_LATENCIES 128u

struct pu_gate;

struct pu_taps {
	int64_t now;	   /* ns, CLOCK_MONOTONIC: when the last batch arrived */
	int64_t countable; /* what arrived then is only counted; -1: nothing is */
	uint32_t answered_at_once[PU_OPERATIONS]; /* of these, since the last look at the clock */
	uint32_t nr_answered;
	uint16_t *answered; /* and the tags of the others */
	uint32_t nr_first;
	uint16_t first[PU_FIRST_LATENCIES]; /* operation << 8 | bucket */
	uint64_t first_ns[PU_OPERATIONS];
	struct pu_histogram *histogram;	 /* what the owner answered later */
	struct pu_histogram *others;	 /* what other threads did; guarded by inbox_lock */
	bool armed;		/* there is a trace, or the gate has something to do */
	bool at_trace;		/* the owner looks at it */
	struct pu_trace *trace; /* set by other threads */
	struct pu_gate *gate;	/* likewise; the queue's, or NULL: it has nothing to do */
};

#endif
