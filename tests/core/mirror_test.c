/* SPDX-License-Identifier: MIT
 * Mirrors whose legs fail or hang. A pipe is a leg that hangs: it takes what it has room for.
 */
#define _GNU_SOURCE
#include "work.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>

#include "bench.h"

#define LONG_NS (INT64_C(3600) * 1000000000) /* no leg takes so long but the one that is aged */
#define PAGE 4096

/* A kernel that cannot cancel, as of a disk that hangs. */
static bool never_cancels;

/* Stands before the C library's. */
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
	if (never_cancels && number == SYS_io_uring_register &&
	    argument[1] == PU_REGISTER_SYNC_CANCEL)
		return 0;
	return real(number, argument[0], argument[1], argument[2], argument[3], argument[4],
		    argument[5]);
}

/* Makes a leg a pipe with room for a page; its reading end. */
static int make_pipe(int leg)
{
	int ends[2];

	CHECK_EQUAL(pipe2(ends, O_CLOEXEC), 0);
	CHECK(fcntl(ends[1], F_SETPIPE_SZ, PAGE) >= PAGE);
	close(fds[leg]);
	fds[leg] = ends[1];
	return ends[0];
}

/* The file of a leg, which can only be read. */
static int read_only(int leg)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[leg]);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	return fd;
}

static void refuse_writes(int leg)
{
	int fd = read_only(leg);

	close(fds[leg]);
	fds[leg] = fd;
}

static void fill(int fd, uint8_t byte)
{
	uint8_t page[PAGE];

	memset(page, byte, PAGE);
	CHECK_EQUAL(pwrite(fd, page, PAGE, 0), PAGE);
}

static uint8_t first_byte(int fd)
{
	uint8_t byte = 0;

	CHECK_EQUAL(pread(fd, &byte, 1, 0), 1);
	return byte;
}

static void open_mirror(struct bench *b)
{
	make_mirror(&b->mirror, &b->layout, LONG_NS);
	open_bench(b, false);
}

static void turn(struct bench *b)
{
	CHECK(pu_mapped_turn(&b->mapped, 10000000) >= 0);
	record_failures(b);
}

/* What the leg holds has taken too long. */
static void age(struct bench *b, uint32_t leg)
{
	for (uint32_t i = 0; i < b->mapped.nr_slots; i++)
		if (b->mapped.slots[i].part.file == leg)
			b->mapped.slots[i].begun_ns -= LONG_NS;
	b->mapped.look_at_ns = 0;
	turn(b);
}

/* Until it is given up, where the requests can do without. */
static void give_up(struct bench *b, uint32_t leg)
{
	while (!b->mirror.legs[leg].errors)
		age(b, leg);
}

static uint32_t orphans(const struct bench *b, uint32_t leg)
{
	return pu_mirror_orphans(&b->mirror, leg, false) + pu_mirror_orphans(&b->mirror, leg, true);
}

static bool fail_leg(struct bench *b, uint32_t leg)
{
	return pu_mirror_fail_leg(&b->mirror, leg, pu_mirror_file_generation(&b->mirror, leg));
}

/* Requests that wait until failures are on record. */
static uint32_t held(const struct bench *b)
{
	uint32_t count = 0;

	for (uint32_t tag = 0; tag < DEPTH; tag++)
		count += b->mapped.works[tag].held;
	return count;
}

/* All but `left` of the free slots are taken away; the rest of the list. */
static uint32_t take_slots(struct bench *b, uint32_t left)
{
	struct pu_mapped *m = &b->mapped;
	struct pu_slot *last = NULL;
	uint32_t rest = m->free_slot;

	while (left--) {
		last = &m->slots[rest];
		rest = last->next_free ? last->next_free - 1 : rest + 1;
	}
	if (last)
		last->next_free = m->nr_slots + 1;
	else
		m->free_slot = m->nr_slots;
	return rest;
}

