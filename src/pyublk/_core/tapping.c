/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "tapping.h"

#include <stdlib.h>
#include <sys/mman.h>

#define LOOKS 100000 /* at an owner that is at the trace, which is for as long as a record takes */

#define HISTOGRAMS (2 * sizeof(struct pu_histogram))

/* The histograms are memory that nobody has touched, until there are requests. */
int pu_taps_open(struct pu_queue *q)
{
	void *map = mmap(NULL, HISTOGRAMS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (map == MAP_FAILED)
		return -ENOMEM;
	q->taps.histogram = map;
	q->taps.others = q->taps.histogram + 1;
	q->taps.answered = calloc(q->depth, sizeof(*q->taps.answered));
	return q->taps.answered ? 0 : -ENOMEM;
}

void pu_taps_close(struct pu_queue *q)
{
	if (q->taps.histogram)
		munmap(q->taps.histogram, HISTOGRAMS);
	free(q->taps.answered);
	q->taps.histogram = NULL;
	q->taps.answered = NULL;
}

/* Whoever takes the trace away waits until at_trace is false: so either it sees that we are there, or we
 * see that the trace is gone. */
static struct pu_trace *come_to_trace(struct pu_queue *q)
{
	__atomic_store_n(&q->taps.at_trace, true, __ATOMIC_SEQ_CST);
	return __atomic_load_n(&q->taps.trace, __ATOMIC_SEQ_CST);
}

static void leave_trace(struct pu_queue *q)
{
	__atomic_store_n(&q->taps.at_trace, false, __ATOMIC_RELEASE);
}

void pu_taps_arrive(struct pu_queue *q, uint16_t tag)
{
	struct pu_trace *trace = come_to_trace(q);

	if (trace)
		pu_trace_put(trace, PU_TRACE_QUEUED, &q->desc[tag], q->taps.now, 0);
	leave_trace(q);
}

void pu_taps_issue(struct pu_queue *q, uint16_t tag)
{
	struct pu_trace *trace = come_to_trace(q);

	if (trace && q->tags[tag].arrived >= trace->began)
		pu_trace_put(trace, PU_TRACE_ISSUED, &q->desc[tag], q->taps.now, 0);
	leave_trace(q);
}

void pu_taps_list(struct pu_queue *q, uint16_t tag, int32_t value)
{
	struct pu_trace *trace = come_to_trace(q);

	if (trace && q->tags[tag].arrived >= trace->began)
		pu_trace_put(trace, PU_TRACE_COMPLETED, &q->desc[tag], pu_now_ns(), value);
	leave_trace(q);
	q->taps.answered[q->taps.nr_answered++] = tag;
}

static void count(struct pu_taps *taps, uint32_t operation, uint32_t bucket, int64_t ns,
		  uint32_t requests)
{
	uint32_t there = taps->nr_first;

	if (requests > PU_FIRST_LATENCIES - there) {
		pu_histogram_add(taps->histogram, operation, bucket, ns, requests);
		return;
	}
	for (uint32_t i = there; i < there + requests; i++)
		__atomic_store_n(&taps->first[i], operation << 8 | bucket, __ATOMIC_RELAXED);
	pu_count(&taps->first_ns[operation], (uint64_t)ns * requests);
	__atomic_store_n(&taps->nr_first, there + requests, __ATOMIC_RELEASE);
}

static void read_first(const struct pu_taps *taps, struct pu_histogram *sum)
{
	uint32_t there = __atomic_load_n(&taps->nr_first, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < there; i++) {
		uint16_t first = __atomic_load_n(&taps->first[i], __ATOMIC_RELAXED);

		sum->counts[first >> 8][first & 0xff]++;
	}
	for (uint32_t operation = 0; operation < PU_OPERATIONS; operation++)
		sum->total_ns[operation] +=
			__atomic_load_n(&taps->first_ns[operation], __ATOMIC_RELAXED);
}

/* Returns the time, if it had to look at it. */
static int64_t count_at_once(struct pu_taps *taps)
{
	uint32_t bucket = 0;
	int64_t now = 0;

	for (uint32_t operation = 0; operation < PU_OPERATIONS; operation++) {
		uint32_t requests = taps->answered_at_once[operation];

		if (!requests)
			continue;
		if (!now) {
			now = pu_now_ns();
			bucket = pu_histogram_bucket(now - taps->now);
		}
		taps->answered_at_once[operation] = 0;
		count(taps, operation, bucket, now - taps->now, requests);
	}
	return now;
}

/* Those that came together are mostly answered together: a bucket is found once for them. */
static void count_listed(struct pu_queue *q, int64_t now)
{
	struct pu_taps *taps = &q->taps;
	int64_t arrived = now;
	uint32_t bucket = 0;

	for (uint32_t i = 0; i < taps->nr_answered; i++) {
		const struct pu_tag *t = &q->tags[taps->answered[i]];

		if (t->arrived != arrived) {
			arrived = t->arrived;
			bucket = pu_histogram_bucket(now - arrived);
		}
		count(taps, t->operation, bucket, now - arrived, 1);
	}
	taps->nr_answered = 0;
}

void pu_taps_flush(struct pu_queue *q)
{
	int64_t now = count_at_once(&q->taps);

	if (q->taps.nr_answered)
		count_listed(q, now ? now : pu_now_ns());
}

struct pu_posted pu_taps_before_post(const struct pu_queue *q, uint16_t tag)
{
	const struct pu_tag *t = &q->tags[tag];

	return (struct pu_posted){ q->desc[tag], t->arrived, pu_now_ns(), t->operation };
}

void pu_taps_post(struct pu_queue *q, const struct pu_posted *posted, int32_t value)
{
	struct pu_trace *trace = q->taps.trace;
	int64_t ns = posted->now - posted->arrived;

	pu_histogram_add(q->taps.others, posted->operation, pu_histogram_bucket(ns), ns, 1);
	if (trace && posted->arrived >= trace->began)
		pu_trace_put(trace, PU_TRACE_COMPLETED, &posted->desc, posted->now, value);
}

void pu_taps_arm(struct pu_queue *q)
{
	bool armed = __atomic_load_n(&q->taps.trace, __ATOMIC_ACQUIRE) ||
		     __atomic_load_n(&q->taps.gate, __ATOMIC_ACQUIRE);

	__atomic_store_n(&q->taps.armed, armed, __ATOMIC_RELEASE);
}

bool pu_taps_trace(struct pu_queue *q, struct pu_trace *trace)
{
	uint32_t looks = LOOKS;

	pthread_mutex_lock(&q->inbox_lock); /* other threads are at the trace only with it */
	__atomic_store_n(&q->taps.trace, trace, __ATOMIC_SEQ_CST);
	pu_taps_arm(q);
	pthread_mutex_unlock(&q->inbox_lock);
	while (__atomic_load_n(&q->taps.at_trace, __ATOMIC_SEQ_CST)) {
		if (!looks--)
			return false;
		nanosleep(&(struct timespec){ 0, 20000 }, NULL);
	}
	return true;
}

void pu_taps_read(const struct pu_queue *q, struct pu_histogram *sum)
{
	if (!q->taps.histogram)
		return;
	read_first(&q->taps, sum);
	pu_histogram_read(q->taps.histogram, sum);
	pu_histogram_read(q->taps.others, sum);
}
