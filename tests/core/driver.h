/* SPDX-License-Identifier: MIT
 * The kernel's side of a queue, played by its ring: commands become reads of a pipe, which end when
 * there is a request, and NOPs.
 */
#ifndef PU_DRIVER_H
#define PU_DRIVER_H

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "failing.h"
#include "answer.h"
#include "copy.h"
#include "loopback.h"
#include "open.h"

#define READ_MULTISHOT 49    /* IORING_OP_READ_MULTISHOT (Linux 6.7) */
#define NOP_INJECT_RESULT 1u /* IORING_NOP_INJECT_RESULT (Linux 6.10) */

struct driver {
	int cdev;    /* a file with the descriptors, which the queue closes */
	int pipe[2]; /* two bytes for a request: with batch I/O its tag; one: it needs its data */
	struct pu_queue *queue;
	int commits;
	int64_t results; /* of these, added up */
	int refuses;	 /* commits of other threads that fail, each with another errno */
	int refused;	 /* the errno of every commit of the queue's own; 0: they are taken */
	uint32_t takes;	 /* at most so many elements of each; 0: all */
	bool later;	 /* each commit is over only when something is written to `slow` */
	int slow[2];
	bool stopped;
};

static inline void driver_open(struct driver *d)
{
	*d = (struct driver){ .cdev = memfd_create("cdev", MFD_CLOEXEC) };
	CHECK(d->cdev >= 0);
	CHECK_EQUAL(ftruncate(d->cdev, 1 << 20), 0);
	CHECK_EQUAL(pipe2(d->pipe, O_CLOEXEC | O_NONBLOCK), 0);
	CHECK_EQUAL(pipe2(d->slow, O_CLOEXEC), 0);
}

static inline void driver_close(struct driver *d)
{
	close(d->pipe[0]);
	close(d->pipe[1]);
	close(d->slow[0]);
	close(d->slow[1]);
}

static inline void become_nop(struct pu_sqe *sqe, int32_t result)
{
	*sqe = (struct pu_sqe){
		.flags = sqe->flags & PU_SQE_CQE_SKIP_SUCCESS,
		.op_flags = NOP_INJECT_RESULT,
		.len = (uint32_t)result,
		.user_data = sqe->user_data,
	};
}

static inline void become_read(const struct driver *d, struct pu_sqe *sqe, bool batch)
{
	static uint16_t request;

	*sqe = (struct pu_sqe){
		.opcode = batch ? READ_MULTISHOT : PU_OPCODE_READ,
		.flags = batch ? PU_SQE_BUFFER_SELECT : 0,
		.fd = d->pipe[0],
		.addr = batch ? 0 : (uint64_t)(uintptr_t)&request,
		.len = batch ? 0 : sizeof(request),
		.user_data = sqe->user_data,
	};
}

#define SLOW_BYTES 16

/* Over when somebody writes SLOW_BYTES: fewer are a failure to the ring. */
static inline void become_slow(const struct driver *d, struct pu_sqe *sqe)
{
	static uint8_t bytes[SLOW_BYTES];

	*sqe = (struct pu_sqe){
		.opcode = PU_OPCODE_READ,
		.flags = sqe->flags & PU_SQE_CQE_SKIP_SUCCESS,
		.fd = d->slow[0],
		.addr = (uint64_t)(uintptr_t)bytes,
		.len = sizeof(bytes),
		.user_data = sqe->user_data,
	};
}

static inline void take_commit(struct driver *d, struct pu_sqe *sqe, bool posted)
{
	uint32_t count = (uint32_t)(sqe->cmd[0] >> 32) & 0xffff, bytes = (uint32_t)(sqe->cmd[0] >> 48);
	const uint8_t *elements = (const uint8_t *)(uintptr_t)sqe->addr;

	if (posted && d->refuses) {
		become_nop(sqe, -d->refuses--);
		return;
	}
	if (!posted && d->refused) {
		become_nop(sqe, -d->refused);
		return;
	}
	if (d->takes && count > d->takes)
		count = d->takes;
	for (uint32_t i = 0; i < count; i++)
		d->results += (int32_t)(*(const uint64_t *)(const void *)(elements + i * bytes) >> 32);
	__atomic_add_fetch(&d->commits, (int)count, __ATOMIC_RELEASE);
	if (d->later)
		become_slow(d, sqe);
	else
		become_nop(sqe, (int32_t)(count * bytes));
}

static inline void drive(struct driver *d, struct pu_sqe *sqe, bool posted)
{
	bool batch = false;

	if (sqe->opcode != PU_OPCODE_URING_CMD)
		return;
	switch ((uint32_t)sqe->off) {
	case PU_IO_COMMIT_AND_FETCH_REQ:
		d->commits++;
		d->results += (int32_t)(sqe->cmd[0] >> 32);
		break;
	case PU_IO_COMMIT_IO_CMDS:
		take_commit(d, sqe, posted);
		return;
	case PU_IO_NEED_GET_DATA:
	case PU_IO_PREP_IO_CMDS:
		become_nop(sqe, 0);
		return;
	case PU_IO_FETCH_IO_CMDS:
		batch = true;
		break;
	}
	if (d->stopped)
		become_nop(sqe, -ENODEV);
	else
		become_read(d, sqe, batch);
}

/* The nth entry of those that the kernel has not taken. */
static inline struct pu_sqe *entry_of(const struct pu_ring *ring, uint32_t nth)
{
	size_t index = (ring->sq_tail - pu_ring_unsubmitted(ring) + nth) & ring->sq_mask;

	return (void *)(ring->sqes + (index << ring->sqe_shift));
}

static inline void drive_ring(struct driver *d, struct pu_ring *ring, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		drive(d, entry_of(ring, i), ring == &d->queue->post_ring);
}

/* For `before_enter`: the entries of the queue's ring of that number. */
static inline void driver_play(struct driver *d, int fd, uint32_t count)
{
	if (fd == d->queue->ring.fd)
		drive_ring(d, &d->queue->ring, count);
	else if (fd == d->queue->post_ring.fd)
		drive_ring(d, &d->queue->post_ring, count);
}

/* A request; what is to be said of it is said of tag 0. */
static inline void driver_request(struct driver *d, uint16_t tag, uint32_t op, bool get_data)
{
	struct pu_desc desc = { .op_flags = op, .nr_sectors = 8 };

	CHECK_EQUAL(lseek(d->cdev, tag * (off_t)sizeof(desc), SEEK_SET), tag * (off_t)sizeof(desc));
	CHECK_EQUAL(write(d->cdev, &desc, sizeof(desc)), sizeof(desc));
	CHECK_EQUAL(write(d->pipe[1], &tag, get_data ? 1 : 2), get_data ? 1 : 2);
}

static inline long driver_cancel(const struct driver *d, int fd)
{
	struct {
		uint64_t addr;
		int32_t fd;
		uint32_t flags;
		int64_t timeout[2];
		uint64_t pad[4];
	} of_the_file = { .fd = fd, .flags = 3 /* all of that file */, .timeout = { -1, -1 } };

	return __real_syscall(SYS_io_uring_register, d->queue->ring.fd, PU_REGISTER_SYNC_CANCEL,
			      &of_the_file, 1);
}

/* Takes back the tags that are idle, and no other: what is committed now waits for ever. */
static inline void driver_quiesce(struct driver *d)
{
	driver_cancel(d, d->pipe[0]);
}

/* Takes the tags back. */
static inline void driver_stop(struct driver *d)
{
	d->stopped = true;
	driver_cancel(d, d->pipe[0]);
}

#endif