static uint32_t busy_slots(const struct bench *b)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < b->mapped.nr_slots; i++)
		count += b->mapped.slots[i].busy;
	return count;
}

/* Waits until the leg has taken `length` bytes, and checks them. */
static void drain(struct bench *b, int end, uint8_t byte, size_t length)
{
	uint8_t taken[PAGE];

	CHECK_EQUAL(fcntl(end, F_SETFL, O_NONBLOCK), 0);
	while (length) {
		ssize_t done = read(end, taken, length < PAGE ? length : PAGE);

		for (ssize_t i = 0; i < done; i++)
			CHECK_EQUAL(taken[i], byte);
		length -= done > 0 ? (size_t)done : 0;
		turn(b);
	}
}

static void a_failed_leg_is_told_before_the_answer(void)
{
	struct bench b = { 0 };

	make_files();
	make_mirror(&b.mirror, &b.layout, 0);
	open_bench(&b, false);
	CHECK_EQUAL(ftruncate(fds[0], 0), 0);
	CHECK_EQUAL(request(&b, 0, PU_OP_READ, 0, 4096), 4096);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 0), PU_LEG_FAILED);
	CHECK_EQUAL(b.mirror.legs[0].errors, 1);
	CHECK_EQUAL(request(&b, 1, PU_OP_WRITE, 4096, 4096), 4096);
	CHECK_EQUAL(lseek(fds[0], 0, SEEK_END), 0); /* left alone */
	close_bench(&b);
	close_files();
}

static void the_last_leg_in_step_is_not_given_up(void)
{
	struct bench b = { 0 };

	make_files();
	refuse_writes(0);
	open_mirror(&b);
	pu_mirror_set_leg(&b.mirror, 1, PU_LEG_RESYNC);
	pu_mirror_set_leg(&b.mirror, 2, PU_LEG_FAILED);
	/* The leg that takes the write is not one that may be read. */
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), -EBADF);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 0), PU_LEG_SYNCED);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_RESYNC);
	CHECK(!fail_leg(&b, 0));
	CHECK_EQUAL(request(&b, 0, PU_OP_READ, 0, PAGE), PAGE);
	close_bench(&b);
	close_files();
}

/* Two requests fail on a leg each, before either failure is known. */
static void two_legs_that_fail_are_not_both_given_up(void)
{
	struct bench b = { 0 };
	int first, second;

	make_files();
	open_mirror(&b);
	pu_mirror_set_leg(&b.mirror, 2, PU_LEG_FAILED);
	first = read_only(0);
	second = read_only(1);
	pu_mirror_replace_file(&b.mirror, 0, first, false, false, 0);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, PAGE >> 9), 0);
	while (held(&b) < 1)
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 10000000), 0);
	pu_mirror_replace_file(&b.mirror, 0, fds[0], false, false, 0);
	pu_mirror_replace_file(&b.mirror, 1, second, false, false, 0);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 1, PU_OP_WRITE, 0, PAGE >> 9), 0);
	while (held(&b) < 2)
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 10000000), 0);
	turn(&b);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 0), PU_LEG_FAILED);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_SYNCED);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), PAGE);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 1), -EBADF);
	close(first);
	close(second);
	close_bench(&b);
	close_files();
}

static void what_no_leg_takes_is_not_done(void)
{
	struct bench b = { 0 };

	make_files();
	open_mirror(&b);
	for (uint32_t leg = 0; leg < FILES; leg++)
		pu_mirror_set_leg(&b.mirror, leg, PU_LEG_FAILED);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), -EIO);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE_ZEROES, 0, PAGE), -EIO);
	CHECK_EQUAL(request(&b, 0, PU_OP_DISCARD, 0, PAGE), -EIO);
	CHECK_EQUAL(request(&b, 0, PU_OP_FLUSH, 0, 0), -EIO);
	CHECK_EQUAL(request(&b, 0, PU_OP_READ, 0, PAGE), -EIO);
	close_bench(&b);
	close_files();
}

