/* SPDX-License-Identifier: MIT
 * Layouts, and requests served from files by a loopback queue's ring.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "bench.h"

static void random_requests(struct bench *b)
{
	unsigned seed = 7;

	for (int i = 0; i < 300; i++) {
		uint64_t length = (1 + (uint64_t)rand_r(&seed) % 200) * 512;
		uint64_t offset = (uint64_t)rand_r(&seed) % ((b->layout.size - length) / 512 + 1) * 512;
		uint16_t tag = (uint16_t)(rand_r(&seed) % DEPTH);
		uint8_t *buffer = pu_queue_next_buffer(&b->queue, tag);

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
	if (kind == PU_LAYOUT_MIRROR)
		make_mirror(&b.mirror, &b.layout, 0);
	else
		CHECK_EQUAL(pu_layout_init(&b.layout, kind, size, FILES,
					   kind == PU_LAYOUT_TABLE ? 48 : 0), 0);
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

static void nothing_beyond_the_size(void)
{
	uint64_t size = FILES * FILE_BYTES;
	struct bench b = { 0 };

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_STRIPE, size, FILES, 0), 0);
	b.layout.chunk = 4096;
	open_bench(&b, false);
	CHECK_EQUAL(request(&b, 1, PU_OP_WRITE, size - 512, 1024), -EIO);
	CHECK_EQUAL(request(&b, 1, PU_OP_READ, size, 512), -EIO);
	CHECK_EQUAL(request(&b, 1, PU_OP_READ, size - 512, 512), 512);
	close_bench(&b);
	close_files();
}

static void a_plan_with_more_parts_than_slots(void)
{
	struct pu_extent parts[512];
	struct bench b = { 0 };

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_PER_REQUEST, BUFFER, FILES, 0), 0);
	open_bench(&b, false);
	for (uint32_t i = 0; i < 512; i++)
		parts[i] = (struct pu_extent){
			.file = i % FILES, .offset = (511 - i) / FILES * 512, .length = 512
		};
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 2, PU_OP_WRITE, 0, 512), 0);
	memset(pu_queue_next_buffer(&b.queue, 2), 7, BUFFER);
	CHECK_EQUAL(pu_mapped_turn(&b.mapped, 0), 1);
	CHECK_EQUAL(pu_mapped_plan(&b.mapped, 2, parts, 511), -EINVAL);
	CHECK_EQUAL(pu_mapped_plan(&b.mapped, 2, parts, 512), 0);
	while (pu_queue_held(&b.queue))
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000000), 0);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 2), 512 * 512);
	for (uint32_t i = 0; i < 512; i++) {
		uint8_t byte = 0;

		CHECK_EQUAL(pread(fds[parts[i].file], &byte, 1, (off_t)parts[i].offset + 511), 1);
		CHECK_EQUAL(byte, 7);
	}
	close_bench(&b);
	close_files();
}

/* A file in memory has no zeroed ranges, but holes. */
static void one_way_of_zeroing_that_fails_leaves_the_other(void)
{
	uint64_t size = FILES * FILE_BYTES;
	struct bench b = { 0 };
	struct stat about;

	make_files();
	CHECK_EQUAL(pu_layout_init(&b.layout, PU_LAYOUT_STRIPE, size, FILES, 0), 0);
	b.layout.chunk = FILE_BYTES;
	open_bench(&b, false);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE_ZEROES | PU_FLAG_NOUNMAP, 0, size), 0);
	CHECK_EQUAL(fstat(fds[0], &about), 0);
	CHECK_EQUAL(about.st_blocks, FILE_BYTES / 512);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE_ZEROES, 0, size), 0);
	CHECK_EQUAL(fstat(fds[0], &about), 0);
	CHECK_EQUAL(about.st_blocks, 0);
	close_bench(&b);
	close_files();
}

/* The kernel copies from it then, without a stop in between. */
static void memory_that_can_only_be_read_is_mapped_too(void)
{
	struct pu_layout layout;
	char path[64];
	int readable;

	make_files();
	CHECK_EQUAL(pwrite(fds[1], "below", 5, 512), 5);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[1]);
	readable = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(readable >= 0);
	CHECK_EQUAL(pu_layout_init(&layout, PU_LAYOUT_TABLE, FILE_BYTES, 2, 1), 0);
	pu_layout_set_file(&layout, 0, fds[0], true, false);
	pu_layout_set_file(&layout, 1, readable, true, false);
	pu_layout_map_memory(&layout);
	CHECK(pu_layout_is_mapped(&layout));
	CHECK_EQUAL(memcmp(layout.files[1].map.bytes + 512, "below", 5), 0);
	pu_layout_destroy(&layout);
	close(readable);
	close_files();
}

#define ROUNDS 400
#define BLOCK 4096

