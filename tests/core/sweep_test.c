/* SPDX-License-Identifier: MIT
 * Each system call and each allocation of the core fails once, in each of its ways: nothing crashes,
 * nothing is left, and either it is told or all is as if nothing had failed.
 */
#define _GNU_SOURCE
#include "failing.h"

#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "driver.h"
#include "direct.h"
#include "deferred.h"
#include "mirrored.h"
#include "nbd.h"
#include "present.h"
#include "set.h"
#include "null.h"
#include "ram.h"
#include "work.h"

#define DEPTH 4
#define BUFFER 16384
#define FILES 2
#define FILE_BYTES 65536
#define TURNS 300 /* of a queue that has something to do: it ends long before */

static int kept; /* queues that were closed with I/O that may go on */

static int or_first(int first, int error)
{
	return first < 0 ? first : error < 0 ? error : 0;
}

/* ---- a ring ---- */

struct user {
	uint32_t in_flight;
	char text[8];
};

static void over(void *context, uint64_t user_data, int32_t result)
{
	struct user *user = context;

	(void)result;
	user->in_flight -= user_data == 1;
}

static int use_ring(struct pu_ring *ring, const int ends[2], struct user *user)
{
	int error = pu_ring_register_self(ring);
	struct pu_sqe *sqe;

	error = or_first(error, pu_ring_register_sparse_buffers(ring, 4));
	error = or_first(error, pu_ring_register(ring, PU_REGISTER_FILES, ends, 2));
	if (error)
		return error;
	for (int i = 0; i < 3; i++) {
		sqe = pu_ring_get_sqe(ring);
		CHECK(sqe);
		sqe->opcode = i == 2 ? PU_OPCODE_NOP : PU_OPCODE_READ;
		sqe->fd = ends[0];
		sqe->addr = (uint64_t)(uintptr_t)user->text;
		sqe->len = sizeof(user->text);
		sqe->user_data = i == 2 ? 2 : 1;
		user->in_flight += i != 2;
	}
	error = pu_ring_submit(ring, 1, 1000000000, 0);
	return error < 0 ? error : 0;
}

static int rings(void)
{
	static struct user user; /* outlives what cannot be ended */
	struct pu_ring ring;
	int ends[2], error;

	user.in_flight = 0;
	CHECK_EQUAL(pipe2(ends, O_CLOEXEC), 0);
	error = pu_ring_open(&ring, 8, 0, 0,
			     PU_SETUP_SUBMIT_ALL | PU_SETUP_SINGLE_ISSUER |
				     PU_SETUP_DEFER_TASKRUN | PU_SETUP_NO_SQARRAY);
	if (!error) {
		error = use_ring(&ring, ends, &user);
		if (!pu_ring_end(&ring, &user.in_flight, over, &user))
			CHECK(failed);
		pu_ring_close(&ring);
	}
	close(ends[0]);
	close(ends[1]);
	return error;
}

static int severed_rings(void)
{
	struct pu_ring ring;
	int error = pu_ring_open(&ring, 8, 0, 0, 0);

	if (error)
		return error;
	error = pu_ring_sever(&ring, STDERR_FILENO);
	if (!error)
		CHECK(pu_ring_submit(&ring, 1, 0, 0) < 0);
	pu_ring_close(&ring);
	return error;
}

/* ---- a queue without kernel ---- */

static void end_queue(struct pu_queue *q, struct pu_mapped *m)
{
	bool is_over = pu_queue_close(q);

	CHECK(is_over || failed);
	/* Files in memory are read and written as their entries are taken. */
	kept += !is_over;
	if (m)
		pu_mapped_close(m);
	pu_queue_free(q);
}

static int turn(struct pu_queue *q)
{
	int there = pu_queue_wait(q, 10000000);

	for (int i = 0; i < there; i++) {
		int error = i & 1 ? pu_queue_post(q, q->ready[i],
						  pu_tag_generation(&q->tags[q->ready[i]]), -EIO) :
				    pu_queue_answer(q, q->ready[i], 0);

		if (error && error != -EALREADY) /* failed from outside */
			return error;
	}
	return there;
}

/* Until nobody has a request. */
static int serve(struct pu_queue *q)
{
	int there = 0;

	for (int i = 0; i < TURNS && pu_queue_held(q) && there >= 0; i++)
		there = turn(q);
	CHECK(there < 0 || !pu_queue_held(q));
	return there;
}