static void no_write_is_done_while_a_failure_is_not_on_record(void)
{
	struct bench b = { 0 };

	make_files();
	refuse_writes(0);
	open_mirror(&b);
	record_fails = true;
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), -EIO);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 0), PU_LEG_FAILED); /* but not read either */
	CHECK_EQUAL(request(&b, 1, PU_OP_WRITE, 0, PAGE), -EIO);
	CHECK_EQUAL(request(&b, 1, PU_OP_FLUSH, 0, 0), -EIO);
	CHECK_EQUAL(request(&b, 1, PU_OP_READ, 0, PAGE), PAGE);
	record_fails = false;
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), PAGE);
	CHECK_EQUAL(pu_mirror_leg_bits(&b.mirror).unrecorded, 0);
	close_bench(&b);
	close_files();
}

static void a_leg_that_is_given_up_is_left_with_all_that_it_holds(void)
{
	struct bench b = { 0 };
	int hanging;

	make_files();
	hanging = make_pipe(1);
	open_mirror(&b);
	for (uint16_t tag = 0; tag < 2; tag++)
		CHECK_EQUAL(pu_loopback_inject(&b.queue, tag, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
	for (int i = 0; i < 4; i++) /* the leg takes a page, and hangs on the next */
		turn(&b);
	CHECK(fail_leg(&b, 1)); /* another queue has noticed */
	pu_mirror_set_recorded(&b.mirror);
	while (pu_queue_held(&b.queue)) {
		b.mapped.look_at_ns = 0;
		turn(&b);
	}
	CHECK_EQUAL(orphans(&b, 1), 2);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 2 * PAGE);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 1), 2 * PAGE);
	close(hanging);
	close_bench(&b);
	close_files();
}

/* Nobody could take the leg's answer meanwhile, nor ask it for the next page. */
static void a_process_that_was_stopped_blames_no_leg(void)
{
	struct bench b = { 0 };
	uint8_t taken[PAGE];
	int slow;

	make_files();
	slow = make_pipe(1);
	make_mirror(&b.mirror, &b.layout, 400000000);
	open_bench(&b, false);
	memset(pu_queue_next_buffer(&b.queue, 0), 7, 3 * PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, 3 * PAGE >> 9), 0);
	for (int i = 0; i < 4; i++)
		turn(&b);
	usleep(600000);
	CHECK_EQUAL(read(slow, taken, PAGE), PAGE);
	turn(&b);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_SYNCED);
	drain(&b, slow, 7, 2 * PAGE);
	while (pu_queue_held(&b.queue))
		turn(&b);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 3 * PAGE);
	CHECK_EQUAL(b.mirror.legs[1].errors, 0);
	close(slow);
	close_bench(&b);
	close_files();
}

static void a_write_keeps_its_buffer_until_it_is_cut(void)
{
	struct bench b = { 0 };
	uint32_t rest;
	int hanging;

	make_files();
	hanging = make_pipe(1);
	open_mirror(&b);
	rest = take_slots(&b, 1); /* the first leg's, then the second's, which keeps it */
	memset(pu_queue_next_buffer(&b.queue, 0), 7, 2 * PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
	for (int i = 0; i < 4; i++)
		turn(&b);
	CHECK_EQUAL(b.mapped.free_slot, b.mapped.nr_slots);
	while (pu_mirror_leg_state(&b.mirror, 1) != PU_LEG_FAILED)
		age(&b, 1);
	for (int i = 0; i < 2; i++) /* it is looked at again, and not abandoned */
		age(&b, 1);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_FAILED);
	b.mapped.free_slot = rest;
	while (pu_queue_held(&b.queue)) {
		b.mapped.look_at_ns = 0;
		turn(&b);
	}
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 2 * PAGE);
	CHECK_EQUAL(first_byte(fds[2]), 7);
	close(hanging);
	close_bench(&b);
	close_files();
}