/* One of two queues of a disk, with its own thread; a file takes the place of the char device. */
struct side {
	struct pu_queue queue;
	struct pu_mapped mapped;
	struct pu_layout *layout;
	pthread_barrier_t *together;
	pthread_t thread;
	int device;
	uint16_t number;
	uint32_t op;
};

static void make_mapped(struct pu_layout *layout)
{
	make_files();
	CHECK_EQUAL(pu_layout_init(layout, PU_LAYOUT_TABLE, FILE_BYTES, FILES, 1), 0);
	layout->extents[0] = (struct pu_extent){ .length = FILE_BYTES };
	for (uint32_t i = 0; i < FILES; i++)
		pu_layout_set_file(layout, i, fds[i], true, false);
	pu_layout_map_memory(layout);
}

static void open_side(struct side *side)
{
	struct pu_queue_options options = {
		.depth = 1,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_mapped_entries(&pu_direct, 1),
		.files = fds,
		.nr_files = FILES,
	};

	CHECK_EQUAL(pu_queue_open(&side->queue, -1, &options), 0);
	side->queue.id = side->number;
	side->queue.user_copy = true;
	side->queue.cdev = side->device;
	CHECK_EQUAL(pu_mapped_open(&side->mapped, &side->queue, side->layout, &pu_direct,
				   side->layout->version), 0);
	CHECK_EQUAL(pu_queue_fetch(&side->queue), 0);
}

static void *ask_again_and_again(void *argument)
{
	struct side *side = argument;

	open_side(side);
	for (int i = 0; i < ROUNDS; i++) {
		pthread_barrier_wait(side->together);
		CHECK_EQUAL(pu_loopback_inject(&side->queue, 0, side->op, 0, FILE_BYTES >> 9), 0);
		while (pu_queue_held(&side->queue))
			CHECK(pu_mapped_turn(&side->mapped, 1000000000) >= 0);
		CHECK(pu_loopback_result(&side->queue, 0) >= 0);
		pthread_barrier_wait(side->together);
		pthread_barrier_wait(side->together); /* while somebody looks */
	}
	CHECK(pu_queue_close(&side->queue));
	pu_mapped_close(&side->mapped);
	pu_queue_free(&side->queue);
	return NULL;
}

/* Straight copies to and from mapped files, which the kernel does not keep apart: in the end a block
 * is what one of them made of it. */
static void overlapping_requests_stay_whole(uint32_t other)
{
	static uint8_t data[FILE_BYTES];
	int device = memfd_create("device", MFD_CLOEXEC);
	struct side sides[2] = { 0 };
	pthread_barrier_t together;
	struct pu_layout layout;

	make_mapped(&layout);
	CHECK_EQUAL(pthread_barrier_init(&together, NULL, 3), 0);
	for (int i = 0; i < 2; i++) {
		memset(data, i + 1, sizeof(data));
		CHECK_EQUAL(pwrite(device, data, sizeof(data),
				   (off_t)pu_user_copy_offset((uint16_t)i, 0, 0)), sizeof(data));
		sides[i].layout = &layout;
		sides[i].together = &together;
		sides[i].device = device;
		sides[i].number = (uint16_t)i;
		sides[i].op = i ? other : PU_OP_WRITE;
		CHECK_EQUAL(pthread_create(&sides[i].thread, NULL, ask_again_and_again, &sides[i]), 0);
	}
	for (int round = 0; round < ROUNDS; round++) {
		pthread_barrier_wait(&together);
		pthread_barrier_wait(&together);
		CHECK_EQUAL(pread(fds[0], data, FILE_BYTES, 0), FILE_BYTES);
		for (size_t at = 0; at < FILE_BYTES; at += BLOCK)
			CHECK(!memcmp(data + at, data + at + 1, BLOCK - 1));
		pthread_barrier_wait(&together);
	}
	for (int i = 0; i < 2; i++)
		pthread_join(sides[i].thread, NULL);
	pu_layout_destroy(&layout);
	pthread_barrier_destroy(&together);
	close(device);
	close_files();
}

/* The only queue of a layout in memory. */
static void open_alone(struct side *side, struct pu_layout *layout)
{
	*side = (struct side){ .layout = layout, .device = memfd_create("device", MFD_CLOEXEC) };
	make_mapped(layout);
	CHECK_EQUAL(ftruncate(side->device, (off_t)pu_user_copy_offset(0, 0, FILE_BYTES)), 0);
	open_side(side);
}

static void close_alone(struct side *side)
{
	CHECK(pu_queue_close(&side->queue));
	pu_mapped_close(&side->mapped);
	pu_queue_free(&side->queue);
	pu_layout_destroy(side->layout);
	close(side->device);
	close_files();
}

