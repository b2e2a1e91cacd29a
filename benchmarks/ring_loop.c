/* SPDX-License-Identifier: MIT
 * Round trips of NOPs, in batches: a bare loop over raw system calls beside the same loop over
 * pyublk's ring. For every line on standard input, one round: prints nanoseconds per NOP, bare
 * and pyublk.
 *
 * Usage: ring_loop BATCHES_PER_ROUND BATCH
 */
#define _GNU_SOURCE
#include "ring.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* What pyublk.Ring asks for by default: both loops run on rings of the same kind. */
#define WANTED (PU_SETUP_SUBMIT_ALL | PU_SETUP_COOP_TASKRUN | PU_SETUP_SINGLE_ISSUER | \
		PU_SETUP_DEFER_TASKRUN | PU_SETUP_NO_SQARRAY)
#define ENTER_GETEVENTS 1u

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Nothing but what a NOP needs: entry, tail, system call, head. */
static double bare(struct pu_ring *ring, unsigned batches, unsigned batch)
{
	struct pu_sqe *sqes = (void *)ring->sqes;
	struct pu_cqe *cqes = (void *)ring->cqes;
	uint32_t tail = ring->sq_tail, head = *ring->k_cq_head;
	uint64_t sum = 0;
	double start = now_ns();

	for (unsigned i = 0; i < batches; i++) {
		for (unsigned n = 0; n < batch; n++) {
			struct pu_sqe *sqe = &sqes[tail++ & ring->sq_mask];

			memset(sqe, 0, sizeof(*sqe));
			sqe->user_data = n;
		}
		__atomic_store_n(ring->k_sq_tail, tail, __ATOMIC_RELEASE);
		if (syscall(SYS_io_uring_enter, ring->fd, batch, batch, ENTER_GETEVENTS, NULL, 0) !=
		    (long)batch)
			fail("io_uring_enter");
		for (uint32_t end = __atomic_load_n(ring->k_cq_tail, __ATOMIC_ACQUIRE); head != end; head++)
			sum += cqes[head & ring->cq_mask].user_data;
		__atomic_store_n(ring->k_cq_head, head, __ATOMIC_RELEASE);
	}
	double elapsed = now_ns() - start;

	ring->sq_tail = tail;
	if (sum != (uint64_t)batches * batch * (batch - 1) / 2)
		fail("completions are missing");
	return elapsed / batches / batch;
}

static double through_pyublk(struct pu_ring *ring, unsigned batches, unsigned batch)
{
	uint64_t sum = 0;
	double start = now_ns();

	for (unsigned i = 0; i < batches; i++) {
		for (unsigned n = 0; n < batch; n++) {
			struct pu_sqe *sqe = pu_ring_get_sqe(ring);

			sqe->opcode = PU_OPCODE_NOP;
			sqe->user_data = n;
		}
		if (pu_ring_submit(ring, batch, PU_FOREVER, 0) != (int)batch)
			fail("pu_ring_submit");
		uint32_t ready = pu_ring_ready(ring);

		for (uint32_t n = 0; n < ready; n++)
			sum += pu_ring_cqe(ring, n)->user_data;
		pu_ring_advance(ring, ready);
	}
	double elapsed = now_ns() - start;

	if (sum != (uint64_t)batches * batch * (batch - 1) / 2)
		fail("completions are missing");
	return elapsed / batches / batch;
}

int main(int argc, char **argv)
{
	struct pu_ring ours, plain;

	if (argc != 3)
		return 2;
	unsigned batches = (unsigned)atoi(argv[1]), batch = (unsigned)atoi(argv[2]);

	if (pu_ring_open(&ours, batch, 0, 0, WANTED) < 0 || pu_ring_open(&plain, batch, 0, 0, WANTED) < 0)
		fail("io_uring_setup");
	while (getchar() != EOF) {
		double first = bare(&plain, batches, batch);

		printf("%f %f\n", first, through_pyublk(&ours, batches, batch));
		fflush(stdout);
	}
	pu_ring_close(&ours);
	pu_ring_close(&plain);
	return 0;
}