static void a_gated_write_waits(void)
{
	struct bench b = { 0 };

	make_files();
	make_mirror(&b.mirror, &b.layout, 0);
	open_bench(&b, false);
	pu_regions_block(&b.mirror.writes, 0);
	CHECK(pu_regions_are_drained(&b.mirror.writes, 0));
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, 8), 0);
	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000), 0);
	CHECK_EQUAL(pu_queue_held(&b.queue), 1);
	CHECK(pu_regions_are_drained(&b.mirror.writes, 0));
	pu_regions_block(&b.mirror.writes, PU_NO_REGION);
	while (pu_queue_held(&b.queue))
		CHECK_EQUAL(pu_mapped_turn(&b.mapped, 1000000000), 0);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 4096);
	close_bench(&b);
	close_files();
}

/* ---- legs that are replaced ---- */

static int make_other(void)
{
	int fd = memfd_create("other", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQUAL(ftruncate(fd, FILE_BYTES), 0);
	return fd;
}

static void put_in_place(struct bench *b, uint32_t leg, int fd)
{
	pu_mirror_replace_file(&b->mirror, leg, fd, false, false,
			       pu_mirror_file_generation(&b->mirror, leg) + 1);
	pu_mirror_set_leg(&b->mirror, leg, PU_LEG_RESYNC);
}

static void a_failure_that_is_not_on_record_is_not_charged_to_the_next_file(void)
{
	struct bench b = { 0 };
	int fresh;

	make_files();
	fresh = make_other();
	refuse_writes(1);
	open_mirror(&b);
	record_fails = true;
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), -EIO);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_FAILED);
	put_in_place(&b, 1, fresh);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), -EIO);
	record_fails = false;
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), PAGE);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_RESYNC);
	close(fresh);
	close_bench(&b);
	close_files();
}

/* Leg 1 takes a page of a write, hangs on the next, and is given up. The pipe's other end. */
static int fail_in_a_write(struct bench *b)
{
	int hanging = make_pipe(1);

	open_mirror(b);
	CHECK_EQUAL(pu_loopback_inject(&b->queue, 0, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
	for (int i = 0; i < 4; i++)
		turn(b);
	CHECK(fail_leg(b, 1));
	return hanging;
}

/* Another queue gave the leg up, and it was replaced, before this queue looked. */
static void a_file_that_hangs_is_not_charged_to_the_next_one(void)
{
	struct bench b = { 0 };
	int hanging, fresh;

	make_files();
	fresh = make_other();
	hanging = fail_in_a_write(&b);
	pu_mirror_set_recorded(&b.mirror);
	put_in_place(&b, 1, fresh);
	for (uint32_t i = 0; i < b.mapped.nr_slots; i++)
		b.mapped.slots[i].begun_ns -= LONG_NS;
	while (pu_queue_held(&b.queue)) {
		b.mapped.look_at_ns = 0;
		turn(&b);
	}
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 2 * PAGE);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_RESYNC);
	CHECK_EQUAL(b.mirror.legs[1].errors, 0);
	CHECK_EQUAL(orphans(&b, 1), 1);
	/* And the new one takes what comes. */
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), PAGE);
	close(hanging);
	close(fresh);
	close_bench(&b);
	close_files();
}

/* What it holds since then may still be written: its region must not be copied before. */
static void a_file_that_comes_back_is_charged_with_what_it_holds(void)
{
	struct bench b = { 0 };
	int hanging, fresh;

	make_files();
	fresh = make_other();
	hanging = fail_in_a_write(&b);
	put_in_place(&b, 1, fresh);
	CHECK(fail_leg(&b, 1));
	pu_mirror_set_recorded(&b.mirror);
	pu_mirror_replace_file(&b.mirror, 1, fds[1], false, false, 0);
	pu_mirror_set_leg(&b.mirror, 1, PU_LEG_RESYNC);
	b.mapped.look_at_ns = 0;
	turn(&b);
	CHECK_EQUAL(pu_queue_held(&b.queue), 1);
	CHECK(!pu_regions_are_drained(&b.mirror.writes, 0));
	give_up(&b, 1);
	while (pu_queue_held(&b.queue))
		turn(&b);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), 2 * PAGE);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_FAILED);
	close(hanging);
	close(fresh);
	close_bench(&b);
	close_files();
}