static void ask_once(struct side *side, uint32_t op, uint64_t offset, uint64_t length)
{
	CHECK_EQUAL(pu_loopback_inject(&side->queue, 0, op, offset >> 9, (uint32_t)(length >> 9)), 0);
	CHECK(pu_mapped_turn(&side->mapped, 0) >= 0);
	CHECK_EQUAL(pu_queue_held(&side->queue), 0);
	CHECK(pu_loopback_result(&side->queue, 0) >= 0);
}

/* One queue keeps its own apart by doing each in the turn that brings it. What went on in its ring,
 * such as zeroes where a file has no way of its own to make them, would meet the next write. */
static void a_queue_does_one_after_the_other(void)
{
	static const uint32_t ops[] = { PU_OP_WRITE, PU_OP_READ, PU_OP_DISCARD, PU_OP_WRITE_ZEROES,
					PU_OP_WRITE_ZEROES | PU_FLAG_NOUNMAP };
	struct pu_layout layout;
	struct side side;

	open_alone(&side, &layout);
	for (size_t i = 0; i < sizeof(ops) / sizeof(ops[0]); i++)
		ask_once(&side, ops[i], 0, FILE_BYTES);
	close_alone(&side);
}

static uint64_t allocated(int fd)
{
	struct stat about;

	CHECK_EQUAL(fstat(fd, &about), 0);
	return (uint64_t)about.st_blocks * 512;
}

/* A read by way of the mapping would allocate what is not there. */
static void a_hole_that_is_read_stays_a_hole(void)
{
	static const uint64_t page = 4096;
	struct pu_layout layout;
	struct side side;

	open_alone(&side, &layout);
	for (int round = 0; round < 2; round++) {
		ask_once(&side, PU_OP_READ, 0, FILE_BYTES);
		CHECK_EQUAL(allocated(fds[0]), 0);
		ask_once(&side, PU_OP_WRITE, 3 * page, page);
		ask_once(&side, PU_OP_READ, 3 * page, page);
		ask_once(&side, PU_OP_READ, 2 * page, 3 * page); /* holes on both sides */
		CHECK_EQUAL(allocated(fds[0]), page);
		ask_once(&side, PU_OP_WRITE, 0, FILE_BYTES);
		ask_once(&side, PU_OP_READ, 0, FILE_BYTES);
		ask_once(&side, PU_OP_DISCARD, page, FILE_BYTES - 2 * page);
		ask_once(&side, PU_OP_READ, 0, FILE_BYTES);
		CHECK_EQUAL(allocated(fds[0]), 2 * page);
		ask_once(&side, PU_OP_WRITE_ZEROES, 0, FILE_BYTES);
	}
	close_alone(&side);
}

/* Which pages are there is remembered, for each and in any number of words. */
static void pages_that_are_there_are_remembered(void)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), pages = 300;
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct pu_file_map map;

	CHECK_EQUAL(ftruncate(fd, (off_t)(pages * page - 512)), 0);
	pu_file_map_open(&map, fd);
	CHECK(map.bytes && map.there);
	for (uint64_t first = 0; first < pages; first += 37)
		for (uint64_t last = first; last < pages; last += 41) {
			uint64_t end = last + 1 == pages ? pages * page - 512 : (last + 1) * page;

			pu_file_map_note(&map, first * page + 512, end - first * page - 512);
			for (uint64_t at = 0; at < pages; at++)
				CHECK_EQUAL(pu_file_map_holds(&map, at * page, 512),
					    at >= first && at <= last);
			CHECK(pu_file_map_holds(&map, first * page, end - first * page));
			pu_file_map_forget(&map, first * page, 2 * pages * page);
			CHECK(!pu_file_map_holds(&map, first * page, end - first * page));
		}
	for (uint64_t at = 64; at < pages; at += 5)
		CHECK_EQUAL(pwrite(fd, "there", 5, (off_t)(at * page)), 5);
	CHECK(!pu_file_map_holds(&map, 63 * page, 2 * page));
	CHECK_EQUAL(map.there[0], 0); /* asked of all at once */
	CHECK_EQUAL(map.there[1], UINT64_C(0x1084210842108421));
	for (uint64_t at = 0; at < pages; at++)
		CHECK_EQUAL(pu_file_map_holds(&map, at * page, 512), at >= 64 && (at - 64) % 5 == 0);
	pu_file_map_close(&map);
	close(fd);
}

/* The kernel keeps from strangers what is there of a file, and says that all of it is. */
static void what_strangers_are_told_is_not_believed(void)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct pu_file_map map;

	CHECK_EQUAL(ftruncate(fd, (off_t)(100 * page)), 0);
	CHECK_EQUAL(fchmod(fd, 0600), 0);
	pu_file_map_open(&map, fd);
	if (!geteuid()) { /* nobody else becomes a stranger */
		CHECK_EQUAL(seteuid(65534), 0);
		CHECK(!pu_file_map_holds(&map, 0, 100 * page));
		pu_file_map_note(&map, 70 * page, page);
		CHECK(pu_file_map_holds(&map, 70 * page, page)); /* it has written that itself */
		CHECK_EQUAL(seteuid(0), 0);
		CHECK(!pu_file_map_holds(&map, 0, page));
	}
	CHECK_EQUAL(fallocate(fd, 0, 0, (off_t)(100 * page)), 0);
	memset(map.bytes, 1, 100 * page);
	CHECK(pu_file_map_holds(&map, 0, 100 * page)); /* also where nothing is a hole */
	pu_file_map_close(&map);
	close(fd);
}