static int use_loopback(struct pu_queue *q)
{
	int error = pu_queue_fetch(q), fd;

	if (error)
		return error;
	for (int round = 0; round < 3; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(q, tag, PU_OP_READ, 0, 1), 0);
		if (round == 2) {
			error = pu_queue_wait(q, 10000000);
			if (error < 0)
				return error;
			pu_queue_fail_held(q, EIO);
			pu_queue_carry_over(q, 0); /* what could not be failed */
		}
		error = serve(q);
		if (error < 0)
			return error;
		for (uint16_t tag = 0; tag < DEPTH; tag++) {
			bool without_memory = round == 2 && failed; /* and so not failed */

			if (!without_memory)
				CHECK_EQUAL(pu_loopback_result(q, tag), round == 2 || tag & 1 ? -EIO : 512);
		}
	}
	fd = pu_queue_event_fd(q);
	return fd < 0 ? fd : 0;
}

static int loopback(uint32_t extra, bool severs)
{
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = BUFFER, .extra_entries = extra, .trim_after_ns = 1
	};
	struct pu_queue q;
	int error = pu_queue_open(&q, -1, &options);

	if (error)
		return error;
	error = use_loopback(&q);
	if (!error && severs)
		error = or_first(error, extra ? pu_queue_sever(&q) : 0);
	end_queue(&q, NULL);
	return error;
}

static int queues_without_ring(void)
{
	return loopback(0, false);
}

static int queues_with_ring(void)
{
	return loopback(8, false);
}

static int severed_queues(void)
{
	return loopback(8, true);
}

/* ---- many queues of a thread ---- */

static int use_set(struct pu_set *set, struct pu_queue *q)
{
	int place = pu_set_add(set, q), error = place < 0 ? place : 0;

	if (!error)
		error = pu_queue_fetch(q);
	if (!error && pu_set_wait(set, 10000000) >= 0)
		pu_set_wake(set);
	for (int turn = 0; !error && turn < 2; turn++) {
		int there = pu_set_wait(set, 0);

		if (there < 0 || (there > 0 && (there = pu_queue_wait(q, 0)) < 0))
			error = there;
	}
	if (place >= 0)
		pu_set_remove(set, (uint32_t)place);
	return error;
}

static int set_of(uint32_t extra)
{
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = BUFFER, .extra_entries = extra
	};
	struct pu_set set;
	struct pu_queue q;
	int error = pu_set_open(&set, 4);

	if (error)
		return error;
	error = pu_queue_open(&q, -1, &options);
	if (!error) {
		error = use_set(&set, &q);
		end_queue(&q, NULL);
	}
	pu_set_close(&set);
	return error;
}

static int sets_of_queues_with_rings(void)
{
	return set_of(8);
}

static int sets_of_queues_without(void)
{
	return set_of(0);
}

/* ---- a queue, with the kernel's side played ---- */

static struct driver driver;

static void play(int fd, uint32_t count)
{
	driver_play(&driver, fd, count);
}

static bool can_play; /* this kernel's NOPs have a result of one's choice */

static bool find_out(void)
{
	struct pu_ring ring;
	struct pu_sqe *sqe;
	int32_t result;

	CHECK_EQUAL(pu_ring_open(&ring, 4, 0, 0, 0), 0);
	sqe = pu_ring_get_sqe(&ring);
	become_nop(sqe, -ENODEV);
	CHECK_EQUAL(pu_ring_submit(&ring, 1, PU_FOREVER, 0), 1);
	result = pu_ring_cqe(&ring, 0)->res;
	pu_ring_close(&ring);
	return result == -ENODEV;
}

/* Somebody still sees the memory. */
static int answer_kept(struct pu_queue *q, uint16_t tag, uint32_t generation, int64_t result)
{
	uint8_t *seen;
	int error = pu_queue_answer_kept(q, tag, generation, result, true, &seen);

	if (!error)
		pu_buffers_unmap(q->buffers, seen);
	return error;
}