static void inject_writes(struct bench *b)
{
	for (uint16_t tag = 0; tag < b->depth; tag++)
		CHECK_EQUAL(pu_loopback_inject(&b->queue, tag, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
}

static void finish_writes(struct bench *b)
{
	while (pu_queue_held(&b->queue)) {
		b->mapped.look_at_ns = 0;
		turn(b);
	}
	for (uint16_t tag = 0; tag < b->depth; tag++)
		CHECK_EQUAL(pu_loopback_result(&b->queue, tag), 2 * PAGE);
}

static void legs_that_hang_leave_slots_for_the_others(void)
{
	struct bench b = { .depth = 128 };
	int ends[3];

	make_files();
	ends[0] = make_pipe(1);
	ends[1] = make_pipe(2);
	open_mirror(&b);
	inject_writes(&b);
	turn(&b);
	give_up(&b, 1);
	/* Its next file hangs too, and then the third leg. */
	close(fds[1]);
	fds[1] = make_other();
	ends[2] = make_pipe(1);
	put_in_place(&b, 1, fds[1]);
	give_up(&b, 2);
	finish_writes(&b);
	b.mirror.legs[1].errors = 0;
	inject_writes(&b);
	turn(&b);
	give_up(&b, 1);
	finish_writes(&b);
	CHECK_EQUAL(pu_mirror_orphans(&b.mirror, 1, false), b.depth);
	CHECK_EQUAL(pu_mirror_orphans(&b.mirror, 1, true), b.depth);
	CHECK_EQUAL(orphans(&b, 2), b.depth);
	for (int i = 0; i < 3; i++)
		close(ends[i]);
	close_bench(&b);
	close_files();
}

/* While the queue waits, as a target does: the copier may be done with the region already. */
static void *replace_file_and_open_gate(void *context)
{
	struct bench *b = context;

	usleep(50000);
	pu_mirror_replace_file(&b->mirror, 1, fds[1], false, false, 1);
	pu_regions_block(&b->mirror.writes, PU_NO_REGION);
	pu_queue_wake(&b->queue);
	return NULL;
}

static void a_write_finds_the_file_that_is_there_when_it_begins(void)
{
	struct bench b = { 0 };
	pthread_t thread;
	int before;

	make_files();
	open_mirror(&b);
	pu_regions_block(&b.mirror.writes, 0);
	memset(pu_queue_next_buffer(&b.queue, 0), 3, PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, PAGE >> 9), 0);
	turn(&b);
	before = fds[1];
	fds[1] = make_other();
	CHECK_EQUAL(pthread_create(&thread, NULL, replace_file_and_open_gate, &b), 0);
	CHECK_EQUAL(pu_mapped_turn(&b.mapped, INT64_C(10000000000)), 0);
	pthread_join(thread, NULL);
	CHECK_EQUAL(b.mapped.version, b.layout.version);
	while (pu_queue_held(&b.queue))
		turn(&b);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), PAGE);
	CHECK_EQUAL(first_byte(fds[1]), 3);
	CHECK_EQUAL(first_byte(before), 0);
	close(before);
	close_bench(&b);
	close_files();
}

/* ---- requests that are failed from outside while they wait ---- */

