/* SPDX-License-Identifier: MIT
 * The queue's state machine in loopback: everything but the kernel.
 */
#define _GNU_SOURCE
#include "answer.h"
#include "copy.h"
#include "loopback.h"
#include "open.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"

#define DEPTH 8

static int open_queue(struct pu_queue *q, int cdev, uint16_t id)
{
	struct pu_queue_options options = { .id = id, .depth = DEPTH, .buffer_bytes = 4096 };

	return pu_queue_open(q, cdev, &options);
}

static int64_t fail_odd_sectors(void *context, uint32_t op, uint32_t flags, uint64_t offset,
				uint64_t length, void *buffer)
{
	uint64_t *calls = context;

	(void)flags;
	++*calls;
	if (op == PU_OP_READ)
		memset(buffer, (int)(offset >> 9), length);
	return offset >> 9 & 1 ? -ENOSPC : 0;
}

static void every_request_is_answered_once(void)
{
	struct pu_queue q;
	struct pu_counters counters;
	uint64_t calls = 0;

	CHECK_EQUAL(open_queue(&q, -1, 3), 0);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), -EINVAL); /* not fetched */
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	for (int round = 0; round < 100; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(&q, tag, PU_OP_READ, tag, 2), 0);
		CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 2), -EINVAL); /* still ours */
		CHECK_EQUAL(pu_queue_serve(&q, fail_odd_sectors, &calls, false), 0);
		for (uint16_t tag = 0; tag < DEPTH; tag++) {
			uint8_t *buffer = pu_queue_next_buffer(&q, tag);

			CHECK_EQUAL(pu_tag_state(&q.tags[tag]), PU_TAG_FETCHING);
			CHECK_EQUAL(pu_loopback_result(&q, tag), tag & 1 ? -ENOSPC : 1024);
			CHECK_EQUAL(pu_tag_generation(&q.tags[tag]), (uint32_t)round + 1);
			CHECK_EQUAL(buffer[0], tag);
			CHECK_EQUAL(buffer[1023], tag);
		}
	}
	pu_queue_counters(&q, &counters);
	CHECK_EQUAL(calls, 100 * DEPTH);
	CHECK_EQUAL(counters.requests[PU_OP_READ], 100 * DEPTH);
	CHECK_EQUAL(counters.bytes[PU_OP_READ], 100 * DEPTH * 1024);
	CHECK_EQUAL(counters.errors, 100 * DEPTH / 2);
	CHECK_EQUAL(counters.largest_batch, DEPTH);
	pu_queue_close(&q);
	CHECK(!pu_queue_holds(&q, 0, 100)); /* late readers still may ask */
	pu_queue_free(&q);
}

static void a_second_answer_is_refused(void)
{
	struct pu_queue q;

	CHECK_EQUAL(open_queue(&q, -1, 0), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), -EALREADY);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_FLUSH, 0, 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	CHECK(pu_queue_holds(&q, 0, 1));
	CHECK_EQUAL(pu_queue_post(&q, 0, 1, -EIO), 0);
	CHECK(!pu_queue_holds(&q, 0, 1));
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), -EALREADY);
	CHECK_EQUAL(pu_queue_post(&q, 0, 1, 0), -EALREADY);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0); /* reads the post */
	CHECK_EQUAL(pu_loopback_result(&q, 0), -EIO);
	CHECK_EQUAL(q.owned, 0);
	/* an errno that is none becomes EIO, a flush has no length */
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_FLUSH, 0, 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	CHECK_EQUAL(pu_queue_post(&q, 0, 1, 0), -EALREADY); /* late: not for this request */
	CHECK_EQUAL(pu_queue_answer(&q, 0, -100000), 0);
	CHECK_EQUAL(pu_loopback_result(&q, 0), -EIO);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