/* Requests, one after the other, answered in turns by the owner and by another thread's way. */
static int use_played(struct pu_queue *q, bool get_data)
{
	int error = pu_queue_fetch(q), there = 0, answered;

	if (error)
		return error;
	for (answered = 0; answered < 6; answered++) {
		uint16_t tag = q->batch ? (uint16_t)(answered % DEPTH) : 0;
		uint32_t generation;

		driver_request(&driver, tag, PU_OP_READ, get_data);
		for (int i = 0; i < TURNS && !there; i++)
			there = pu_queue_wait(q, 10000000);
		if (there < 0)
			return there;
		CHECK_EQUAL(there, 1);
		/* Which tag's command the pipe ends is not ours to say. */
		tag = q->ready[0];
		generation = pu_tag_generation(&q->tags[tag]);
		error = pu_queue_copy(q, tag, generation, pu_queue_buffer(q, tag), 0, 4096, 0);
		if (answered == 2)
			error = or_first(error, answer_kept(q, tag, generation, error));
		else if (answered & 1)
			CHECK_EQUAL(pu_queue_post(q, tag, generation, error), 0);
		else
			CHECK_EQUAL(pu_queue_answer(q, tag, error), 0);
		if (error)
			return error;
		there = 0;
	}
	for (int i = 0; i < TURNS && driver.commits < answered && there >= 0; i++)
		there = pu_queue_wait(q, 10000000);
	if (there < 0)
		return there;
	CHECK_EQUAL(driver.commits, answered);
	CHECK_EQUAL(driver.results, answered * 4096);
	driver_stop(&driver);
	for (int i = 0; i < TURNS && there >= 0; i++)
		there = pu_queue_wait(q, 10000000);
	return there == -ENODEV ? 0 : there;
}

static int played(uint64_t flags, uint16_t depth, bool get_data)
{
	struct pu_queue_options options = {
		.depth = depth, .buffer_bytes = BUFFER, .flags = flags, .own_device = true
	};
	struct pu_queue q;
	int error;

	driver_open(&driver);
	driver.queue = &q;
	driver.refuses = flags & PU_F_BATCH_IO ? 1 : 0;
	q.ring.fd = q.post_ring.fd = -1;
	before_enter = play;
	error = pu_queue_open(&q, driver.cdev, &options);
	if (!error) {
		error = use_played(&q, get_data);
		end_queue(&q, NULL);
	}
	before_enter = NULL;
	driver_close(&driver);
	return error;
}

static int played_by_tags(void)
{
	return played(0, 1, false);
}

static int played_with_get_data(void)
{
	return played(PU_F_NEED_GET_DATA, 1, true);
}

static int played_with_user_copy(void)
{
	return played(PU_F_USER_COPY, 1, false);
}

static int played_by_batch(void)
{
	return played(PU_F_BATCH_IO, DEPTH, false);
}

/* ---- files ---- */

struct files {
	enum pu_layout_kind kind;
	bool memory, device;
	int fds[FILES];
	struct pu_layout layout;
	struct pu_mirror mirror; /* of a layout of that kind */
	struct pu_presence map; /* over the second file, if `maps` */
	struct pu_layout bottom;
	uint64_t bits[PU_PRESENCE_PAGE / 8];
	bool maps;
	const struct pu_policy *policy;
	struct pu_queue q;
	struct pu_mapped m;
	int told; /* a request's error */
};

static void record(struct files *f)
{
	struct pu_leg_failure failure;
	uint16_t tag;

	while (f->maps && pu_deferred_next(&f->m, &tag)) /* a flush */
		pu_deferred_resolve(&f->m, tag, pu_tag_generation(&f->q.tags[tag]), 0);
	if (f->kind != PU_LAYOUT_MIRROR)
		return;
	while (pu_mirrored_next_failure(&f->m, &failure)) {
		if (failure.error)
			pu_mirror_fail_leg(&f->mirror, failure.leg, failure.file_generation);
		pu_mirror_set_recorded(&f->mirror);
	}
	pu_mirrored_recorded(&f->m);
}

static int plan(struct files *f)
{
	struct pu_extent parts[3];

	for (uint32_t i = 0; i < 3; i++)
		parts[i] = (struct pu_extent){
			.file = i % FILES, .offset = i * 4096, .length = i == 2 ? 8192 : 4096
		};
	return pu_mapped_plan(&f->m, f->q.ready[0], parts, 3);
}

