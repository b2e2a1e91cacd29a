/* SPDX-License-Identifier: MIT
 * The presence map, and queues that serve a disk by it. A pipe is a file below that hangs: reads of it
 * wait until somebody writes.
 */
#define _GNU_SOURCE
#include "present.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "answer.h"
#include "check.h"
#include "deferred.h"
#include "direct.h"
#include "loopback.h"
#include "open.h"
#include "work.h"

#define DEPTH 4
#define BUFFER (64 * 1024)
#define BLOCK 4096u
#define BLOCKS 40u
#define SIZE (BLOCKS * BLOCK)
#define MOST_FILES 5

/* ---- a disk, and its queues ---- */

struct disk {
	int fds[MOST_FILES];
	uint32_t nr_files;
	uint64_t size, buffer; /* bytes; 0: SIZE, BUFFER */
	struct pu_layout layout, bottom;
	struct pu_presence map, deeper;
	uint64_t bits[PU_PRESENCE_PAGE / 8], deeper_bits[PU_PRESENCE_PAGE / 8];
	const struct pu_policy *policy;
	bool memory;
};

struct side {
	struct disk *disk;
	struct pu_queue queue;
	struct pu_mapped mapped;
};

static uint8_t pattern(uint32_t file, uint64_t offset)
{
	return (uint8_t)(offset / 512 * 7 + file * 101 + 1);
}

static int make_file(uint32_t number, uint64_t size)
{
	int fd = memfd_create("file", MFD_CLOEXEC);
	uint8_t sector[512];

	CHECK(fd >= 0);
	for (uint64_t at = 0; number && at < size; at += sizeof(sector)) {
		memset(sector, pattern(number, at), sizeof(sector));
		CHECK_EQUAL(pwrite(fd, sector, sizeof(sector), (off_t)at), sizeof(sector));
	}
	CHECK_EQUAL(ftruncate(fd, (off_t)size), 0);
	return fd;
}

/* Over `below` files, or over what is asked for. */
static void make_disk(struct disk *d, uint32_t below, const struct pu_presence_options *given)
{
	struct pu_presence_options options = given ? *given : (struct pu_presence_options){ 0 };

	if (!d->size)
		d->size = SIZE;
	options.block_bytes = options.block_bytes ? options.block_bytes : BLOCK;
	options.present = d->bits;
	d->nr_files = below + 1;
	CHECK_EQUAL(pu_layout_init(&d->layout, PU_LAYOUT_TABLE, d->size, d->nr_files, 1), 0);
	d->layout.extents[0].length = d->size;
	for (uint32_t i = 0; i < d->nr_files; i++) {
		d->fds[i] = make_file(i, d->size);
		pu_layout_set_file(&d->layout, i, d->fds[i], d->memory, false);
	}
	CHECK_EQUAL(pu_presence_init(&d->map, &d->layout, &options), 0);
	d->policy = pu_present(&d->map);
}

/* The files below, one after the other. */
static void lie_over_table(struct disk *d)
{
	uint32_t below = d->nr_files - 1;

	CHECK_EQUAL(pu_layout_init(&d->bottom, PU_LAYOUT_TABLE, d->size, below, below), 0);
	for (uint32_t i = 0; i < below; i++) {
		uint64_t piece = d->size / below / 512 * 512;

		d->bottom.extents[i] = (struct pu_extent){
			.start = i * piece,
			.length = i + 1 < below ? piece : d->size - i * piece,
			.offset = 0,
			.file = i,
		};
	}
	d->map.bottom = &d->bottom;
}

static void lie_over_stripe(struct disk *d, uint64_t chunk)
{
	CHECK_EQUAL(pu_layout_init(&d->bottom, PU_LAYOUT_STRIPE, d->size, d->nr_files - 1, 0), 0);
	d->bottom.chunk = chunk;
	d->map.bottom = &d->bottom;
}

static void end_disk(struct disk *d)
{
	pu_presence_destroy(&d->map);
	if (d->deeper.layout)
		pu_presence_destroy(&d->deeper);
	pu_layout_destroy(&d->layout);
	pu_layout_destroy(&d->bottom);
	for (uint32_t i = 0; i < d->nr_files; i++)
		close(d->fds[i]);
}

static void open_side(struct side *s, struct disk *d)
{
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = d->buffer ? d->buffer : BUFFER,
		.extra_entries = pu_mapped_entries(d->policy, DEPTH),
		.files = d->fds,
		.nr_files = d->nr_files,
	};

	*s = (struct side){ .disk = d };
	CHECK_EQUAL(pu_queue_open(&s->queue, -1, &options), 0);
	CHECK_EQUAL(pu_mapped_open(&s->mapped, &s->queue, &d->layout, d->policy, d->layout.version), 0);
	CHECK_EQUAL(pu_queue_fetch(&s->queue), 0);
}

static void close_side(struct side *s)
{
	CHECK(pu_queue_close(&s->queue));
	pu_mapped_close(&s->mapped);
	pu_queue_free(&s->queue);
}

