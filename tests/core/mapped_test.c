/* SPDX-License-Identifier: MIT
 * Layouts, and requests served from files by a loopback queue's ring.
 */
#define _GNU_SOURCE
#include "mapped.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define DEPTH 4
#define BUFFER (256 * 1024)
#define FILES 3
#define FILE_BYTES (192 * 1024)

static int fds[FILES];

static void make_files(void)
{
	for (int i = 0; i < FILES; i++) {
		fds[i] = memfd_create("leg", MFD_CLOEXEC);
		CHECK(fds[i] >= 0);
		CHECK_EQUAL(ftruncate(fds[i], FILE_BYTES), 0);
	}
}

static void close_files(void)
{
	for (int i = 0; i < FILES; i++)
		close(fds[i]);
}

struct bench {
	struct pu_layout layout;
	struct pu_queue queue;
	struct pu_mapped mapped;
	uint8_t *expected;
};

static void open_bench(struct bench *b, bool memory)
{
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_mapped_entries(DEPTH),
		.files = fds,
		.nr_files = FILES,
	};

	for (int i = 0; i < FILES; i++) {
		b->layout.files[i].fd = fds[i];
		b->layout.files[i].memory = memory;
	}
	CHECK_EQUAL(pu_queue_open(&b->queue, -1, &options), 0);
	CHECK_EQUAL(pu_mapped_open(&b->mapped, &b->queue, &b->layout), 0);
	CHECK_EQUAL(pu_queue_fetch(&b->queue), 0);
	b->expected = calloc(1, b->layout.size);
}

static void close_bench(struct bench *b)
{
	pu_queue_close(&b->queue);
	pu_mapped_close(&b->mapped);
	pu_queue_free(&b->queue);
	pu_layout_destroy(&b->layout);
	free(b->expected);
}

static int32_t request(struct bench *b, uint16_t tag, uint32_t op, uint64_t offset, uint64_t length)
{
	CHECK_EQUAL(pu_queue_inject(&b->queue, tag, op, offset >> 9, (uint32_t)(length >> 9)), 0);
	while (pu_queue_held(&b->queue)) {
		struct pu_leg_failure failure;

		CHECK(pu_mapped_turn(&b->mapped, 1000000000) >= 0);
		while (pu_mapped_next_failure(&b->mapped, &failure))
			pu_layout_set_leg(&b->layout, failure.leg, PU_LEG_FAILED);
		pu_mapped_recorded(&b->mapped);
	}
	return b->queue.tags[tag].result;
}

static void random_requests(struct bench *b)
{
	unsigned seed = 7;

	for (int i = 0; i < 300; i++) {
		uint64_t length = (1 + (uint64_t)rand_r(&seed) % 200) * 512;
		uint64_t offset = (uint64_t)rand_r(&seed) % ((b->layout.size - length) / 512 + 1) * 512;
		uint16_t tag = (uint16_t)(rand_r(&seed) % DEPTH);
		uint8_t *buffer = pu_queue_buffer(&b->queue, tag);

		switch (rand_r(&seed) % 8) {
		case 0:
			CHECK_EQUAL(request(b, tag, PU_OP_WRITE_ZEROES, offset, length), 0);
			memset(b->expected + offset, 0, length);
			break;
		case 1:
			CHECK_EQUAL(request(b, tag, PU_OP_FLUSH, 0, 0), 0);
			break;
		case 2:
		case 3:
		case 4:
			for (uint64_t at = 0; at < length; at++)
				buffer[at] = (uint8_t)rand_r(&seed);
			memcpy(b->expected + offset, buffer, length);
			CHECK_EQUAL(request(b, tag, PU_OP_WRITE, offset, length), (int32_t)length);
			break;
		default:
			CHECK_EQUAL(request(b, tag, PU_OP_READ, offset, length), (int32_t)length);
			CHECK(!memcmp(buffer, b->expected + offset, length));
		}
	}
}

