/* SPDX-License-Identifier: MIT
 * Commits of batch I/O, with the kernel's side played: one tag's ends no wait, unless it fails, and
 * whatever the kernel does with a commit, no request is held up by it.
 */
#define _GNU_SOURCE
#include "failing.h"

#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
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

static void begin(struct pu_queue *q)
{
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = 4096, .flags = PU_F_BATCH_IO, .own_device = true
	};

	driver_open(&driver);
	driver.queue = q;
	q->ring.fd = q->post_ring.fd = -1;
	before_enter = play;
	CHECK_EQUAL(pu_queue_open(q, driver.cdev, &options), 0);
	CHECK_EQUAL(pu_queue_fetch(q), 0);
	CHECK_EQUAL(pu_queue_wait(q, 0), 0);
}

/* How it ended: -ENODEV when all was well. */
static int end(struct pu_queue *q)
{
	int there = 0;

	driver_stop(&driver);
	while (there >= 0)
		there = pu_queue_wait(q, LONG);
	CHECK(pu_queue_close(q));
	pu_queue_free(q);
	before_enter = NULL;
	driver_close(&driver);
	return there;
}

/* The queue has these requests, of tags 0 and up. */
static void bring(struct pu_queue *q, uint16_t count)
{
	for (uint16_t tag = 0; tag < count; tag++)
		driver_request(&driver, tag, PU_OP_READ, false);
	for (uint32_t there = 0; there < count; there += q->nr_ready)
		CHECK(pu_queue_wait(q, LONG) > 0);
}

#define ROUNDS 100

/* Asks again when the answer is there, and the queue has had the time to wait. */
static void *ask(void *unused)
{
	(void)unused;
	for (int round = 0; round < ROUNDS; round++) {
		while (__atomic_load_n(&driver.commits, __ATOMIC_ACQUIRE) < round)
			;
		usleep(500);
		driver_request(&driver, 0, PU_OP_READ, false);
	}
	return NULL;
}

static void a_request_at_depth_one_is_one_wait(void)
{
	struct pu_queue q;
	pthread_t client;

	begin(&q);
	CHECK_EQUAL(pthread_create(&client, NULL, ask, NULL), 0);
	for (int round = 0; round < ROUNDS; round++) {
		CHECK_EQUAL(pu_queue_wait(&q, LONG), 1); /* and not 0, for the commit */
		CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	}
	pthread_join(client, NULL);
	CHECK_EQUAL(q.counters.enters, ROUNDS + 1);
	CHECK_EQUAL(end(&q), -ENODEV);
}

static void a_refused_commit_ends_the_wait(int error)
{
	struct pu_queue q;

	begin(&q);
	bring(&q, 1);
	driver.refused = error;
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(pu_tag_state(&q.tags[0]), PU_TAG_GONE);
	CHECK(q.ending);
	CHECK_EQUAL(end(&q), -error);
}

/* The kernel takes the first, refuses the second, and has not looked at the third. */
static void what_a_commit_leaves_goes_again(void)
{
	struct pu_queue q;

	begin(&q);
	bring(&q, 3);
	driver.takes = 1;
	for (uint16_t tag = 0; tag < 3; tag++)
		CHECK_EQUAL(pu_queue_answer(&q, tag, 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(driver.commits, 1);
	CHECK_EQUAL(pu_tag_state(&q.tags[1]), PU_TAG_GONE);
	driver_request(&driver, 0, PU_OP_READ, false);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 1);
	CHECK_EQUAL(driver.commits, 2);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(end(&q), -EIO);
	CHECK_EQUAL(driver.commits, 3);
}

static void a_slow_commit_holds_nothing_up(bool fails)
{
	struct pu_queue q;
	int wakes = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	uint8_t bytes[2 * SLOW_BYTES] = { 0 }; /* for both commits */
	uint64_t first;

	begin(&q);
	bring(&q, 1);
	driver.later = true;
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	driver_request(&driver, 1, PU_OP_READ, false);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 1);
	CHECK_EQUAL(q.ready[0], 1);
	first = *(uint64_t *)(void *)q.batch->alone;
	/* neither do the others' reasons to wake */
	pu_queue_wake(&q);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(eventfd_write(wakes, 1), 0);
	CHECK_EQUAL(pu_queue_watch(&q, wakes), 0);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK(q.watched);
	CHECK_EQUAL(pu_queue_wait(&q, 1000000), 0);
	/* the next one's commit leaves alone what the kernel has yet to read */
	CHECK_EQUAL(pu_queue_answer(&q, 1, -ENOSPC), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 1000000), 0);
	CHECK_EQUAL(*(uint64_t *)(void *)q.batch->alone, first);
	if (fails) {
		CHECK(driver_cancel(&driver, driver.slow[0]) > 0);
		CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
		CHECK_EQUAL(pu_tag_state(&q.tags[0]), PU_TAG_GONE);
	} else {
		CHECK_EQUAL(write(driver.slow[1], bytes, sizeof(bytes)), sizeof(bytes));
	}
	CHECK_EQUAL(end(&q), -ENODEV);
	close(wakes);
}

static void another_threads_answer_is_not_lost(void)
{
	struct pu_queue q;

	begin(&q);
	bring(&q, 2);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(pu_queue_post(&q, 1, 1, 0), 0);
	CHECK_EQUAL(driver.commits, 1);
	CHECK_EQUAL(pu_queue_wait(&q, 1000000), 0);
	CHECK_EQUAL(driver.commits, 2);
	CHECK_EQUAL(pu_queue_held(&q), 0);
	CHECK_EQUAL(end(&q), -ENODEV);
}

/* Whether this kernel's NOPs have a result of one's choice. */
static bool can_play(void)
{
	struct pu_ring ring;
	bool can;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, 0), 0);
	become_nop(pu_ring_get_sqe(&ring), -ENODEV);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), 1);
	can = pu_ring_cqe(&ring, 0)->res == -ENODEV;
	pu_ring_close(&ring);
	return can;
}

int main(void)
{
	fail_nothing();
	if (!can_play())
		return 0;
	a_request_at_depth_one_is_one_wait();
	a_refused_commit_ends_the_wait(EBUSY);
	a_refused_commit_ends_the_wait(ENODEV);
	what_a_commit_leaves_goes_again();
	a_slow_commit_holds_nothing_up(false);
	a_slow_commit_holds_nothing_up(true);
	another_threads_answer_is_not_lost();
	return 0;
}