static void what_is_left_comes_first_and_once(void)
{
	struct pu_queue q;
	struct pu_counters counters;

	CHECK_EQUAL(open_queue(&q, -1, 0), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	for (uint16_t tag = 0; tag < 4; tag++)
		CHECK_EQUAL(pu_loopback_inject(&q, tag, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 4);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(pu_queue_post(&q, 2, 1, -EIO), 0); /* from outside: not left */
	pu_queue_carry_over(&q, 1);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 3);
	CHECK_EQUAL(q.ready[0], 1);
	CHECK_EQUAL(q.ready[1], 3);
	CHECK_EQUAL(q.ready[2], 0);
	/* a tag that is there twice, its first request failed and its second arrived, is left once */
	q.ready[q.nr_ready++] = 3;
	pu_queue_carry_over(&q, 1);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 2);
	CHECK_EQUAL(q.ready[0], 3);
	CHECK_EQUAL(q.ready[1], 0);
	pu_queue_carry_over(&q, 2);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	pu_queue_counters(&q, &counters);
	CHECK_EQUAL(counters.requests[PU_OP_READ], 5);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

struct poster {
	struct pu_queue *queue;
	pthread_barrier_t start;
	uint32_t generation;
	unsigned won;
};

static void *post_all(void *argument)
{
	struct poster *poster = argument;

	pthread_barrier_wait(&poster->start);
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		if (pu_queue_post(poster->queue, tag, poster->generation, 0) == 0)
			__atomic_add_fetch(&poster->won, 1, __ATOMIC_RELAXED);
	return NULL;
}

static void threads_race_to_answer_and_one_wins(void)
{
	struct pu_queue q;
	pthread_t threads[3];

	CHECK_EQUAL(open_queue(&q, -1, 0), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	for (int round = 0; round < 50; round++) {
		struct poster poster = { .queue = &q, .generation = (uint32_t)round + 1 };

		pthread_barrier_init(&poster.start, NULL, 3);
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(&q, tag, PU_OP_WRITE, 0, 8), 0);
		CHECK_EQUAL(pu_queue_wait(&q, 0), DEPTH);
		for (int i = 0; i < 3; i++)
			CHECK_EQUAL(pthread_create(&threads[i], NULL, post_all, &poster), 0);
		while (q.owned)
			CHECK(pu_queue_wait(&q, 5000000000) >= 0);
		for (int i = 0; i < 3; i++)
			pthread_join(threads[i], NULL);
		CHECK_EQUAL(poster.won, DEPTH);
		pthread_barrier_destroy(&poster.start);
	}
	pu_queue_close(&q);
	pu_queue_wake(&q); /* late callers are harmless */
	pu_queue_free(&q);
}

static void held_requests_can_be_failed_from_outside(void)
{
	struct pu_queue q;

	CHECK_EQUAL(open_queue(&q, -1, 0), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		CHECK_EQUAL(pu_loopback_inject(&q, tag, PU_OP_READ, 0, 8), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), DEPTH);
	CHECK_EQUAL(pu_queue_answer(&q, 5, 0), 0);
	pu_queue_fail_held(&q, EIO);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		CHECK_EQUAL(pu_loopback_result(&q, tag), tag == 5 ? 4096 : -EIO);
	CHECK_EQUAL(q.owned, 0);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

/* `extra` entries: the loopback queue has a ring, which does the watching. */
static void other_descriptors_end_a_wait(uint32_t extra)
{
	struct pu_queue_options options = { .depth = DEPTH, .buffer_bytes = 4096 };
	struct pu_queue q;
	eventfd_t value;
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	options.extra_entries = extra;
	CHECK_EQUAL(pu_queue_open(&q, -1, &options), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	for (int round = 0; round < 3; round++) {
		CHECK_EQUAL(pu_queue_watch(&q, fd), 0);
		CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
		CHECK(!q.watched);
		eventfd_write(fd, 1);
		CHECK_EQUAL(pu_queue_watch(&q, fd), 0);
		CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
		CHECK(q.watched);
		/* ready still: told again */
		CHECK_EQUAL(pu_queue_watch(&q, fd), 0);
		CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
		CHECK(q.watched);
		eventfd_read(fd, &value);
	}
	pu_queue_close(&q);
	pu_queue_free(&q);
	close(fd);
}

/* The first byte of tag 0's buffer after so many milliseconds of waiting. */
static uint8_t after_waiting(struct pu_queue *q, int ms)
{
	for (int i = 0; i < ms; i++)
		CHECK(pu_queue_wait(q, 1000000) >= 0);
	return *(uint8_t *)pu_queue_next_buffer(q, 0);
}

static void idle_buffers_are_given_back(void)
{
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = 4096, .extra_entries = 8, .trim_after_ns = 20000000,
	};
	struct pu_queue q;

	CHECK_EQUAL(pu_queue_open(&q, -1, &options), 0);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	if (q.ring.setup_flags & PU_SETUP_DEFER_TASKRUN)
		for (int round = 0; round < 3; round++) {
			CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), 0);
			CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
			memset(pu_queue_next_buffer(&q, 0), 'x', 512);
			/* not while somebody has the request */
			CHECK_EQUAL(after_waiting(&q, 100), 'x');
			CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
			for (int wait = 0; after_waiting(&q, 10) && wait < 500; wait++)
				;
			CHECK_EQUAL(*(uint8_t *)pu_queue_next_buffer(&q, 0), 0);
		}
	pu_queue_close(&q);
	pu_queue_free(&q);
}

static void opening_fails_clean(void)
{
	struct pu_queue q;

	/* standard input is no char device: the map is refused, nothing stays */
	CHECK(open_queue(&q, 0, 0) < 0);
	CHECK(!q.tags && !q.buffers && !q.desc);
}

int main(void)
{
	every_request_is_answered_once();
	a_second_answer_is_refused();
	what_is_left_comes_first_and_once();
	threads_race_to_answer_and_one_wins();
	held_requests_can_be_failed_from_outside();
	other_descriptors_end_a_wait(0);
	other_descriptors_end_a_wait(8);
	idle_buffers_are_given_back();
	opening_fails_clean();
	return 0;
}