static uint8_t *memory_of(struct side *s, uint16_t tag)
{
	return pu_queue_next_buffer(&s->queue, tag);
}

static void begin(struct side *s, uint16_t tag, uint32_t op, uint64_t offset, uint64_t length)
{
	CHECK_EQUAL(pu_loopback_inject(&s->queue, tag, op, offset >> 9, (uint32_t)(length >> 9)), 0);
}

static void begin_write(struct side *s, uint16_t tag, uint64_t offset, uint64_t length, uint8_t byte)
{
	memset(memory_of(s, tag), byte, length);
	begin(s, tag, PU_OP_WRITE, offset, length);
}

static void turn(struct side *s)
{
	CHECK(pu_mapped_turn(&s->mapped, 2000000) >= 0);
	s->mapped.to_tell = false;
}

static bool is_over(const struct side *s, uint16_t tag)
{
	return pu_tag_state(&s->queue.tags[tag]) == PU_TAG_FETCHING;
}

static int32_t end(struct side *s, uint16_t tag)
{
	for (int i = 0; i < 1000 && !is_over(s, tag); i++)
		turn(s);
	CHECK(is_over(s, tag));
	return pu_loopback_result(&s->queue, tag);
}

static int32_t request(struct side *s, uint32_t op, uint64_t offset, uint64_t length)
{
	begin(s, 0, op, offset, length);
	return end(s, 0);
}

/* It waits, whatever turns there are. */
static void check_waits(struct side *s, uint16_t tag)
{
	for (int i = 0; i < 3; i++)
		turn(s);
	CHECK(!is_over(s, tag));
}

static uint8_t byte_of(struct side *s, uint64_t offset)
{
	CHECK_EQUAL(request(s, PU_OP_READ, offset / 512 * 512, 512), 512);
	return memory_of(s, 0)[0];
}

/* ---- the map itself ---- */

static void blocks_are_held_by_one(void)
{
	struct disk d = { 0 };
	struct pu_presence *p = &d.map;
	uint64_t first = 0;
	bool present;

	d.size = 300 * BLOCK;
	make_disk(&d, 0, NULL);
	CHECK(pu_presence_hold(p, 60, 200));
	CHECK(!pu_presence_hold(p, 10, 61));
	CHECK(!pu_presence_hold(p, 199, 300));
	CHECK(!pu_presence_hold(p, 0, 300)); /* and lets go of what it had */
	CHECK_EQUAL(pu_presence_claim(p, &first, 300, 1000), 60);
	CHECK_EQUAL(first, 0);
	first = 60;
	CHECK_EQUAL(pu_presence_claim(p, &first, 300, 7), 7);
	CHECK_EQUAL(first, 200);
	first = 60;
	CHECK_EQUAL(pu_presence_claim(p, &first, 300, 1000), 93);
	CHECK_EQUAL(first, 207);
	CHECK_EQUAL(pu_presence_claim(p, &first, 300, 1000), 0);
	pu_presence_let_go(p, 60, 200, true);
	CHECK(pu_presence_hold(p, 60, 200)); /* nothing there is absent */
	CHECK(!pu_presence_hold(p, 0, 200));
	pu_presence_let_go(p, 0, 60, false);
	CHECK(pu_presence_hold(p, 0, 200));
	CHECK_EQUAL(pu_presence_count(p, 0, 300), 140);
	CHECK_EQUAL(pu_presence_run(p, 0, 300, &present), 60);
	CHECK(!present);
	CHECK_EQUAL(pu_presence_run(p, 70, 300, &present), 130);
	CHECK(present);
	CHECK_EQUAL(pu_presence_run(p, 100, 130, &present), 30);
	CHECK(!pu_presence_has_all(p, 59, 70));
	CHECK(pu_presence_has_all(p, 60, 200));
	end_disk(&d);
}

static void evicted_blocks_are_held(void)
{
	struct pu_presence_options options = { .evicts = true, .gated = true };
	struct disk d = { 0 };
	struct pu_presence *p = &d.map;
	uint64_t first = 0;

	make_disk(&d, 0, &options);
	CHECK(pu_presence_hold(p, 4, 12));
	pu_presence_let_go(p, 4, 12, true);
	pu_presence_set_writable(p, 6, 7, true);
	CHECK_EQUAL(pu_presence_evict(p, &first, BLOCKS), 2);
	CHECK_EQUAL(first, 4);
	CHECK_EQUAL(pu_presence_evict(p, &first, 9), 2);
	CHECK_EQUAL(first, 7); /* what may be written stays */
	CHECK(pu_presence_has(p, 6));
	CHECK(!pu_presence_has(p, 7));
	CHECK(!pu_presence_hold(p, 0, 6));
	pu_presence_let_go(p, 4, 6, false);
	pu_presence_let_go(p, 7, 9, false);
	CHECK(pu_presence_hold(p, 0, 9));
	d.bits[0] |= 1u << 2; /* somebody fills it, and has not let go of it yet */
	first = 0;
	CHECK_EQUAL(pu_presence_evict(p, &first, 4), 0);
	CHECK(pu_presence_has(p, 2));
	end_disk(&d);
}

