/* SPDX-License-Identifier: MIT
 * A kernel that takes less than it is given: EAGAIN, EBUSY, short submissions. Nothing is lost.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "answer.h"
#include "copy.h"
#include "loopback.h"
#include "open.h"

#define ALL 1000

/* What the kernel does at the next enters: a number of entries that it takes at most, or -errno;
 * 0 behind the last of them. Then it takes all. */
static int script[8];
static int step, enters;

static void kernel_does(const int steps[8])
{
	memcpy(script, steps, sizeof(script));
	step = enters = 0;
}

#define KERNEL(...) kernel_does((const int[8]){ __VA_ARGS__ })

/* Stands before the C library's. The real kernel is told to submit a part, and so submits a part. */
/* Takes more arguments than some callers pass. */
__attribute__((no_sanitize("address"))) long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long argument[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		argument[i] = va_arg(list, long);
	va_end(list);
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "syscall");
	if (number == SYS_io_uring_enter) {
		int at_most = step < 8 && script[step] ? script[step++] : ALL;

		enters++;
		if (at_most < 0) {
			errno = -at_most;
			return -1;
		}
		if (argument[1] > at_most) {
			argument[1] = at_most;
			argument[2] = 0; /* nor does the kernel wait then */
		}
	}
	return real(number, argument[0], argument[1], argument[2], argument[3], argument[4],
		    argument[5]);
}

static void open_with_nops(struct pu_ring *ring, uint64_t count)
{
	CHECK_EQUAL(pu_ring_open(ring, 8, 0, 0, PU_SETUP_SUBMIT_ALL), 0);
	for (uint64_t i = 0; i < count; i++) {
		struct pu_sqe *sqe = pu_ring_get_sqe(ring);

		CHECK(sqe);
		sqe->opcode = PU_OPCODE_NOP;
		sqe->user_data = i;
	}
}

static void close_with_nops(struct pu_ring *ring, uint32_t count)
{
	CHECK_EQUAL(pu_ring_unsubmitted(ring), 0);
	CHECK_EQUAL(pu_ring_ready(ring), count);
	for (uint32_t i = 0; i < count; i++)
		CHECK_EQUAL(pu_ring_cqe(ring, i)->user_data, i);
	pu_ring_close(ring);
}

static void a_refused_enter_keeps_its_entries(int error)
{
	struct pu_ring ring;

	open_with_nops(&ring, 8);
	for (int i = 0; i < 2; i++) {
		KERNEL(-error);
		CHECK_EQUAL(pu_ring_submit(&ring, 8, PU_FOREVER, 0), -error);
		CHECK_EQUAL(pu_ring_unsubmitted(&ring), 8);
		CHECK(!pu_ring_get_sqe(&ring));
	}
	CHECK_EQUAL(pu_ring_submit(&ring, 8, PU_FOREVER, 0), 8);
	close_with_nops(&ring, 8);
}

static void a_short_submission_goes_on(void)
{
	struct pu_ring ring;

	open_with_nops(&ring, 8);
	KERNEL(3, 1);
	CHECK_EQUAL(pu_ring_submit(&ring, 8, PU_FOREVER, 0), 8);
	CHECK_EQUAL(enters, 3); /* of 3, 1 and 4 */
	close_with_nops(&ring, 8);
}

static void what_was_taken_before_a_refusal_is_told(void)
{
	struct pu_ring ring;

	open_with_nops(&ring, 8);
	KERNEL(3, -EAGAIN);
	CHECK_EQUAL(pu_ring_submit(&ring, 8, PU_FOREVER, 0), 3);
	CHECK_EQUAL(pu_ring_unsubmitted(&ring), 5);
	CHECK_EQUAL(pu_ring_submit(&ring, 8, PU_FOREVER, 0), 5);
	close_with_nops(&ring, 8);
}

/* ---- a queue, whose ring has others' entries ---- */

static unsigned completed;

static void count_completion(void *context, uint64_t user_data, int32_t result)
{
	struct pu_queue *q = context;

	CHECK_EQUAL(user_data, PU_USER_DATA(PU_KIND_OTHER, completed));
	CHECK_EQUAL(result, 0);
	completed++;
	q->foreign_inflight--;
}

static void open_queue(struct pu_queue *q)
{
	struct pu_queue_options options = { .depth = 4, .buffer_bytes = 4096, .extra_entries = 8 };

	CHECK_EQUAL(pu_queue_open(q, -1, &options), 0);
	q->complete = count_completion;
	q->completer = q;
	completed = 0;
}

static bool add_nop(struct pu_queue *q, unsigned number)
{
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe)
		return false;
	sqe->opcode = PU_OPCODE_NOP;
	sqe->user_data = PU_USER_DATA(PU_KIND_OTHER, number);
	q->foreign_inflight++;
	return true;
}

static void a_queue_tries_again(void)
{
	struct pu_queue q;

	open_queue(&q);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	CHECK(add_nop(&q, 0));
	KERNEL(-EAGAIN, -EBUSY, -EAGAIN);
	for (int i = 0; i < 3; i++) {
		CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
		CHECK_EQUAL(pu_ring_unsubmitted(&q.ring), 1);
	}
	/* What came meanwhile is told all the same. */
	CHECK_EQUAL(pu_loopback_inject(&q, 2, PU_OP_READ, 0, 1), 0);
	KERNEL(-EAGAIN);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 1);
	CHECK_EQUAL(q.ready[0], 2);
	CHECK_EQUAL(completed, 0);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(completed, 1);
	/* Completions that are to be taken first are. */
	CHECK(add_nop(&q, 1));
	CHECK_EQUAL(pu_ring_submit(&q.ring, 1, PU_FOREVER, 0), 1);
	CHECK(add_nop(&q, 2));
	KERNEL(-EBUSY);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(completed, 2);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), 0);
	CHECK_EQUAL(completed, 3);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

static void a_full_ring_that_is_not_taken_has_no_entry(void)
{
	struct pu_queue q;
	unsigned added = 0;

	open_queue(&q);
	while (pu_ring_unsubmitted(&q.ring) < q.ring.sq_entries)
		CHECK(add_nop(&q, added++));
	KERNEL(-EAGAIN, -EBUSY);
	CHECK(!add_nop(&q, added));
	CHECK(!add_nop(&q, added));
	CHECK_EQUAL(pu_ring_unsubmitted(&q.ring), q.ring.sq_entries);
	CHECK(add_nop(&q, added++));
	while (completed < added)
		CHECK_EQUAL(pu_queue_wait(&q, 10000000000), 0);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

static void a_fetch_goes_on_after_a_short_submission(void)
{
	struct pu_queue q;

	open_queue(&q);
	CHECK(add_nop(&q, 0));
	CHECK(add_nop(&q, 1));
	KERNEL(1, -EINTR, 1);
	CHECK_EQUAL(pu_queue_fetch(&q), 0);
	CHECK_EQUAL(pu_ring_unsubmitted(&q.ring), 0);
	pu_queue_close(&q);
	pu_queue_free(&q);
	open_queue(&q);
	KERNEL(-EAGAIN);
	CHECK_EQUAL(pu_queue_fetch(&q), -EAGAIN);
	pu_queue_close(&q);
	pu_queue_free(&q);
}

int main(void)
{
	a_refused_enter_keeps_its_entries(EAGAIN);
	a_refused_enter_keeps_its_entries(EBUSY);
	a_short_submission_goes_on();
	what_was_taken_before_a_refusal_is_told();
	a_queue_tries_again();
	a_full_ring_that_is_not_taken_has_no_entry();
	a_fetch_goes_on_after_a_short_submission();
	return 0;
}
