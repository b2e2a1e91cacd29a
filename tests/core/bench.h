/* SPDX-License-Identifier: MIT
 * A loopback queue that serves a layout of files in memory.
 */
#ifndef PU_BENCH_H
#define PU_BENCH_H

#include "answer.h"
#include "loopback.h"
#include "mapped.h"
#include "open.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define DEPTH 4
#define BUFFER (256 * 1024)
#define FILES 3
#define FILE_BYTES (192 * 1024)

static int fds[FILES];

static inline void make_files(void)
{
	for (int i = 0; i < FILES; i++) {
		fds[i] = memfd_create("leg", MFD_CLOEXEC);
		CHECK(fds[i] >= 0);
		CHECK_EQUAL(ftruncate(fds[i], FILE_BYTES), 0);
	}
}

static inline void close_files(void)
{
	for (int i = 0; i < FILES; i++)
		close(fds[i]);
}

struct bench {
	struct pu_layout layout;
	struct pu_queue queue;
	struct pu_mapped mapped;
	uint8_t *expected;
	uint16_t depth; /* 0: DEPTH */
};

static inline void open_bench(struct bench *b, bool memory)
{
	struct pu_queue_options options = {
		.depth = b->depth ? b->depth : DEPTH,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_mapped_entries(&b->layout, b->depth ? b->depth : DEPTH),
		.files = fds,
		.nr_files = FILES,
	};

	for (int i = 0; i < FILES; i++) {
		b->layout.files[i].fd = fds[i];
		b->layout.files[i].memory = memory;
	}
	CHECK_EQUAL(pu_queue_open(&b->queue, -1, &options), 0);
	CHECK_EQUAL(pu_mapped_open(&b->mapped, &b->queue, &b->layout, b->layout.version), 0);
	CHECK_EQUAL(pu_queue_fetch(&b->queue), 0);
	b->expected = calloc(1, b->layout.size);
}

static struct bench kept[4]; /* what the kernel has not let go of */
static int nr_kept;

/* Whether all of its I/O is over. */
static inline bool close_bench(struct bench *b)
{
	bool over = pu_queue_close(&b->queue);

	if (over) {
		pu_mapped_close(&b->mapped);
		pu_queue_free(&b->queue);
		pu_layout_destroy(&b->layout);
		free(b->expected);
	} else {
		CHECK(nr_kept < 4);
		kept[nr_kept++] = *b;
	}
	return over;
}

static bool record_fails;

static inline void record_failures(struct bench *b)
{
	struct pu_leg_failure failure;

	while (pu_mapped_next_failure(&b->mapped, &failure)) {
		if (failure.error)
			pu_layout_fail_leg(&b->layout, failure.leg, failure.file_generation);
		if (!record_fails)
			pu_layout_recorded(&b->layout);
	}
	pu_mapped_recorded(&b->mapped);
}

static inline int32_t request(struct bench *b, uint16_t tag, uint32_t op, uint64_t offset, uint64_t length)
{
	CHECK_EQUAL(pu_loopback_inject(&b->queue, tag, op, offset >> 9, (uint32_t)(length >> 9)), 0);
	while (pu_queue_held(&b->queue)) {
		CHECK(pu_mapped_turn(&b->mapped, 1000000000) >= 0);
		record_failures(b);
	}
	return pu_loopback_result(&b->queue, tag);
}

#endif