static void pages_are_dirty_until_they_are_taken(void)
{
	struct disk d = { 0 };
	struct pu_presence *p = &d.map;
	uint64_t page = 0;

	make_disk(&d, 0, NULL);
	CHECK(pu_presence_is_synced(p));
	CHECK(pu_presence_hold(p, 0, 1));
	CHECK(pu_presence_is_synced(p));
	pu_presence_let_go(p, 0, 1, true);
	CHECK(!pu_presence_is_synced(p));
	pu_presence_begin_sync(p);
	CHECK(pu_presence_take_dirty(p, &page));
	CHECK_EQUAL(page, 0);
	CHECK(!pu_presence_take_dirty(p, &page));
	CHECK(!pu_presence_is_synced(p)); /* it is not written yet */
	pu_presence_mark_dirty(p, 0);
	pu_presence_mark_dirty(p, 0);
	pu_presence_end_sync(p);
	CHECK(!pu_presence_is_synced(p));
	CHECK(pu_presence_take_dirty(p, &page));
	CHECK(pu_presence_is_synced(p));
	end_disk(&d);
}

static void a_failure_concerns_who_waits_for_its_blocks(void)
{
	struct disk d = { 0 };
	struct pu_presence *p = &d.map;
	uint64_t since;

	make_disk(&d, 0, NULL);
	since = pu_presence_next_failure(p);
	CHECK_EQUAL(pu_presence_failure(p, since, 0, BLOCKS), 0);
	pu_presence_fail(p, 3, 5, -ENXIO);
	CHECK_EQUAL(pu_presence_failure(p, since, 0, 3), 0);
	CHECK_EQUAL(pu_presence_failure(p, since, 4, 9), -ENXIO);
	CHECK_EQUAL(pu_presence_failure(p, pu_presence_next_failure(p), 4, 9), 0);
	CHECK(pu_presence_hold(p, 4, 5));
	pu_presence_let_go(p, 4, 5, true);
	CHECK_EQUAL(pu_presence_failure(p, since, 4, 9), 0); /* it is there by now */
	CHECK_EQUAL(pu_presence_failure(p, since, 3, 9), -ENXIO);
	end_disk(&d);
}

/* ---- whatever is asked for, the disk has what was written, or what is below ---- */

static uint8_t below_at(const struct disk *d, uint64_t offset)
{
	struct pu_part part = { 0 };
	uint64_t cut = 0;

	pu_layout_part(&d->bottom, offset, 512, &cut, &part);
	return pattern(part.file + 1, part.offset);
}

static void check_all(struct side *s, const uint8_t *expected)
{
	const struct disk *d = s->disk;

	for (uint64_t at = 0, step; at < d->size; at += step) {
		step = d->size - at < BUFFER ? d->size - at : BUFFER;
		CHECK_EQUAL(request(s, PU_OP_READ, at, step), (int64_t)step);
		for (uint64_t i = 0; i < step; i++)
			CHECK_EQUAL(memory_of(s, 0)[i], expected[at + i]);
	}
}

static void use_at_random(struct disk *d)
{
	uint8_t *expected = malloc(d->size);
	struct side s;

	open_side(&s, d);
	for (uint64_t at = 0; at < d->size; at++)
		expected[at] = below_at(d, at / 512 * 512);
	check_all(&s, expected);
	for (int i = 0; i < 150; i++) {
		uint64_t offset = (uint64_t)rand() % (d->size / 512) * 512;
		uint64_t length = ((uint64_t)rand() % 40 + 1) * 512;
		uint32_t op = (uint32_t[]){ PU_OP_READ, PU_OP_WRITE, PU_OP_WRITE_ZEROES,
					    PU_OP_DISCARD }[rand() % 4];
		uint8_t byte = op == PU_OP_WRITE ? (uint8_t)rand() : 0;

		if (length > d->size - offset)
			length = d->size - offset;
		if (op == PU_OP_WRITE)
			memset(memory_of(&s, 0), byte, length);
		CHECK_EQUAL(request(&s, op, offset, length),
			    op == PU_OP_READ || op == PU_OP_WRITE ? (int64_t)length : 0);
		if (op != PU_OP_READ)
			memset(expected + offset, byte, length);
		for (uint64_t at = 0; op == PU_OP_READ && at < length; at++)
			CHECK_EQUAL(memory_of(&s, 0)[at], expected[offset + at]);
	}
	check_all(&s, expected);
	close_side(&s);
	free(expected);
}