static void write_and_fail_it(struct bench *b, uint8_t byte)
{
	memset(pu_queue_next_buffer(&b->queue, 0), byte, PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b->queue, 0, PU_OP_WRITE, 0, PAGE >> 9), 0);
	turn(b);
	CHECK_EQUAL(pu_queue_held(&b->queue), 1);
	pu_queue_fail_held(&b->queue, EIO);
	CHECK_EQUAL(pu_queue_wait(&b->queue, 0), 0); /* no turn: the next request comes in the same */
	CHECK_EQUAL(pu_queue_held(&b->queue), 0);
	CHECK_EQUAL(pu_loopback_result(&b->queue, 0), -EIO);
}

static void a_gated_write_that_was_failed_is_not_done(void)
{
	struct bench b = { 0 };

	make_files();
	open_mirror(&b);
	fill(fds[0], 1);
	pu_regions_block(&b.mirror.writes, 0);
	for (int i = 0; i < 3 * DEPTH; i++)
		write_and_fail_it(&b, 2);
	CHECK_EQUAL(b.mapped.nr_blocked, 1);
	pu_regions_block(&b.mirror.writes, PU_NO_REGION);
	turn(&b);
	turn(&b);
	CHECK_EQUAL(first_byte(fds[0]), 1);
	CHECK(pu_regions_are_drained(&b.mirror.writes, 0));
	memset(pu_queue_next_buffer(&b.queue, 0), 3, PAGE);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), PAGE);
	CHECK_EQUAL(first_byte(fds[0]), 3);
	close_bench(&b);
	close_files();
}

static void a_write_that_was_failed_while_it_waited_for_slots_is_not_done(void)
{
	struct bench b = { 0 };
	uint32_t rest;

	make_files();
	open_mirror(&b);
	fill(fds[0], 1);
	rest = take_slots(&b, 0);
	for (int i = 0; i < 3 * DEPTH; i++)
		write_and_fail_it(&b, 2);
	CHECK_EQUAL(b.mapped.nr_waiting, 1);
	b.mapped.free_slot = rest;
	turn(&b);
	turn(&b);
	CHECK_EQUAL(first_byte(fds[0]), 1);
	CHECK(!pu_regions_are_drained(&b.mirror.writes, 0)); /* some legs may have it, others not */
	memset(pu_queue_next_buffer(&b.queue, 0), 3, PAGE);
	CHECK_EQUAL(request(&b, 0, PU_OP_WRITE, 0, PAGE), PAGE);
	CHECK_EQUAL(first_byte(fds[0]), 3);
	close_bench(&b);
	close_files();
}

/* ---- two queues of one mirror, each on a thread of its own ---- */

static pthread_mutex_t record = PTHREAD_MUTEX_INITIALIZER;

struct server {
	struct pu_mirror *mirror;
	uint64_t offset; /* of its half of the disk */
	int failed;	 /* requests */
};

/* As a target does: one at a time. */
static void record_together(struct pu_mirror *mirror, struct pu_mapped *m)
{
	struct pu_leg_failure failure;

	while (pu_mirrored_next_failure(m, &failure)) {
		pthread_mutex_lock(&record);
		if (failure.error)
			pu_mirror_fail_leg(mirror, failure.leg, failure.file_generation);
		sched_yield(); /* a record takes time */
		pu_mirror_set_recorded(mirror);
		pthread_mutex_unlock(&record);
	}
	pu_mirrored_recorded(m);
}

static void *serve(void *context)
{
	struct server *server = context;
	const struct pu_policy *policy = &server->mirror->policy;
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_mapped_entries(policy, DEPTH),
		.files = fds,
		.nr_files = FILES,
	};
	struct pu_queue queue;
	struct pu_mapped mapped;

	CHECK_EQUAL(pu_queue_open(&queue, -1, &options), 0);
	CHECK_EQUAL(pu_mapped_open(&mapped, &queue, server->mirror->layout, policy, 0), 0);
	CHECK_EQUAL(pu_queue_fetch(&queue), 0);
	for (uint64_t round = 0; round < 100; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++) {
			uint64_t offset = server->offset + (round + tag) % 20 * PAGE;

			memset(pu_queue_next_buffer(&queue, tag), 7, PAGE);
			CHECK_EQUAL(pu_loopback_inject(&queue, tag, tag ? PU_OP_WRITE : PU_OP_READ,
						    offset >> 9, PAGE >> 9), 0);
		}
		while (pu_queue_held(&queue)) {
			CHECK(pu_mapped_turn(&mapped, 1000000) >= 0);
			record_together(server->mirror, &mapped);
		}
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			server->failed += pu_loopback_result(&queue, tag) != PAGE;
	}
	pu_queue_close(&queue);
	pu_mapped_close(&mapped);
	pu_queue_free(&queue);
	return NULL;
}