/* 0, a request's result, or with *ended the queue's. */
static int request(struct files *f, uint32_t op, uint64_t offset, uint64_t length, bool *ended)
{
	int there = 0;

	CHECK_EQUAL(pu_loopback_inject(&f->q, 1, op, offset >> 9, (uint32_t)(length >> 9)), 0);
	for (int i = 0; i < TURNS && pu_queue_held(&f->q) && there >= 0; i++) {
		there = pu_mapped_turn(&f->m, 10000000);
		if (there > 0 && plan(f) < 0)
			pu_queue_answer(&f->q, 1, -ENOMEM);
		record(f);
	}
	*ended = there < 0;
	if (there < 0)
		return there;
	CHECK(!pu_queue_held(&f->q));
	return pu_loopback_result(&f->q, 1) < 0 ? pu_loopback_result(&f->q, 1) : 0;
}

/* What was written, and told to be, is read. */
static int use_files(struct files *f)
{
	static const uint32_t zeroing[] = { PU_OP_WRITE_ZEROES, PU_OP_WRITE_ZEROES | PU_FLAG_NOUNMAP,
					    PU_OP_DISCARD };
	uint8_t *buffer = pu_queue_buffer(&f->q, 1);
	int error = pu_queue_fetch(&f->q), told = 0;
	bool ended = error;

	for (int round = 0; round < 3 && !ended; round++) {
		uint64_t offset = f->kind == PU_LAYOUT_PER_REQUEST ? 0 : (uint64_t)round * 4096;
		uint32_t fua = round == 1 ? PU_FLAG_FUA : 0;

		memset(buffer, round + 1, BUFFER);
		error = request(f, PU_OP_WRITE | fua, offset, BUFFER, &ended);
		if (!error) {
			memset(buffer, 0xee, BUFFER);
			error = request(f, PU_OP_READ, offset, BUFFER, &ended);
			for (int i = 0; !error && i < BUFFER; i++)
				CHECK_EQUAL(buffer[i], round + 1);
		}
		told = or_first(told, error);
		if (!ended)
			told = or_first(told, request(f, PU_OP_FLUSH, 0, 0, &ended));
		if (!ended)
			told = or_first(told, request(f, zeroing[round], offset, BUFFER, &ended));
		if (f->kind == PU_LAYOUT_MIRROR && round == 0 && !ended) {
			pu_mirror_replace_file(&f->mirror, 1, f->fds[1], f->memory, false, 7);
			pu_mirror_set_leg(&f->mirror, 1, PU_LEG_RESYNC);
			pu_mirror_set_leg(&f->mirror, 1, PU_LEG_SYNCED);
		}
	}
	return or_first(told, error);
}

/* What the ring is to do with files fails as well. */
static const struct pu_ring *files_ring;

static void fail_operations(int fd, uint32_t count)
{
	for (uint32_t i = 0; fd == files_ring->fd && i < count; i++) {
		struct pu_sqe *sqe = entry_of(files_ring, i);

		if (sqe->user_data >> PU_KIND_SHIFT == PU_KIND_OTHER &&
		    fails("an operation", (const int[]){ EIO, EAGAIN, EINTR, EOPNOTSUPP, ENOSPC }))
			become_nop(sqe, -failed_with);
	}
}

static int open_files(struct files *f)
{
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_mapped_entries(f->policy, DEPTH),
		.files = f->fds,
		.nr_files = FILES,
	};
	int error;

	for (int i = 0; i < FILES; i++) {
		f->layout.files[i].fd = f->fds[i];
		f->layout.files[i].memory = f->memory;
	}
	if (f->memory)
		pu_layout_map_memory(&f->layout);
	files_ring = &f->q.ring;
	before_enter = can_play ? fail_operations : NULL;
	error = pu_queue_open(&f->q, -1, &options);
	if (error)
		return error;
	error = pu_mapped_open(&f->m, &f->q, &f->layout, f->policy, f->layout.version);
	if (!error) {
		error = use_files(f);
		end_queue(&f->q, &f->m);
	} else {
		end_queue(&f->q, NULL);
	}
	return error;
}