static void disks_over_files(void)
{
	for (int i = 0; i < 8; i++) {
		struct disk d = { .memory = i & 1, .size = i & 2 ? SIZE : SIZE - 1536 };
		struct pu_presence_options options = { .block_bytes = i & 1 ? 8192 : BLOCK };

		make_disk(&d, 3, &options);
		if (i & 4)
			lie_over_stripe(&d, 2048);
		else
			lie_over_table(&d);
		use_at_random(&d);
		end_disk(&d);
	}
}

/* A map over a map that does not change. */
static void disks_over_maps(void)
{
	struct pu_presence_options options = { .block_bytes = 8192 };
	struct disk d = { 0 };
	struct side s;

	make_disk(&d, 2, NULL);
	options.present = d.deeper_bits;
	CHECK_EQUAL(pu_presence_init(&d.deeper, &d.layout, &options), 0);
	CHECK_EQUAL(pu_layout_init(&d.bottom, PU_LAYOUT_TABLE, d.size, 1, 1), 0);
	d.bottom.extents[0].length = d.size;
	d.deeper.bottom = d.map.bottom = &d.bottom;
	d.map.next = &d.deeper;
	CHECK(pu_presence_hold(&d.deeper, 1, 3)); /* bytes 8192 to 24576 */
	pu_presence_let_go(&d.deeper, 1, 3, true);
	open_side(&s, &d);
	CHECK_EQUAL(byte_of(&s, 4096), pattern(2, 4096));
	CHECK_EQUAL(byte_of(&s, 8192), pattern(1, 8192));
	CHECK_EQUAL(byte_of(&s, 24064), pattern(1, 24064));
	CHECK_EQUAL(byte_of(&s, 24576), pattern(2, 24576));
	begin_write(&s, 1, 24064, 1024, 0xee); /* edges from both */
	CHECK_EQUAL(end(&s, 1), 1024);
	CHECK_EQUAL(request(&s, PU_OP_READ, 20480, 8192), 8192);
	for (uint64_t at = 20480; at < 28672; at += 512) {
		uint8_t expected = pattern(at < 24576 ? 1 : 2, at);

		CHECK_EQUAL(memory_of(&s, 0)[at - 20480],
			    at >= 24064 && at < 25088 ? 0xee : expected);
	}
	close_side(&s);
	end_disk(&d);
}

/* ---- two queues, one block ---- */

/* What is below becomes a pipe; the end to write to. */
static int make_slow(struct disk *d)
{
	int ends[2];

	CHECK_EQUAL(pipe2(ends, O_CLOEXEC), 0);
	close(d->fds[1]);
	d->fds[1] = ends[0];
	pu_layout_set_file(&d->layout, 1, ends[0], false, false);
	return ends[1];
}

static void put_below(int pipe_end, size_t length, uint8_t byte)
{
	uint8_t bytes[BLOCK];

	memset(bytes, byte, length);
	CHECK_EQUAL(write(pipe_end, bytes, length), (ssize_t)length);
}

/* A write that copies up holds its block: another waits, and comes after it. */
static void a_write_waits_for_a_copy_up(void)
{
	struct disk d = { 0 };
	struct side a, b;
	int slow;

	make_disk(&d, 1, NULL);
	lie_over_table(&d);
	slow = make_slow(&d);
	open_side(&a, &d);
	open_side(&b, &d);
	begin_write(&a, 0, 0, 512, 0xaa);
	check_waits(&a, 0);
	begin_write(&b, 0, 0, BLOCK, 0xbb);
	begin_write(&b, 1, BLOCK, BLOCK, 0xcc); /* another block: it goes on */
	CHECK_EQUAL(end(&b, 1), BLOCK);
	check_waits(&b, 0);
	put_below(slow, BLOCK - 512, 0x11);
	CHECK_EQUAL(end(&a, 0), 512);
	CHECK(pu_present_take_wake(&a.mapped));
	CHECK(!pu_present_take_wake(&a.mapped));
	CHECK_EQUAL(end(&b, 0), BLOCK);
	CHECK_EQUAL(byte_of(&a, 0), 0xbb);
	CHECK_EQUAL(byte_of(&a, 512), 0xbb);
	CHECK_EQUAL(byte_of(&a, BLOCK), 0xcc);
	CHECK_EQUAL(d.map.waiters, 0);
	close_side(&a);
	close_side(&b);
	close(slow);
	end_disk(&d);
}

/* Both write to a part of the same block: none of both is lost. */
static void parts_of_a_block_are_both_kept(void)
{
	struct disk d = { 0 };
	struct side a, b;
	int slow;

	make_disk(&d, 1, NULL);
	lie_over_table(&d);
	slow = make_slow(&d);
	open_side(&a, &d);
	open_side(&b, &d);
	begin_write(&a, 0, 0, 512, 0xaa);
	check_waits(&a, 0);
	begin_write(&b, 0, 1024, 512, 0xbb);
	check_waits(&b, 0);
	put_below(slow, BLOCK - 512, 0x11);
	CHECK_EQUAL(end(&a, 0), 512);
	CHECK_EQUAL(end(&b, 0), 512); /* the rest is there by now */
	CHECK_EQUAL(byte_of(&a, 0), 0xaa);
	CHECK_EQUAL(byte_of(&a, 512), 0x11);
	CHECK_EQUAL(byte_of(&a, 1024), 0xbb);
	CHECK_EQUAL(byte_of(&a, 1536), 0x11);
	close_side(&a);
	close_side(&b);
	close(slow);
	end_disk(&d);
}

