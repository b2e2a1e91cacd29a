/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#define WANTED PU_SETUP_OF_A_THREAD

static void nop(struct pu_ring *ring, uint64_t user_data)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(ring);

	CHECK(sqe);
	sqe->opcode = PU_OPCODE_NOP;
	sqe->user_data = user_data;
}

static void every_shape_round_trips(void)
{
	static const uint32_t shapes[] = { 0, PU_SETUP_SQE128, PU_SETUP_CQE32,
					   PU_SETUP_SQE128 | PU_SETUP_CQE32 };
	static const uint32_t wishes[] = { 0, WANTED, WANTED & ~(uint32_t)PU_SETUP_NO_SQARRAY };

	for (size_t s = 0; s < 4; s++)
		for (size_t w = 0; w < 3; w++) {
			struct pu_ring ring;
			uint64_t next = 0;

			CHECK_EQUAL(pu_ring_open(&ring, 8, 0, shapes[s], wishes[w]), 0);
			CHECK_EQUAL(ring.setup_flags & shapes[s], shapes[s]);
			/* several times round the ring, in batches that do not divide it */
			for (int round = 0; round < 20; round++) {
				for (uint64_t i = 0; i < 5; i++)
					nop(&ring, next + i);
				CHECK_EQUAL(pu_ring_submit(&ring, 5, PU_FOREVER, 0), 5);
				CHECK_EQUAL(pu_ring_ready(&ring), 5);
				for (uint32_t i = 0; i < 5; i++) {
					CHECK_EQUAL(pu_ring_cqe(&ring, i)->user_data, next + i);
					CHECK_EQUAL(pu_ring_cqe(&ring, i)->res, 0);
				}
				pu_ring_advance(&ring, 5);
				next += 5;
			}
			pu_ring_close(&ring);
		}
}

static void unknown_wanted_flags_are_dropped_required_ones_are_not(void)
{
	struct pu_ring ring;

	CHECK_EQUAL(pu_ring_open(&ring, 8, 0, 1u << 31, WANTED), -EINVAL);
	/* DEFER_TASKRUN alone is refused by every kernel: as if the kernel did not know it */
	CHECK_EQUAL(pu_ring_open(&ring, 8, 0, 0, PU_SETUP_DEFER_TASKRUN), 0);
	CHECK_EQUAL(ring.setup_flags & PU_SETUP_DEFER_TASKRUN, 0);
	nop(&ring, 1);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), 1);
	pu_ring_close(&ring);
}

static void full_submission_queue_gives_no_entry(void)
{
	struct pu_ring ring;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	for (uint64_t i = 0; i < 4; i++)
		nop(&ring, i);
	CHECK(!pu_ring_get_sqe(&ring));
	CHECK_EQUAL(pu_ring_unsubmitted(&ring), 4);
	CHECK_EQUAL(pu_ring_submit(&ring, 0, 0, 0), 4);
	CHECK(pu_ring_get_sqe(&ring));
	pu_ring_close(&ring);
}

static void overflown_completions_are_all_delivered(void)
{
	struct pu_ring ring;
	uint64_t seen = 0;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 4, 0, PU_SETUP_SUBMIT_ALL), 0);
	for (uint64_t i = 0; i < 16; i++) {
		nop(&ring, i);
		CHECK_EQUAL(pu_ring_submit(&ring, 0, 0, 0), 1);
	}
	while (seen < 16) {
		uint32_t there = pu_ring_ready(&ring);

		for (uint32_t i = 0; i < there; i++)
			CHECK_EQUAL(pu_ring_cqe(&ring, i)->user_data, seen++);
		pu_ring_advance(&ring, there);
		if (seen < 16)
			CHECK(pu_ring_submit(&ring, 1, 1000000000, 0) >= 0);
	}
	CHECK_EQUAL(*ring.k_cq_overflow, 0);
	pu_ring_close(&ring);
}

static void waits_end_in_time(void)
{
	struct pu_ring ring;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, 20000000, 0), -ETIME);
	if (ring.features & PU_FEAT_MIN_TIMEOUT) {
		/* two wanted, one there: good enough once the minimum wait is over */
		nop(&ring, 7);
		CHECK_EQUAL(pu_ring_submit(&ring, 2, 60000000000, 1000), 1);
		CHECK_EQUAL(pu_ring_ready(&ring), 1);
	}
	pu_ring_close(&ring);
}

static void on_alarm(int number)
{
	(void)number;
}

static void a_signal_ends_a_wait(void)
{
	struct pu_ring ring;
	struct sigaction action = { .sa_handler = on_alarm };
	struct itimerval soon = { { 0, 0 }, { 0, 20000 } };

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), -EINTR);
	pu_ring_close(&ring);
}