static int files(enum pu_layout_kind kind, bool memory)
{
	struct files f = { .kind = kind, .memory = memory };
	uint64_t size = kind == PU_LAYOUT_MIRROR ? FILE_BYTES : FILES * FILE_BYTES;
	int error = pu_layout_init(&f.layout, kind, size, FILES, kind == PU_LAYOUT_TABLE ? FILES : 0);

	if (error)
		return error;
	f.layout.chunk = 1536;
	f.policy = &pu_direct;
	if (kind == PU_LAYOUT_MIRROR) {
		error = pu_mirror_init(&f.mirror, &f.layout, INT64_C(3600000000000));
		f.policy = pu_mirrored(&f.mirror);
	}
	for (uint32_t i = 0; i < f.layout.nr_extents; i++)
		f.layout.extents[i] = (struct pu_extent){
			.start = i * 8192, .length = i ? FILE_BYTES : 8192, .file = i
		};
	for (int i = 0; i < FILES; i++) {
		f.fds[i] = memfd_create("file", MFD_CLOEXEC);
		CHECK(f.fds[i] >= 0);
		CHECK_EQUAL(ftruncate(f.fds[i], FILE_BYTES), 0);
	}
	if (!error)
		error = open_files(&f);
	before_enter = NULL;
	for (int i = 0; i < FILES; i++)
		close(f.fds[i]);
	pu_mirror_destroy(&f.mirror);
	pu_layout_destroy(&f.layout);
	return error;
}

/* Closed while a file does not answer. */
static int queues_of_a_file_that_hangs(void)
{
	struct files f = { .kind = PU_LAYOUT_STRIPE };
	int ends[2], error = pu_layout_init(&f.layout, f.kind, FILE_BYTES, 1, 0);
	struct pu_queue_options options = {
		.depth = DEPTH, .buffer_bytes = BUFFER, .files = ends, .nr_files = 1,
		.extra_entries = pu_mapped_entries(&pu_direct, DEPTH),
	};

	if (error)
		return error;
	CHECK_EQUAL(pipe2(ends, O_CLOEXEC), 0);
	f.layout.chunk = 512;
	error = pu_queue_open(&f.q, -1, &options);
	if (!error) {
		error = pu_mapped_open(&f.m, &f.q, &f.layout, &pu_direct, f.layout.version);
		if (!error)
			error = pu_queue_fetch(&f.q);
		for (uint16_t tag = 0; tag < DEPTH && !error; tag++) {
			CHECK_EQUAL(pu_loopback_inject(&f.q, tag, PU_OP_READ, 0, 1), 0);
			error = tag & 1 ? pu_mapped_turn(&f.m, 0) : 0; /* some not submitted */
		}
		end_queue(&f.q, f.m.works ? &f.m : NULL);
	}
	close(ends[0]);
	close(ends[1]);
	pu_layout_destroy(&f.layout);
	return error;
}

static int make_map(struct files *f)
{
	struct pu_presence_options options = { .block_bytes = 16384, .present = f->bits, .evicts = true };
	int error = pu_layout_init(&f->layout, PU_LAYOUT_TABLE, FILE_BYTES, FILES, 1);

	if (!error)
		error = pu_layout_init(&f->bottom, PU_LAYOUT_TABLE, FILE_BYTES, 1, 1);
	if (!error)
		error = pu_presence_init(&f->map, &f->layout, &options);
	if (error)
		return error;
	f->layout.extents[0].length = FILE_BYTES;
	f->bottom.extents[0].length = FILE_BYTES;
	f->map.bottom = &f->bottom;
	f->policy = pu_present(&f->map);
	return 0;
}

/* What is written is in the first file, and the rest in the second. */
static int map(bool memory)
{
	struct files f = { .memory = memory, .maps = true };
	int error = make_map(&f);

	for (int i = 0; i < FILES; i++) {
		f.fds[i] = memfd_create("file", MFD_CLOEXEC);
		CHECK(f.fds[i] >= 0);
		CHECK_EQUAL(ftruncate(f.fds[i], FILE_BYTES), 0);
	}
	if (!error)
		error = open_files(&f);
	before_enter = NULL;
	for (int i = 0; i < FILES; i++)
		close(f.fds[i]);
	pu_presence_destroy(&f.map);
	pu_layout_destroy(&f.layout);
	pu_layout_destroy(&f.bottom);
	return error;
}

static int maps(void)
{
	return map(false);
}

static int maps_in_memory(void)
{
	return map(true);
}

#define FILES_SCENARIO(name, kind, memory) \
	static int name(void)              \
	{                                  \
		return files(kind, memory); \
	}