static void two_queues_agree_on_legs(bool hangs)
{
	struct pu_layout layout;
	struct pu_mirror mirror;
	struct server servers[2] = { { &mirror, 0, 0 }, { &mirror, FILE_BYTES / 2, 0 } };
	pthread_t threads[2];
	int end = -1;

	make_files();
	if (hangs)
		end = make_pipe(1);
	else
		refuse_writes(1);
	make_mirror(&mirror, &layout, hangs ? 500000000 : LONG_NS);
	pu_mirrored(&mirror);
	for (uint32_t i = 0; i < FILES; i++)
		layout.files[i].fd = fds[i];
	for (int i = 0; i < 2; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, serve, &servers[i]), 0);
	/* A copier, which blocks regions meanwhile. */
	for (int i = 0; i < 100; i++) {
		pu_regions_block(&mirror.writes, 0);
		for (int patience = 0; patience < 100 && !pu_regions_are_drained(&mirror.writes, 0); patience++)
			sched_yield();
		pu_regions_block(&mirror.writes, PU_NO_REGION);
		usleep(100);
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(servers[0].failed + servers[1].failed, 0);
	CHECK_EQUAL(pu_mirror_leg_state(&mirror, 1), PU_LEG_FAILED);
	CHECK_EQUAL(pu_mirror_leg_bits(&mirror).in_step, 1 | 4);
	CHECK(pu_regions_are_drained(&mirror.writes, 0));
	pu_mirror_destroy(&mirror);
	pu_layout_destroy(&layout);
	if (hangs)
		close(end);
	close_files();
}

static void a_write_outlives_the_buffer_of_one_that_hangs(void)
{
	struct bench b = { 0 };
	uint32_t length = 8 * PAGE;
	int slow, hanging;
	uint8_t *memory;

	make_files();
	hanging = make_pipe(1);
	slow = make_pipe(2);
	open_mirror(&b);
	memory = pu_queue_next_buffer(&b.queue, 0);
	memset(memory, 7, length);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, length >> 9), 0);
	drain(&b, slow, 7, 2 * PAGE);
	give_up(&b, 1);
	/* The rest of the slow leg's part comes from where its beginning came from. */
	drain(&b, slow, 7, length - 2 * PAGE);
	while (pu_queue_held(&b.queue))
		turn(&b);
	CHECK_EQUAL(pu_loopback_result(&b.queue, 0), length);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 1), PU_LEG_FAILED);
	CHECK_EQUAL(pu_mirror_leg_state(&b.mirror, 2), PU_LEG_SYNCED);

	/* The tag is used again; what the leg takes late is of the request that it held. */
	memset(pu_queue_next_buffer(&b.queue, 0), 8, PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, PAGE >> 9), 0);
	drain(&b, slow, 8, PAGE);
	while (pu_queue_held(&b.queue))
		turn(&b);
	CHECK_EQUAL(busy_slots(&b), 1);
	CHECK_EQUAL(orphans(&b, 1), 1);
	drain(&b, hanging, 7, 2 * PAGE); /* no more: nobody went on */
	while (orphans(&b, 1))
		turn(&b);
	CHECK_EQUAL(busy_slots(&b), 0);
	CHECK_EQUAL(memory[0], 0); /* given back */
	close(slow);
	close(hanging);
	close_bench(&b);
	close_files();
}