/* What is below cannot be read: the write fails, and the block stays as it was, and free. */
static void a_copy_up_that_fails(void)
{
	struct disk d = { 0 };
	struct side s;

	make_disk(&d, 1, NULL);
	lie_over_table(&d);
	CHECK_EQUAL(ftruncate(d.fds[1], 0), 0);
	open_side(&s, &d);
	begin_write(&s, 0, 512, 512, 0xaa);
	CHECK_EQUAL(end(&s, 0), -EIO);
	CHECK(!pu_presence_has(&d.map, 0));
	CHECK(pu_presence_is_synced(&d.map));
	begin_write(&s, 0, 0, BLOCK, 0xbb);
	CHECK_EQUAL(end(&s, 0), BLOCK);
	CHECK_EQUAL(byte_of(&s, 512), 0xbb);
	close_side(&s);
	end_disk(&d);
}

/* ---- what is asked for ---- */

static struct pu_wish wished(struct side *s)
{
	struct pu_wish wish;

	for (int i = 0; i < 100; i++) {
		if (pu_present_next_wish(&s->mapped, &wish))
			return wish;
		turn(s);
	}
	CHECK(false);
	return wish;
}

static void check_wishes_nothing(struct side *s)
{
	struct pu_wish wish;

	turn(s);
	CHECK(!pu_present_next_wish(&s->mapped, &wish));
}

static void fill(struct disk *d, const struct pu_wish *wish, uint8_t byte)
{
	uint8_t block[BLOCK];

	memset(block, byte, BLOCK);
	CHECK_EQUAL(wish->kind, PU_WISH_FETCH);
	for (uint64_t at = wish->first; at < wish->end; at++)
		CHECK_EQUAL(pwrite(d->fds[0], block, BLOCK, (off_t)(at * BLOCK)), BLOCK);
	pu_presence_let_go(&d->map, wish->first, wish->end, true);
}

/* One fetch for all who want a block, also by other queues; a write to it comes after that. */
static void what_is_fetched_is_fetched_once(void)
{
	struct disk d = { 0 };
	struct pu_wish wish;
	struct side a, b;

	make_disk(&d, 0, NULL);
	open_side(&a, &d);
	open_side(&b, &d);
	begin(&a, 0, PU_OP_READ, BLOCK, 2 * BLOCK);
	wish = wished(&a);
	CHECK_EQUAL(wish.first, 1);
	CHECK_EQUAL(wish.end, 3);
	begin(&b, 0, PU_OP_READ, 2 * BLOCK, 512);
	begin_write(&b, 1, BLOCK, BLOCK, 0xbb);
	check_wishes_nothing(&b);
	check_waits(&b, 0);
	check_waits(&b, 1);
	fill(&d, &wish, 0x11);
	CHECK_EQUAL(end(&b, 1), BLOCK);
	CHECK_EQUAL(end(&b, 0), 512);
	CHECK_EQUAL(memory_of(&b, 0)[0], 0x11);
	CHECK_EQUAL(end(&a, 0), 2 * BLOCK);
	CHECK_EQUAL(memory_of(&a, 0)[0], 0xbb);
	CHECK_EQUAL(memory_of(&a, 0)[BLOCK], 0x11);
	CHECK_EQUAL(d.map.waiters, 0);
	close_side(&a);
	close_side(&b);
	end_disk(&d);
}

/* In the order of the requests: who fetches sees by it that somebody reads on. */
static void wishes_come_in_order(void)
{
	struct disk d = { 0 };
	struct pu_wish wish;
	struct side a;

	make_disk(&d, 0, NULL);
	open_side(&a, &d);
	for (uint16_t round = 0; round < 2; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			begin(&a, tag, PU_OP_READ, (uint64_t)(round * DEPTH + tag) * BLOCK, BLOCK);
		for (uint16_t tag = 0; tag < DEPTH; tag++) {
			wish = wished(&a);
			CHECK_EQUAL(wish.first, round * DEPTH + tag);
			fill(&d, &wish, 0x11);
		}
		check_wishes_nothing(&a);
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(end(&a, tag), BLOCK);
	}
	close_side(&a);
	end_disk(&d);
}

/* A write has the block first: nobody fetches over it. */
static void a_write_keeps_fetches_away(void)
{
	struct disk d = { 0 };
	uint64_t first = 0;
	struct side a;

	make_disk(&d, 0, NULL);
	open_side(&a, &d);
	CHECK(pu_presence_hold(&d.map, 0, 1)); /* as by a write of another queue */
	begin(&a, 0, PU_OP_READ, 0, 512);
	check_wishes_nothing(&a);
	CHECK_EQUAL(pu_presence_claim(&d.map, &first, 1, 1), 0);
	CHECK(pu_presence_let_go(&d.map, 0, 1, true)); /* somebody waits */
	CHECK_EQUAL(end(&a, 0), 512);
	close_side(&a);
	end_disk(&d);
}

