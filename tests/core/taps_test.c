/* SPDX-License-Identifier: MIT
 * What a queue measures and records of its requests, in loopback.
 */
#define _GNU_SOURCE
#include "answer.h"
#include "loopback.h"
#include "open.h"
#include "tapping.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

#include "check.h"

#define DEPTH 8

static void open_queue(struct pu_queue *q)
{
	struct pu_queue_options options = { .depth = DEPTH, .buffer_bytes = 4096 };

	CHECK_EQUAL(pu_queue_open(q, -1, &options), 0);
	CHECK_EQUAL(pu_queue_fetch(q), 0);
}

static int64_t handle(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
		      void *buffer)
{
	(void)context, (void)op, (void)flags, (void)offset, (void)length, (void)buffer;
	return 0;
}

static uint64_t count_of(const struct pu_queue *q, uint32_t operation)
{
	static struct pu_histogram sum;
	uint64_t count = 0;

	memset(&sum, 0, sizeof(sum));
	pu_taps_read(q, &sum);
	for (uint32_t bucket = 0; bucket < PU_BUCKETS; bucket++)
		count += sum.counts[operation][bucket];
	CHECK(!count == !sum.total_ns[operation]);
	return count;
}

static void serve_all(struct pu_queue *q, uint32_t op)
{
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		CHECK_EQUAL(pu_loopback_inject(q, tag, op, tag, 1), 0);
	CHECK_EQUAL(pu_queue_serve(q, handle, NULL, false), 0);
}

static void each_request_counts_once(void)
{
	struct pu_queue q;

	open_queue(&q);
	for (uint64_t round = 1; round <= 100; round++) { /* many more than the first ones */
		serve_all(&q, PU_OP_WRITE);
		CHECK_EQUAL(count_of(&q, PU_WRITES), round * DEPTH);
	}
	serve_all(&q, PU_OP_FLUSH);
	CHECK_EQUAL(count_of(&q, PU_FLUSHES), DEPTH);
	CHECK_EQUAL(count_of(&q, PU_READS), 0);
	CHECK_EQUAL(q.taps.nr_first, PU_FIRST_LATENCIES);
	pu_queue_close(&q);
	CHECK_EQUAL(count_of(&q, PU_WRITES), 100 * DEPTH);
	pu_queue_free(&q);
}

/* What is answered in a later round counts from its arrival, and is counted before anybody sees its
 * answer. */
static void late_answers_take_longer(void)
{
	struct pu_histogram sum = { 0 };
	struct pu_queue q;

	open_queue(&q);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
	CHECK_EQUAL(pu_loopback_inject(&q, 1, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(count_of(&q, PU_READS), 1);
	pu_taps_read(&q, &sum);
	CHECK(sum.total_ns[PU_READS] >= 2000000);
	CHECK_EQUAL(pu_queue_post(&q, 1, 1, -EIO), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(count_of(&q, PU_READS), 2);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

static void what_arrived_before_has_no_record(void)
{
	struct pu_trace trace;
	struct pu_queue q;

	open_queue(&q);
	CHECK_EQUAL(pu_trace_open(&trace, 3 * sizeof(*trace.records)), 0);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	trace.began = pu_now_ns();
	CHECK(pu_taps_trace(&q, &trace));
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(pu_trace_kept(&trace), 0);
	for (int round = 0; round < 2; round++) {
		CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_DISCARD | PU_FLAG_FUA, 24, 8), 0);
		CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
		CHECK_EQUAL(pu_queue_answer(&q, 0, -ENOSPC), 0);
	}
	CHECK(pu_taps_trace(&q, NULL));
	CHECK(!q.taps.armed);
	CHECK_EQUAL(pu_trace_kept(&trace), 3);
	CHECK_EQUAL(pu_trace_lost(&trace), 3);
	CHECK_EQUAL(trace.records[2].sector, 24);
	CHECK_EQUAL(trace.records[2].bytes, 4096);
	CHECK_EQUAL(trace.records[2].error, ENOSPC);
	CHECK_EQUAL(trace.records[2].action & 0xffff, PU_TRACE_COMPLETED);
	CHECK_EQUAL(count_of(&q, PU_DISCARDS), 2);
	pu_trace_close(&trace);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

struct owner {
	struct pu_queue queue;
	pthread_barrier_t open;
	bool over;
	uint64_t rounds;
};

static void *serve_until_over(void *argument)
{
	struct owner *owner = argument;

	open_queue(&owner->queue);
	pthread_barrier_wait(&owner->open);
	while (!__atomic_load_n(&owner->over, __ATOMIC_RELAXED)) {
		serve_all(&owner->queue, PU_OP_READ);
		owner->rounds++;
	}
	return NULL;
}

/* Nobody writes to a trace that was taken away: its memory is freed at once. */
static void traces_come_and_go(void)
{
	static struct owner owner;
	struct pu_queue *q = &owner.queue;
	struct pu_trace trace;
	pthread_t thread;

	CHECK_EQUAL(pthread_barrier_init(&owner.open, NULL, 2), 0);
	CHECK_EQUAL(pthread_create(&thread, NULL, serve_until_over, &owner), 0);
	pthread_barrier_wait(&owner.open);
	for (int i = 0; i < 100; i++) {
		CHECK_EQUAL(pu_trace_open(&trace, 64 * sizeof(*trace.records)), 0);
		trace.began = pu_now_ns();
		CHECK(pu_taps_trace(q, &trace));
		while (!pu_trace_kept(&trace))
			nanosleep(&(struct timespec){ 0, 10000 }, NULL);
		CHECK(pu_taps_trace(q, NULL));
		for (uint64_t record = 0; record < pu_trace_kept(&trace); record++)
			CHECK_EQUAL(trace.records[record].sequence, record);
		pu_trace_close(&trace);
	}
	__atomic_store_n(&owner.over, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	pthread_barrier_destroy(&owner.open);
	CHECK_EQUAL(count_of(q, PU_READS), owner.rounds * DEPTH);
	pu_queue_close(q);
	pu_queue_free(q);
}

int main(void)
{
	each_request_counts_once();
	late_answers_take_longer();
	what_arrived_before_has_no_record();
	traces_come_and_go();
	return 0;
}