FILES_SCENARIO(tables, PU_LAYOUT_TABLE, false)
FILES_SCENARIO(tables_in_memory, PU_LAYOUT_TABLE, true)
FILES_SCENARIO(stripes, PU_LAYOUT_STRIPE, false)
FILES_SCENARIO(stripes_in_memory, PU_LAYOUT_STRIPE, true)
FILES_SCENARIO(mirrors, PU_LAYOUT_MIRROR, false)
FILES_SCENARIO(mirrors_in_memory, PU_LAYOUT_MIRROR, true)
FILES_SCENARIO(plans, PU_LAYOUT_PER_REQUEST, false)

/* ---- a server ---- */

struct remote {
	struct pu_queue q;
	struct pu_nbd n;
	int ends[2];
};

static void connect_remote(struct remote *r)
{
	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->ends), 0);
	pu_nbd_attach(&r->n, 0, r->ends[0]);
}

static void disconnect_remote(struct remote *r)
{
	close(r->ends[0]);
	close(r->ends[1]);
}

/* Whatever is asked of the server is a read or a write of 4096 bytes, and done. */
static void answer_remote(struct remote *r)
{
	static uint8_t data[4096];
	uint8_t request[28], reply[16] = { 0x67, 0x44, 0x66, 0x98 };

	while (recv(r->ends[1], request, sizeof(request), MSG_DONTWAIT) == sizeof(request)) {
		bool writes = request[7];

		if (writes && recv(r->ends[1], data, sizeof(data), MSG_DONTWAIT) != sizeof(data))
			return;
		memcpy(reply + 8, request + 8, 8);
		CHECK_EQUAL(send(r->ends[1], reply, sizeof(reply), MSG_NOSIGNAL), sizeof(reply));
		if (!writes)
			CHECK_EQUAL(send(r->ends[1], data, sizeof(data), MSG_NOSIGNAL), sizeof(data));
	}
}

static int serve_remote(struct remote *r)
{
	int error = 0, reason;

	for (int i = 0; i < TURNS && pu_queue_held(&r->q) && !error; i++) {
		error = pu_nbd_turn(&r->n, 1000000);
		answer_remote(r);
		while (!error && pu_nbd_tell(&r->n, &reason) >= 0) {
			disconnect_remote(r);
			pu_nbd_release(&r->n, 0);
			connect_remote(r);
		}
	}
	CHECK(error || !pu_queue_held(&r->q));
	return error;
}

static int use_remote(struct remote *r)
{
	int error = pu_queue_fetch(&r->q);

	for (int round = 0; round < 3 && !error; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(&r->q, tag, tag & 1 ? PU_OP_WRITE : PU_OP_READ, 0,
						       8), 0);
		if (round == 1)
			shutdown(r->ends[1], SHUT_RDWR);
		error = serve_remote(r);
		for (uint16_t tag = 0; tag < DEPTH && !error; tag++)
			CHECK_EQUAL(pu_loopback_result(&r->q, tag), 4096);
	}
	return error;
}

static int remotes(void)
{
	const int none = -1;
	struct pu_queue_options options = { .depth = DEPTH,
					    .buffer_bytes = BUFFER,
					    .extra_entries = pu_nbd_entries(1),
					    .files = &none,
					    .nr_files = 1 };
	static struct remote r; /* outlives what cannot be ended */
	int error = pu_queue_open(&r.q, -1, &options);

	if (error)
		return error;
	error = pu_nbd_open(&r.n, &r.q, 1);
	if (!error) {
		connect_remote(&r);
		error = use_remote(&r);
		pu_nbd_stop(&r.n);
		disconnect_remote(&r);
	}
	end_queue(&r.q, NULL);
	if (r.n.links)
		pu_nbd_close(&r.n);
	return error;
}

/* ---- memory ---- */