/* Another wrote to the block between its coming and the write that wanted it: both are there. */
static void nothing_is_copied_over_what_was_written_meanwhile(void)
{
	struct disk d = { 0 };
	struct pu_wish wish;
	struct side a, b;

	make_disk(&d, 0, NULL);
	open_side(&a, &d);
	open_side(&b, &d);
	begin_write(&a, 0, 0, 512, 0xaa);
	wish = wished(&a);
	fill(&d, &wish, 0x11);
	begin_write(&b, 0, 512, BLOCK - 512, 0xbb);
	CHECK_EQUAL(end(&b, 0), BLOCK - 512);
	CHECK_EQUAL(end(&a, 0), 512);
	CHECK_EQUAL(byte_of(&b, 0), 0xaa);
	CHECK_EQUAL(byte_of(&b, 512), 0xbb);
	CHECK_EQUAL(byte_of(&b, BLOCK - 512), 0xbb);
	close_side(&a);
	close_side(&b);
	end_disk(&d);
}

static void who_needs_what_cannot_be_had_fails(void)
{
	struct disk d = { 0 };
	struct pu_wish wish;
	struct side a;

	make_disk(&d, 0, NULL);
	open_side(&a, &d);
	begin(&a, 0, PU_OP_READ, 0, 512);
	begin(&a, 1, PU_OP_READ, 0, 2 * BLOCK);
	begin(&a, 2, PU_OP_READ, BLOCK, BLOCK);
	begin_write(&a, 3, 0, BLOCK, 0xbb); /* which needs nothing of it */
	wish = wished(&a);
	CHECK_EQUAL(wish.first + wish.end, wish.first ? 3 : 1);
	pu_presence_fail(&d.map, 0, 1, -ENXIO);
	pu_presence_let_go(&d.map, 0, 1, false);
	CHECK_EQUAL(end(&a, 0), -ENXIO);
	CHECK_EQUAL(end(&a, 1), -ENXIO);
	CHECK_EQUAL(end(&a, 3), BLOCK);
	check_waits(&a, 2);
	pu_presence_let_go(&d.map, 1, 2, true);
	CHECK_EQUAL(end(&a, 2), BLOCK);
	CHECK_EQUAL(byte_of(&a, 0), 0xbb);
	close_side(&a);
	end_disk(&d);
}

/* More than the queue can tell at once: the rest comes when these were told. */
static void many_wishes(void)
{
	struct disk d = { .size = 1024 * BLOCK, .buffer = 1024 * BLOCK };
	struct pu_wish wish;
	struct side a;
	uint32_t count = 0;

	make_disk(&d, 0, NULL);
	for (uint64_t block = 0; block < 1024; block += 2) { /* no two together */
		CHECK(pu_presence_hold(&d.map, block, block + 1));
		pu_presence_let_go(&d.map, block, block + 1, true);
	}
	open_side(&a, &d);
	begin(&a, 0, PU_OP_READ, 0, 1024 * BLOCK);
	turn(&a);
	CHECK(pu_present_take_wake(&a.mapped));
	for (; count < 512; count++) {
		wish = wished(&a);
		fill(&d, &wish, 0x11);
	}
	CHECK_EQUAL(end(&a, 0), 1024 * BLOCK);
	CHECK_EQUAL(memory_of(&a, 0)[1023 * BLOCK], 0x11);
	close_side(&a);
	end_disk(&d);
}

static void writes_wait_to_be_allowed(void)
{
	struct pu_presence_options options = { .gated = true };
	struct disk d = { 0 };
	struct pu_wish wish;
	struct side a;

	make_disk(&d, 0, &options);
	open_side(&a, &d);
	begin_write(&a, 0, 0, 2 * BLOCK, 0xaa);
	wish = wished(&a);
	CHECK_EQUAL(wish.kind, PU_WISH_WRITE);
	CHECK_EQUAL(wish.end, 2);
	check_waits(&a, 0);
	pu_presence_set_writable(&d.map, 0, 2, true);
	pu_deferred_resolve(&a.mapped, wish.tag, wish.generation, 0);
	CHECK_EQUAL(end(&a, 0), 2 * BLOCK);
	begin_write(&a, 0, BLOCK, BLOCK, 0xbb); /* at once */
	CHECK_EQUAL(end(&a, 0), BLOCK);
	begin_write(&a, 0, BLOCK, 2 * BLOCK, 0xcc);
	wish = wished(&a);
	pu_deferred_resolve(&a.mapped, wish.tag, wish.generation, -ENOSPC);
	CHECK_EQUAL(end(&a, 0), -ENOSPC);
	CHECK_EQUAL(byte_of(&a, BLOCK), 0xbb);
	close_side(&a);
	end_disk(&d);
}

