/* SPDX-License-Identifier: MIT
 * A queue whose device is quiesced while it is busy, with the kernel's side played: tags that it held
 * are not given back, and it ends as soon as they are answered.
 */
#define _GNU_SOURCE
#include "failing.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "batch.h"
#include "driver.h"

#define DEPTH 4
#define LONG INT64_C(20000000000)

static struct driver driver;

static void play(int fd, uint32_t count)
{
	driver_play(&driver, fd, count);
}

static void begin(struct pu_queue *q, uint64_t flags)
{
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = 4096, .flags = flags, .own_device = true
	};

	driver_open(&driver);
	driver.queue = q;
	q->ring.fd = q->post_ring.fd = -1;
	before_enter = play;
	CHECK_EQUAL(pu_queue_open(q, driver.cdev, &options), 0);
	CHECK(q->ending); /* there is nothing to wait for */
	CHECK_EQUAL(pu_queue_fetch(q), 0);
	CHECK(!q->ending);
	CHECK_EQUAL(pu_queue_wait(q, 0), 0);
}

static void end(struct pu_queue *q, int how)
{
	for (int twice = 0; twice < 2; twice++) {
		CHECK_EQUAL(pu_queue_wait(q, LONG), how);
		CHECK(q->ending);
		CHECK_EQUAL(pu_queue_held(q), 0);
	}
	CHECK(pu_queue_close(q));
	pu_queue_free(q);
	before_enter = NULL;
	driver_close(&driver);
}

/* They have come, but nobody has looked: the kernel takes back no tag that has a request. */
static void let_come(struct pu_queue *q, uint32_t count)
{
	while (pu_ring_ready(&q->ring) < count)
		CHECK(pu_ring_submit(&q->ring, 0, 0, 0) >= 0);
}

/* So many requests more; `held`: the tags that brought them. */
static void bring(struct pu_queue *q, uint16_t count, uint16_t *held)
{
	for (uint16_t request = 0; request < count; request++)
		driver_request(&driver, request, PU_OP_READ, false);
	for (uint16_t there = 0; there < count;) {
		CHECK(pu_queue_wait(q, LONG) > 0);
		for (uint32_t i = 0; i < q->nr_ready; i++)
			held[there++] = q->ready[i];
	}
}

static void idle_tags_are_given_back(uint64_t flags)
{
	struct pu_queue q;

	begin(&q, flags);
	driver_quiesce(&driver);
	end(&q, -ENODEV);
	CHECK_EQUAL(q.in_kernel, 0);
}

static void what_was_held_is_answered_first(uint64_t flags, uint16_t count)
{
	struct pu_queue q;
	uint16_t held[DEPTH];

	begin(&q, flags);
	bring(&q, count, held);
	driver_quiesce(&driver);
	for (uint16_t i = 0; i < count; i++) {
		while (!q.ending)
			CHECK_EQUAL(pu_queue_wait(&q, LONG), 0);
		CHECK_EQUAL(pu_queue_wait(&q, 0), 0); /* not yet the end */
		CHECK_EQUAL(driver.commits, i);
		CHECK_EQUAL(pu_queue_answer(&q, held[i], 0), 0);
	}
	end(&q, -ENODEV);
	CHECK_EQUAL(driver.commits, count);
}

/* The kernel says nothing to a queue of which no tag is idle: it is quiesced again. */
static void what_held_every_tag_is_told_later(uint64_t flags)
{
	struct pu_queue q;
	uint16_t held[DEPTH];

	begin(&q, flags);
	bring(&q, DEPTH, held);
	for (uint16_t i = 0; i < DEPTH; i++)
		CHECK_EQUAL(pu_queue_answer(&q, held[i], 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK(!q.ending);
	CHECK_EQUAL(driver.commits, DEPTH);
	driver_quiesce(&driver);
	end(&q, -ENODEV);
}

struct answer {
	struct pu_queue *q;
	uint16_t tag;
};

static void *answer_later(void *context)
{
	struct answer *answer = context;
	struct pu_queue *q = answer->q;

	usleep(20000); /* the owner waits */
	CHECK_EQUAL(pu_queue_post(q, answer->tag, pu_tag_generation(&q->tags[answer->tag]), 0), 0);
	return NULL;
}

static void another_thread_answers_last(uint64_t flags)
{
	struct pu_queue q;
	uint16_t held[1];
	struct answer answer = { .q = &q };
	pthread_t thread;
	int there;

	begin(&q, flags);
	bring(&q, 1, held);
	answer.tag = held[0];
	driver_quiesce(&driver);
	CHECK_EQUAL(pthread_create(&thread, NULL, answer_later, &answer), 0);
	do
		there = pu_queue_wait(&q, LONG);
	while (there == 0);
	CHECK_EQUAL(there, -ENODEV);
	pthread_join(thread, NULL);
	CHECK_EQUAL(driver.commits, 1);
	end(&q, -ENODEV);
}

/* A write of which only the announcement came is nobody's yet, and comes all the same. */
static void data_that_is_announced_still_comes(void)
{
	struct pu_queue q;

	begin(&q, PU_F_NEED_GET_DATA);
	driver_request(&driver, 0, PU_OP_WRITE, true);
	let_come(&q, 1);
	driver_quiesce(&driver);
	while (!q.nr_ready)
		CHECK(pu_queue_wait(&q, LONG) >= 0);
	CHECK(q.ending);
	CHECK_EQUAL(pu_queue_answer(&q, q.ready[0], 0), 0);
	end(&q, -ENODEV);
	CHECK_EQUAL(driver.commits, 1);
}

static int64_t quiesce_meanwhile(void *context, uint32_t op, uint32_t flags, uint64_t offset,
				 uint64_t length, void *buffer)
{
	(void)op, (void)flags, (void)offset, (void)length, (void)buffer;
	++*(int *)context;
	driver_quiesce(&driver);
	return 0;
}

static void a_native_handler_is_busy(uint64_t flags, uint16_t count)
{
	struct pu_queue q;
	int calls = 0;

	begin(&q, flags);
	for (uint16_t request = 0; request < count; request++)
		driver_request(&driver, request, PU_OP_READ, false);
	let_come(&q, flags & PU_F_BATCH_IO ? 1 : count); /* a batch may come as one */
	CHECK_EQUAL(pu_queue_serve(&q, quiesce_meanwhile, &calls, false), 0);
	CHECK_EQUAL(calls, count);
	end(&q, -ENODEV);
	CHECK_EQUAL(driver.commits, count);
}

/* What the kernel refuses of one tag ends no other's requests. */
static void a_refused_tag_is_no_end(void)
{
	struct pu_queue q;
	uint16_t held[1];

	begin(&q, 0);
	bring(&q, 1, held);
	q.owned--;
	pu_queue_lose(&q, held[0], -EINVAL);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	bring(&q, 1, held);
	CHECK_EQUAL(pu_queue_answer(&q, held[0], 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	driver_stop(&driver);
	end(&q, -EINVAL);
}

int main(void)
{
	const uint64_t kinds[] = { 0, PU_F_BATCH_IO };

	fail_nothing();
	for (int i = 0; i < 2; i++) {
		idle_tags_are_given_back(kinds[i]);
		for (uint16_t count = 1; count < DEPTH; count++)
			what_was_held_is_answered_first(kinds[i], count);
		what_held_every_tag_is_told_later(kinds[i]);
		another_thread_answers_last(kinds[i]);
		for (uint16_t count = 1; count < DEPTH; count++)
			a_native_handler_is_busy(kinds[i], count);
	}
	data_that_is_announced_still_comes();
	a_refused_tag_is_no_end();
	return 0;
}