static int memory_disk(int file)
{
	static uint8_t page[8192], back[8192];
	struct pu_ram ram;
	int64_t error = pu_ram_init(&ram, 1 << 20, file);

	if (error)
		return (int)error;
	memset(page, 7, sizeof(page));
	error = pu_ram_handle(&ram, PU_OP_WRITE, 0, 512, sizeof(page), page);
	CHECK(error >= 0);
	error = pu_ram_handle(&ram, PU_OP_READ, 0, 512, sizeof(back), back);
	CHECK(error < 0 || !memcmp(page, back, sizeof(page)));
	if (error < 0) {
		pu_ram_destroy(&ram);
		return (int)error;
	}
	error = pu_ram_handle(&ram, PU_OP_WRITE_ZEROES, 0, 0, 16384, NULL);
	if (error >= 0)
		error = pu_ram_handle(&ram, PU_OP_READ, 0, 512, sizeof(back), back);
	for (size_t i = 0; error >= 0 && i < sizeof(back); i++)
		CHECK(!back[i]);
	CHECK_EQUAL(pu_null_handle(NULL, PU_OP_READ, 0, 0, 512, back), 0);
	pu_ram_resident(&ram);
	pu_ram_destroy(&ram);
	return error < 0 ? (int)error : 0;
}

static int memory_disks(void)
{
	return memory_disk(-1);
}

static int memory_disks_in_a_file(void)
{
	int file = memfd_create("sweep_test", MFD_CLOEXEC), error;

	CHECK_EQUAL(ftruncate(file, 1 << 20), 0);
	error = memory_disk(file);
	close(file);
	return error;
}

static int shared_buffers(void)
{
	struct pu_buffers *buffers = pu_buffers_new(DEPTH, BUFFER);
	uint8_t *fresh;
	int error = -ENOMEM;

	if (!buffers)
		return error;
	fresh = pu_buffers_map(buffers);
	if (fresh) {
		pu_buffers_retire(buffers, pu_buffers_exchange(buffers, 1, fresh));
		fresh = pu_buffers_map(buffers);
	}
	if (fresh) {
		pu_buffers_unmap(buffers, pu_buffers_exchange(buffers, 1, fresh));
		error = 0;
	}
	pu_buffers_trim(buffers);
	pu_buffers_free(buffers);
	return error;
}

/* ---- the sweep ---- */

static int descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 64; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void check_nothing_left(const char *scenario, int fds, int error)
{
	bool right = !allocations && !mappings && descriptors() == fds &&
		     (failed ? error <= 0 && error > -4096 : !error);

	if (right)
		return;
	fprintf(stderr, "%s: %s, call %d, %s: error %d, %ld allocations, %ld mappings, %d files\n",
		scenario, failed ? failed : "nothing", failing_call, strerror(failed_with), error,
		allocations, mappings, descriptors() - fds);
	exit(1);
}

static int sweep(const char *name, int (*scenario)(void))
{
	int fds = descriptors(), runs = 0, counted, untold = 0;

	fail_call(0, 0);
	check_nothing_left(name, fds, scenario());
	counted = calls;
	for (int call = 1; call <= counted; call++)
		for (int way = 0; way < MOST_WAYS; way++) {
			int error;

			fail_call(call, way);
			error = scenario();
			fail_nothing();
			if (!failed)
				break;
			check_nothing_left(name, fds, error);
			untold += !error;
			runs++;
		}
	CHECK(counted > 0);
	printf("%s: %d calls, %d failures, of which %d made no difference\n", name, counted, runs,
	       untold);
	return runs;
}

#define SWEEP(scenario) sweep(#scenario, scenario)

int main(void)
{
	fail_nothing();
	SWEEP(rings);
	SWEEP(severed_rings);
	SWEEP(queues_without_ring);
	SWEEP(queues_with_ring);
	SWEEP(severed_queues);
	SWEEP(sets_of_queues_with_rings);
	SWEEP(sets_of_queues_without);
	can_play = find_out();
	if (can_play) {
		SWEEP(played_by_tags);
		SWEEP(played_with_get_data);
		SWEEP(played_with_user_copy);
		SWEEP(played_by_batch);
	}
	SWEEP(tables);
	SWEEP(tables_in_memory);
	SWEEP(stripes);
	SWEEP(stripes_in_memory);
	SWEEP(mirrors);
	SWEEP(mirrors_in_memory);
	SWEEP(plans);
	SWEEP(maps);
	SWEEP(maps_in_memory);
	SWEEP(queues_of_a_file_that_hangs);
	SWEEP(remotes);
	SWEEP(memory_disks);
	SWEEP(memory_disks_in_a_file);
	SWEEP(shared_buffers);
	printf("%d were closed with I/O that might have gone on\n", kept);
	return 0;
}