static void requests_that_others_finish(void)
{
	struct pu_presence_options options = { .writes_through = true };
	struct disk d = { 0 };
	struct side a;
	uint16_t tag;

	make_disk(&d, 0, &options);
	open_side(&a, &d);
	begin_write(&a, 1, 0, BLOCK, 0xaa);
	check_waits(&a, 1);
	for (int i = 0; i < 1000 && !a.mapped.nr_deferred; i++)
		turn(&a); /* its bytes may take longer to be in the file */
	CHECK(pu_deferred_next(&a.mapped, &tag));
	CHECK_EQUAL(tag, 1);
	CHECK(!pu_deferred_next(&a.mapped, &tag));
	CHECK_EQUAL(byte_of(&a, 0), 0xaa);
	pu_deferred_resolve(&a.mapped, 1, pu_tag_generation(&a.queue.tags[1]) - 1, 0); /* of another */
	check_waits(&a, 1);
	pu_deferred_resolve(&a.mapped, 1, pu_tag_generation(&a.queue.tags[1]), -ENOSPC);
	CHECK_EQUAL(end(&a, 1), -ENOSPC);
	begin(&a, 2, PU_OP_FLUSH, 0, 0);
	check_waits(&a, 2); /* the map is not synced */
	CHECK(pu_deferred_next(&a.mapped, &tag));
	pu_deferred_resolve(&a.mapped, tag, pu_tag_generation(&a.queue.tags[tag]), 0);
	CHECK_EQUAL(end(&a, 2), 0);
	close_side(&a);
	end_disk(&d);
}

/* ---- everybody at once ---- */

#define WRITERS 3
#define ROUNDS 250
#define CROWD 6u /* blocks */
#define SECTORS (CROWD * BLOCK / 512)

struct crowd {
	struct disk disk;
	int below; /* what is fetched, and drained to */
	bool native;
	int done;
	struct pu_wish wishes[64];
	uint32_t nr_wishes;
	pthread_mutex_t lock;
};

struct stamp {
	uint64_t sector, count;
};

struct writer {
	struct crowd *crowd;
	uint32_t number;
	uint64_t counts[SECTORS];
};

/* A writer's sectors are its own: no other changes them, and it knows what they must have. */
static void check_stamps(const struct writer *w, const uint8_t *memory, uint64_t first, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		const struct stamp *stamp = (const void *)(memory + i * 512);

		CHECK_EQUAL(stamp->sector, first + i);
		if ((first + i) % WRITERS == w->number)
			CHECK_EQUAL(stamp->count, w->counts[first + i]);
	}
}

static void pass_on_wishes(struct side *s, struct crowd *crowd)
{
	struct pu_wish wish;

	pthread_mutex_lock(&crowd->lock);
	while (crowd->nr_wishes < 64 && pu_present_next_wish(&s->mapped, &wish))
		crowd->wishes[crowd->nr_wishes++] = wish;
	pthread_mutex_unlock(&crowd->lock);
}

static void finish(struct side *s, struct crowd *crowd)
{
	while (!is_over(s, 0)) {
		CHECK(pu_mapped_turn(&s->mapped, 200000) >= 0);
		pass_on_wishes(s, crowd);
	}
}

static void *write_and_check(void *context)
{
	struct writer *w = context;
	unsigned seed = w->number + 1;
	struct side s;

	open_side(&s, &w->crowd->disk);
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t sector = (uint64_t)rand_r(&seed) % (SECTORS / WRITERS) * WRITERS + w->number;
		struct stamp stamp = { sector, ++w->counts[sector] };
		uint64_t from = (uint64_t)rand_r(&seed) % (SECTORS - 16);

		memcpy(memory_of(&s, 0), &stamp, sizeof(stamp));
		begin(&s, 0, PU_OP_WRITE, sector * 512, 512);
		finish(&s, w->crowd);
		CHECK_EQUAL(pu_loopback_result(&s.queue, 0), 512);
		begin(&s, 0, PU_OP_READ, from * 512, 16 * 512);
		finish(&s, w->crowd);
		CHECK_EQUAL(pu_loopback_result(&s.queue, 0), 16 * 512);
		check_stamps(w, memory_of(&s, 0), from, 16);
	}
	__atomic_add_fetch(&w->crowd->done, 1, __ATOMIC_SEQ_CST);
	/* What it holds for others may be wanted still. */
	while (__atomic_load_n(&w->crowd->done, __ATOMIC_SEQ_CST) < WRITERS) {
		pu_mapped_turn(&s.mapped, 200000);
		pass_on_wishes(&s, w->crowd);
	}
	close_side(&s);
	return NULL;
}