#ifndef __SANITIZE_THREAD__ /* whose own memory grows with what is looked at */
static long own_kilobytes(void)
{
	char line[128];
	long found = -1;
	FILE *status = fopen("/proc/self/status", "re");

	CHECK(status);
	while (found < 0 && fgets(line, sizeof(line), status))
		if (!strncmp(line, "RssAnon:", 8))
			found = strtol(line + 8, NULL, 10);
	fclose(status);
	CHECK(found >= 0);
	return found;
}

/* As mkfs does with a large disk. */
static void a_discard_of_all_takes_no_memory(void)
{
	const uint64_t length = UINT64_C(1) << 40;
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct pu_file_map map;
	long before;

	CHECK_EQUAL(ftruncate(fd, (off_t)length), 0);
	pu_file_map_open(&map, fd);
	CHECK(map.bytes);
	before = own_kilobytes();
	pu_file_map_forget(&map, 0, length);
	CHECK(own_kilobytes() - before < 4096);
	pu_file_map_close(&map);
	close(fd);
}
#endif

/* Cut by a resize, and extended by the next one. */
static void what_was_cut_off_is_forgotten(enum pu_layout_kind kind)
{
	const uint64_t page = 4096;
	struct pu_layout layout;
	int nr = kind == PU_LAYOUT_STRIPE ? FILES : 1;

	make_files();
	CHECK_EQUAL(pu_layout_init(&layout, kind, FILE_BYTES * (uint64_t)nr, FILES, nr == 1), 0);
	layout.chunk = page;
	layout.extents[0] = (struct pu_extent){ .length = FILE_BYTES };
	for (int i = 0; i < nr; i++) {
		pu_layout_set_file(&layout, (uint32_t)i, fds[i], true, false);
		CHECK_EQUAL(fallocate(fds[i], 0, 0, FILE_BYTES), 0);
	}
	pu_layout_map_memory(&layout);
	for (int i = 0; i < nr; i++)
		pu_file_map_note(&layout.files[i].map, 0, FILE_BYTES);
	CHECK_EQUAL(pu_layout_resize(&layout, 8 * page * (uint64_t)nr), 0);
	for (int i = 0; i < nr; i++) {
		CHECK_EQUAL(ftruncate(fds[i], (off_t)(8 * page)), 0);
		CHECK_EQUAL(ftruncate(fds[i], FILE_BYTES), 0);
	}
	CHECK_EQUAL(pu_layout_resize(&layout, FILE_BYTES * (uint64_t)nr), 0);
	for (int i = 0; i < nr; i++) {
		CHECK(pu_file_map_holds(&layout.files[i].map, 0, 8 * page));
		CHECK(!pu_file_map_holds(&layout.files[i].map, 8 * page, page));
		CHECK(!pu_file_map_holds(&layout.files[i].map, FILE_BYTES - page, page));
	}
	pu_layout_destroy(&layout);
	close_files();
}

int main(void)
{
	for (int memory = 0; memory < 2; memory++) {
		layouts_keep_bytes(PU_LAYOUT_TABLE, memory);
		layouts_keep_bytes(PU_LAYOUT_STRIPE, memory);
		layouts_keep_bytes(PU_LAYOUT_MIRROR, memory);
	}
	nothing_beyond_the_size();
	a_plan_with_more_parts_than_slots();
	one_way_of_zeroing_that_fails_leaves_the_other();
	memory_that_can_only_be_read_is_mapped_too();
	pages_that_are_there_are_remembered();
	what_strangers_are_told_is_not_believed();
#ifndef __SANITIZE_THREAD__
	a_discard_of_all_takes_no_memory();
#endif
	what_was_cut_off_is_forgotten(PU_LAYOUT_TABLE);
	what_was_cut_off_is_forgotten(PU_LAYOUT_STRIPE);
	a_hole_that_is_read_stays_a_hole();
	overlapping_requests_stay_whole(PU_OP_WRITE);
	overlapping_requests_stay_whole(PU_OP_DISCARD);
	overlapping_requests_stay_whole(PU_OP_WRITE_ZEROES);
	overlapping_requests_stay_whole(PU_OP_WRITE_ZEROES | PU_FLAG_NOUNMAP);
	a_queue_does_one_after_the_other();
	return 0;
}