static bool is_mapped(void *memory)
{
	unsigned char there;

	return !mincore(memory, PAGE, &there);
}

enum fate { HANGS, CANCELLED, ANSWERS };

static void what_a_leg_holds_outlives_the_queue(enum fate fate)
{
	struct bench b = { 0 };
	void *memory, *renewed, *again;
	int hanging;

	make_files();
	hanging = make_pipe(1);
	open_mirror(&b);
	memory = pu_queue_next_buffer(&b.queue, 0);
	memset(memory, 7, 2 * PAGE);
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
	turn(&b);
	give_up(&b, 1);
	while (pu_queue_held(&b.queue))
		turn(&b);
	renewed = pu_queue_next_buffer(&b.queue, 0);
	CHECK(renewed != memory);
	/* The same file is put back, and hangs on a second request. */
	pu_mirror_set_leg(&b.mirror, 1, PU_LEG_SYNCED);
	b.mirror.legs[1].errors = 0;
	CHECK_EQUAL(pu_loopback_inject(&b.queue, 0, PU_OP_WRITE, 0, 2 * PAGE >> 9), 0);
	turn(&b);
	give_up(&b, 1);
	while (pu_queue_held(&b.queue))
		turn(&b);
	again = pu_queue_next_buffer(&b.queue, 0);
	CHECK(again != renewed);
	CHECK_EQUAL(orphans(&b, 1), 2);
	if (fate == ANSWERS) {
		CHECK_EQUAL(fcntl(hanging, F_SETFL, O_NONBLOCK), 0);
		while (orphans(&b, 1)) {
			uint8_t taken[PAGE];

			if (read(hanging, taken, PAGE) < 0)
				CHECK_EQUAL(errno, EAGAIN);
			turn(&b);
		}
		CHECK(is_mapped(memory)); /* until the queue's own end */
		CHECK(!is_mapped(renewed));
	}
	never_cancels = fate == HANGS;
	CHECK_EQUAL(close_bench(&b), fate != HANGS);
	never_cancels = false;
	CHECK_EQUAL(is_mapped(memory), fate == HANGS);
	CHECK_EQUAL(is_mapped(renewed), fate == HANGS);
	CHECK_EQUAL(is_mapped(again), fate == HANGS);
	if (fate == CANCELLED) /* not when the ring is gone, but before */
		CHECK_EQUAL(b.mirror.legs[1].orphans[0] + b.mirror.legs[1].orphans[1], 0);
	close(hanging);
	close_files();
}

int main(void)
{
	a_failed_leg_is_told_before_the_answer();
	the_last_leg_in_step_is_not_given_up();
	two_legs_that_fail_are_not_both_given_up();
	what_no_leg_takes_is_not_done();
	no_write_is_done_while_a_failure_is_not_on_record();
	a_gated_write_waits();
	a_failure_that_is_not_on_record_is_not_charged_to_the_next_file();
	a_file_that_hangs_is_not_charged_to_the_next_one();
	a_file_that_comes_back_is_charged_with_what_it_holds();
	legs_that_hang_leave_slots_for_the_others();
	a_write_keeps_its_buffer_until_it_is_cut();
	a_write_finds_the_file_that_is_there_when_it_begins();
	a_gated_write_that_was_failed_is_not_done();
	a_write_that_was_failed_while_it_waited_for_slots_is_not_done();
	a_leg_that_is_given_up_is_left_with_all_that_it_holds();
	a_process_that_was_stopped_blames_no_leg();
	a_write_outlives_the_buffer_of_one_that_hangs();
	a_write_outlives_the_buffer_of_one_that_hangs();
	what_a_leg_holds_outlives_the_queue(HANGS);
	what_a_leg_holds_outlives_the_queue(CANCELLED);
	what_a_leg_holds_outlives_the_queue(ANSWERS);
	two_queues_agree_on_legs(false);
	two_queues_agree_on_legs(true);
	return 0;
}