static void layouts_keep_bytes(enum pu_layout_kind kind, bool memory)
{
	struct bench b = { 0 };
	uint64_t size = kind == PU_LAYOUT_MIRROR ? FILE_BYTES : FILES * FILE_BYTES;

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, kind, size, FILES, kind == PU_LAYOUT_TABLE ? 48 : 0), 0);
	b.layout.chunk = 1536;
	for (uint32_t i = 0; i < b.layout.nr_extents; i++)
		b.layout.extents[i] = (struct pu_extent){
			.start = i * 12288, .length = 12288, .file = i % FILES, .offset = i / FILES * 12288
		};
	open_bench(&b, memory);
	random_requests(&b);
	close_bench(&b);
	close_files();
}

static void a_failed_leg_is_told_before_the_answer(void)
{
	struct bench b = { 0 };

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_MIRROR, FILE_BYTES, FILES, 0), 0);
	open_bench(&b, false);
	CHECK_EQUAL(ftruncate(fds[0], 0), 0);
	CHECK_EQUAL(request(&b, 0, PU_OP_READ, 0, 4096), 4096);
	CHECK_EQUAL(pu_layout_leg(&b.layout, 0), PU_LEG_FAILED);
	CHECK_EQUAL(b.layout.legs[0].errors, 1);
	CHECK_EQUAL(request(&b, 1, PU_OP_WRITE, 4096, 4096), 4096);
	CHECK_EQUAL(lseek(fds[0], 0, SEEK_END), 0); /* left alone */
	close_bench(&b);
	close_files();
}

static void a_gated_write_waits(void)
{
	struct bench b = { 0 };

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_MIRROR, FILE_BYTES, FILES, 0), 0);
	open_bench(&b, false);
	pu_layout_gate(&b.layout, 0);
	CHECK(pu_layout_quiet(&b.layout, 0));
	CHECK_EQUAL(pu_queue_inject(&b.queue, 0, PU_OP_WRITE, 0, 8), 0);
	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000), 0);
	CHECK_EQUAL(pu_queue_held(&b.queue), 1);
	CHECK(pu_layout_quiet(&b.layout, 0));
	pu_layout_gate(&b.layout, PU_NO_REGION);
	while (pu_queue_held(&b.queue))
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000000), 0);
	CHECK_EQUAL(b.queue.tags[0].result, 4096);
	close_bench(&b);
	close_files();
}

static void a_plan_with_more_parts_than_slots(void)
{
	struct pu_extent parts[512];
	struct bench b = { 0 };

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_PLANNED, FILE_BYTES, FILES, 0), 0);
	open_bench(&b, false);
	for (uint32_t i = 0; i < 512; i++)
		parts[i] = (struct pu_extent){
			.file = i % FILES, .offset = (511 - i) / FILES * 512, .length = 512
		};
	CHECK_EQUAL(pu_queue_inject(&b.queue, 2, PU_OP_WRITE, 0, 512), 0);
	memset(pu_queue_buffer(&b.queue, 2), 7, BUFFER);
	CHECK_EQUAL(pu_mapped_turn(&b.mapped, 0), 1);
	CHECK_EQUAL(pu_mapped_plan(&b.mapped, 2, parts, 511), -EINVAL);
	CHECK_EQUAL(pu_mapped_plan(&b.mapped, 2, parts, 512), 0);
	while (pu_queue_held(&b.queue))
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000000), 0);
	CHECK_EQUAL(b.queue.tags[2].result, 512 * 512);
	for (uint32_t i = 0; i < 512; i++) {
		uint8_t byte = 0;

		CHECK_EQUAL(pread(fds[parts[i].file], &byte, 1, (off_t)parts[i].offset + 511), 1);
		CHECK_EQUAL(byte, 7);
	}
	close_bench(&b);
	close_files();
}

int main(void)
{
	for (int memory = 0; memory < 2; memory++) {
		layouts_keep_bytes(PU_LAYOUT_TABLE, memory);
		layouts_keep_bytes(PU_LAYOUT_STRIPE, memory);
		layouts_keep_bytes(PU_LAYOUT_MIRROR, memory);
	}
	a_failed_leg_is_told_before_the_answer();
	a_gated_write_waits();
	a_plan_with_more_parts_than_slots();
	return 0;
}