static void copy_blocks(int from, int to, uint64_t first, uint64_t end)
{
	uint8_t block[BLOCK];

	for (uint64_t at = first; at < end; at++) {
		CHECK_EQUAL(pread(from, block, BLOCK, (off_t)(at * BLOCK)), BLOCK);
		CHECK_EQUAL(pwrite(to, block, BLOCK, (off_t)(at * BLOCK)), BLOCK);
	}
}

static void *fetch_for_all(void *context)
{
	struct crowd *crowd = context;

	while (__atomic_load_n(&crowd->done, __ATOMIC_SEQ_CST) < WRITERS) {
		struct pu_wish wish = { 0 };

		pthread_mutex_lock(&crowd->lock);
		if (crowd->nr_wishes)
			wish = crowd->wishes[--crowd->nr_wishes];
		pthread_mutex_unlock(&crowd->lock);
		if (!wish.end) {
			usleep(50);
			continue;
		}
		copy_blocks(crowd->below, crowd->disk.fds[0], wish.first, wish.end);
		pu_presence_let_go(&crowd->disk.map, wish.first, wish.end, true);
	}
	return NULL;
}

/* Drains what is present to what is below, and evicts it: who reads it there must find it. */
static void *evict_all(void *context)
{
	struct crowd *crowd = context;
	struct pu_presence *p = &crowd->disk.map;
	uint64_t runs[CROWD][2];

	while (__atomic_load_n(&crowd->done, __ATOMIC_SEQ_CST) < WRITERS) {
		uint64_t first = 0, count;
		int nr = 0;

		pu_regions_block(&p->regions, 0);
		while (!pu_regions_are_drained(&p->regions, 0))
			sched_yield();
		for (uint64_t block = 0; block < CROWD; block++)
			if (pu_presence_has(p, block))
				copy_blocks(crowd->disk.fds[0], crowd->below, block, block + 1);
		while ((count = pu_presence_evict(p, &first, CROWD))) {
			runs[nr][0] = first;
			runs[nr++][1] = first + count;
			first += count;
		}
		pu_regions_block(&p->regions, PU_NO_REGION);
		for (int i = 0; i < nr; i++) {
			CHECK_EQUAL(fallocate(crowd->disk.fds[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					      (off_t)(runs[i][0] * BLOCK),
					      (off_t)((runs[i][1] - runs[i][0]) * BLOCK)), 0);
			pu_presence_let_go(p, runs[i][0], runs[i][1], false);
		}
		usleep(300);
	}
	return NULL;
}

static void make_crowd(struct crowd *crowd, bool native)
{
	struct pu_presence_options options = { .evicts = true };
	uint8_t sector[512] = { 0 };

	*crowd = (struct crowd){ .native = native, .disk.size = CROWD * BLOCK };
	pthread_mutex_init(&crowd->lock, NULL);
	make_disk(&crowd->disk, native ? 1 : 0, &options);
	if (native)
		lie_over_table(&crowd->disk);
	crowd->below = native ? crowd->disk.fds[1] : make_file(1, CROWD * BLOCK);
	for (uint64_t i = 0; i < SECTORS; i++) {
		struct stamp stamp = { i, 0 };

		memcpy(sector, &stamp, sizeof(stamp));
		CHECK_EQUAL(pwrite(crowd->below, sector, 512, (off_t)(i * 512)), 512);
	}
}

static void everybody_at_once(bool native)
{
	struct writer writers[WRITERS] = { 0 };
	pthread_t threads[WRITERS + 2];
	struct crowd crowd;

	make_crowd(&crowd, native);
	for (uint32_t i = 0; i < WRITERS; i++) {
		writers[i].crowd = &crowd;
		writers[i].number = i;
		CHECK_EQUAL(pthread_create(&threads[i], NULL, write_and_check, &writers[i]), 0);
	}
	CHECK_EQUAL(pthread_create(&threads[WRITERS], NULL, fetch_for_all, &crowd), 0);
	CHECK_EQUAL(pthread_create(&threads[WRITERS + 1], NULL, evict_all, &crowd), 0);
	for (int i = 0; i < WRITERS + 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(crowd.disk.map.waiters, 0);
	if (!native)
		close(crowd.below);
	pthread_mutex_destroy(&crowd.lock);
	end_disk(&crowd.disk);
}

int main(void)
{
	blocks_are_held_by_one();
	evicted_blocks_are_held();
	pages_are_dirty_until_they_are_taken();
	a_failure_concerns_who_waits_for_its_blocks();
	disks_over_files();
	disks_over_maps();
	a_write_waits_for_a_copy_up();
	parts_of_a_block_are_both_kept();
	a_copy_up_that_fails();
	what_is_fetched_is_fetched_once();
	wishes_come_in_order();
	a_write_keeps_fetches_away();
	nothing_is_copied_over_what_was_written_meanwhile();
	who_needs_what_cannot_be_had_fails();
	many_wishes();
	writes_wait_to_be_allowed();
	requests_that_others_finish();
	everybody_at_once(false);
	everybody_at_once(true);
	return 0;
}