static void a_refused_entry_does_not_stop_the_batch(uint32_t wanted)
{
	struct pu_ring ring;
	int failed = 0;

	CHECK_EQUAL(pu_ring_open(&ring, 8, 0, 0, wanted), 0);
	nop(&ring, 0);
	pu_ring_get_sqe(&ring)->opcode = 250; /* no such operation */
	nop(&ring, 2);
	/* Without SUBMIT_ALL the kernel stops behind the bad one; submit goes on by itself. */
	CHECK_EQUAL(pu_ring_submit(&ring, 3, PU_FOREVER, 0), 3);
	CHECK_EQUAL(pu_ring_ready(&ring), 3);
	for (uint32_t i = 0; i < 3; i++)
		failed += pu_ring_cqe(&ring, i)->res == -EINVAL;
	CHECK_EQUAL(failed, 1);
	pu_ring_close(&ring);
}

static void registered_ring_and_files_work(void)
{
	struct pu_ring ring;
	char text[4] = "";
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	struct pu_sqe *sqe;

	CHECK(fd >= 0);
	CHECK_EQUAL(pu_ring_open(&ring, 8, 0, 0, WANTED), 0);
	CHECK_EQUAL(pu_ring_register(&ring, PU_REGISTER_FILES, &fd, 1), 0);
	close(fd);
	CHECK_EQUAL(pu_ring_register_self(&ring), 0);
	sqe = pu_ring_get_sqe(&ring);
	sqe->opcode = PU_OPCODE_READ;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->fd = 0;
	sqe->addr = (uint64_t)(uintptr_t)text;
	sqe->len = sizeof(text);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), 1);
	CHECK_EQUAL(pu_ring_cqe(&ring, 0)->res, sizeof(text));
	CHECK(!memcmp(text, "\177ELF", sizeof(text)));
	pu_ring_close(&ring);
}

static void *post_to(void *argument)
{
	struct pu_ring *target = argument, ring;
	struct pu_sqe *sqe;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	sqe = pu_ring_get_sqe(&ring);
	sqe->opcode = PU_OPCODE_MSG_RING;
	sqe->fd = target->fd;
	sqe->off = 4711;
	sqe->len = 42;
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), 1);
	CHECK_EQUAL(pu_ring_cqe(&ring, 0)->res, 0);
	pu_ring_close(&ring);
	return NULL;
}

/* Linux 6.14 and later do part of it in an enter: the rest must be seen, or nobody comes for it. */
static void work_that_an_enter_leaves_is_told(void)
{
	enum { POLLS = 100 };
	struct pu_ring ring;
	uint32_t there = 0;
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK_EQUAL(pu_ring_open(&ring, 128, 256, 0, WANTED), 0);
	for (int i = 0; i < POLLS; i++) {
		struct pu_sqe *sqe = pu_ring_get_sqe(&ring);

		CHECK(sqe);
		sqe->opcode = PU_OPCODE_POLL_ADD;
		sqe->fd = fd;
		sqe->op_flags = POLLIN;
	}
	CHECK_EQUAL(pu_ring_submit(&ring, 0, 0, 0), POLLS);
	CHECK_EQUAL(pu_ring_ready(&ring), 0);
	CHECK(!pu_ring_deferred(&ring));
	eventfd_write(fd, 1);
	CHECK(pu_ring_deferred(&ring));
	while (pu_ring_deferred(&ring)) {
		CHECK_EQUAL(pu_ring_submit(&ring, 0, 0, 0), 0);
		CHECK(pu_ring_ready(&ring));
		there += pu_ring_ready(&ring);
		pu_ring_advance(&ring, pu_ring_ready(&ring));
	}
	CHECK_EQUAL(there, POLLS);
	pu_ring_close(&ring);
	close(fd);
}

static void another_thread_can_post(void)
{
	struct pu_ring ring;
	pthread_t thread;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	CHECK_EQUAL(pthread_create(&thread, NULL, post_to, &ring), 0);
	while (!pu_ring_ready(&ring))
		CHECK(pu_ring_submit(&ring, 1, 10000000000, 0) >= 0);
	CHECK_EQUAL(pu_ring_cqe(&ring, 0)->user_data, 4711);
	CHECK_EQUAL(pu_ring_cqe(&ring, 0)->res, 42);
	pthread_join(thread, NULL);
	pu_ring_close(&ring);
}

static void a_severed_ring_fails_and_closes(void)
{
	struct pu_ring ring;
	int inert;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, WANTED), 0);
	inert = eventfd(0, EFD_CLOEXEC);
	CHECK_EQUAL(pu_ring_sever(&ring, inert), 0);
	close(inert);
	CHECK(pu_ring_submit(&ring, 1, PU_FOREVER, 0) < 0);
	CHECK_EQUAL(pu_ring_ready(&ring), 0);
	pu_ring_close(&ring);
	pu_ring_close(&ring); /* once is enough, twice is harmless */
}

/* ---- the end ---- */

struct ending {
	struct pu_ring ring;
	int ends[2]; /* of a pipe */
	char text[8];
	uint32_t in_flight;
	int told[4]; /* by user_data: how often */
	int32_t results[4];
	bool over;
};

static void over(void *context, uint64_t user_data, int32_t result)
{
	struct ending *e = context;

	e->told[user_data]++;
	e->results[user_data] = result;
	e->in_flight--;
}

static void transfer(struct ending *e, uint8_t opcode, uint64_t user_data)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(&e->ring);

	sqe->opcode = opcode;
	sqe->fd = e->ends[opcode == PU_OPCODE_WRITE];
	sqe->addr = (uint64_t)(uintptr_t)e->text;
	sqe->len = sizeof(e->text);
	sqe->user_data = user_data;
	e->in_flight++;
}

static void *begin_a_read(void *argument)
{
	struct ending *e = argument;

	CHECK_EQUAL(pipe(e->ends), 0);
	CHECK_EQUAL(pu_ring_open(&e->ring, 4, 0, 0, WANTED), 0);
	transfer(e, PU_OPCODE_READ, 0);
	CHECK_EQUAL(pu_ring_submit(&e->ring, 0, 0, 0), 1);
	return NULL;
}

static void *end_it(void *argument)
{
	struct ending *e = argument;

	e->over = pu_ring_end(&e->ring, &e->in_flight, over, e);
	return NULL;
}

static void close_ending(struct ending *e)
{
	pu_ring_close(&e->ring);
	close(e->ends[0]);
	close(e->ends[1]);
}

static void what_is_in_flight_is_cancelled_and_the_rest_not_begun(void)
{
	struct ending e = { 0 };
	char byte;

	begin_a_read(&e);
	nop(&e.ring, 1);
	e.in_flight++;
	CHECK_EQUAL(pu_ring_submit(&e.ring, 0, 0, 0), 1);
	transfer(&e, PU_OPCODE_WRITE, 2);
	transfer(&e, PU_OPCODE_WRITE, 3);
	end_it(&e);
	CHECK(e.over);
	for (int i = 0; i < 4; i++) {
		CHECK_EQUAL(e.told[i], 1);
		CHECK_EQUAL(e.results[i], i == 1 ? 0 : -ECANCELED);
	}
	CHECK_EQUAL(pu_ring_unsubmitted(&e.ring), 0);
	CHECK_EQUAL(pu_ring_submit(&e.ring, 0, 0, 0), 0);
	CHECK_EQUAL(fcntl(e.ends[0], F_SETFL, O_NONBLOCK), 0);
	CHECK_EQUAL(read(e.ends[0], &byte, 1), -1);
	close_ending(&e);
}

static void another_thread_knows_when_the_submitter_has_ended(void)
{
	struct ending e = { 0 };
	pthread_t thread;

	begin_a_read(&e);
	CHECK_EQUAL(pthread_create(&thread, NULL, end_it, &e), 0);
	pthread_join(thread, NULL);
	CHECK_EQUAL(e.over, !(e.ring.setup_flags & PU_SETUP_SINGLE_ISSUER));
	end_it(&e); /* but the submitter can */
	CHECK(e.over);
	close_ending(&e);

	e = (struct ending){ 0 };
	CHECK_EQUAL(pthread_create(&thread, NULL, begin_a_read, &e), 0);
	pthread_join(thread, NULL);
	for (int i = 0; i < 5000 && !e.over; i++) { /* a join is told a little before the end */
		end_it(&e);
		usleep(1000);
	}
	CHECK(e.over);
	close_ending(&e);
}

static void a_severed_ring_tells_nothing(void)
{
	struct ending e = { 0 };

	begin_a_read(&e);
	CHECK_EQUAL(pu_ring_sever(&e.ring, e.ends[0]), 0);
	end_it(&e);
	CHECK(!e.over);
	CHECK_EQUAL(e.told[0], 0);
	close_ending(&e);
}

static void a_child_leaves_it_to_its_parent(void)
{
	struct ending e = { 0 };
	int status;
	pid_t child;

	begin_a_read(&e);
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		/* What the child has where the parent has its ring. */
		char *map = mmap(e.ring.ring_map, 4096, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

		end_it(&e);
		pu_ring_close(&e.ring);
		map[0] = 1;
		_exit(e.over && e.in_flight == 1 ? 0 : 1);
	}
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK_EQUAL(status, 0);
	CHECK_EQUAL(write(e.ends[1], "parent", 6), 6);
	CHECK_EQUAL(pu_ring_submit(&e.ring, 1, 10000000000, 0), 0);
	CHECK_EQUAL(pu_ring_cqe(&e.ring, 0)->res, 6);
	close_ending(&e);
}

int main(void)
{
	every_shape_round_trips();
	unknown_wanted_flags_are_dropped_required_ones_are_not();
	full_submission_queue_gives_no_entry();
	overflown_completions_are_all_delivered();
	waits_end_in_time();
	a_signal_ends_a_wait();
	a_refused_entry_does_not_stop_the_batch(WANTED);
	a_refused_entry_does_not_stop_the_batch(0);
	registered_ring_and_files_work();
	work_that_an_enter_leaves_is_told();
	another_thread_can_post();
	a_severed_ring_fails_and_closes();
	what_is_in_flight_is_cancelled_and_the_rest_not_begun();
	another_thread_knows_when_the_submitter_has_ended();
	a_severed_ring_tells_nothing();
	a_child_leaves_it_to_its_parent();
	return 0;
}
