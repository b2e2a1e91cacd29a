/* SPDX-License-Identifier: MIT
 * An io_uring by raw system calls: mapping, submission, completion. Knows nothing of ublk.
 *
 * One thread owns a ring: only the calls marked [any thread] may come from another.
 */
#ifndef PU_RING_H
#define PU_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "forked.h"

enum { /* io_uring_setup(2) */
	PU_SETUP_CQSIZE = 1u << 3,
	PU_SETUP_CLAMP = 1u << 4,
	PU_SETUP_R_DISABLED = 1u << 6,
	PU_SETUP_SUBMIT_ALL = 1u << 7,
	PU_SETUP_COOP_TASKRUN = 1u << 8,
	PU_SETUP_TASKRUN_FLAG = 1u << 9,
	PU_SETUP_SQE128 = 1u << 10,
	PU_SETUP_CQE32 = 1u << 11,
	PU_SETUP_SINGLE_ISSUER = 1u << 12,
	PU_SETUP_DEFER_TASKRUN = 1u << 13,
	PU_SETUP_NO_SQARRAY = 1u << 16,
};

/* What a ring wants that one thread fills, and waits in. */
#define PU_SETUP_OF_A_THREAD                                                              \
	(PU_SETUP_SUBMIT_ALL | PU_SETUP_COOP_TASKRUN | PU_SETUP_TASKRUN_FLAG |            \
	 PU_SETUP_SINGLE_ISSUER | PU_SETUP_DEFER_TASKRUN | PU_SETUP_NO_SQARRAY)
#define PU_SQ_TASKRUN (1u << 2)

enum {
	PU_FEAT_SINGLE_MMAP = 1u << 0,
	PU_FEAT_NODROP = 1u << 1,
	PU_FEAT_EXT_ARG = 1u << 8,
	PU_FEAT_MIN_TIMEOUT = 1u << 15,
};

enum {
	PU_OPCODE_NOP = 0,
	PU_OPCODE_READV = 1,
	PU_OPCODE_WRITEV = 2,
	PU_OPCODE_FSYNC = 3,
	PU_OPCODE_READ_FIXED = 4,
	PU_OPCODE_WRITE_FIXED = 5,
	PU_OPCODE_POLL_ADD = 6,
	PU_OPCODE_SENDMSG = 9,
	PU_OPCODE_RECVMSG = 10,
	PU_OPCODE_TIMEOUT = 11,
	PU_OPCODE_TIMEOUT_REMOVE = 12,
	PU_OPCODE_ASYNC_CANCEL = 14,
	PU_OPCODE_FALLOCATE = 17,
	PU_OPCODE_READ = 22,
	PU_OPCODE_WRITE = 23,
	PU_OPCODE_SEND = 26,
	PU_OPCODE_RECV = 27,
	PU_OPCODE_MSG_RING = 40,
	PU_OPCODE_URING_CMD = 46,
	PU_OPCODE_FUTEX_WAIT = 51,
	PU_OPCODE_READV_FIXED = 60,
	PU_OPCODE_WRITEV_FIXED = 61,
};

enum {
	PU_REGISTER_FILES = 2,
	PU_UNREGISTER_FILES = 3,
	PU_REGISTER_EVENTFD = 4,
	PU_REGISTER_FILES_UPDATE = 6,
	PU_REGISTER_PROBE = 8,
	PU_REGISTER_ENABLE_RINGS = 12,
	PU_REGISTER_FILES2 = 13,
	PU_REGISTER_BUFFERS2 = 15,
	PU_REGISTER_RING_FDS = 20,
	PU_UNREGISTER_RING_FDS = 21,
	PU_REGISTER_PBUF_RING = 22,
	PU_REGISTER_SYNC_CANCEL = 24,
};

#define PU_RING_MAX_ENTRIES 32768u
#define PU_SQE_FIXED_FILE (1u << 0)
#define PU_SQE_BUFFER_SELECT (1u << 5)
#define PU_SQE_CQE_SKIP_SUCCESS (1u << 6)
#define PU_CQE_BUFFER (1u << 0)
#define PU_CQE_MORE (1u << 1)
#define PU_CQE_BUFFER_SHIFT 16
#define PU_URING_CMD_MULTISHOT (1u << 1)
#define PU_POLL_FIRST (1u << 0) /* ioprio of a receive: there is nothing yet */
#define PU_FSYNC_DATASYNC 1u
#define PU_TIMEOUT_ABS (1u << 0)
#define PU_TIMEOUT_UPDATE (1u << 1)

struct pu_sqe { /* io_uring_sqe; a 128-byte entry continues behind it */
	uint8_t opcode;
	uint8_t flags;
	uint16_t ioprio;
	int32_t fd;
	uint64_t off; /* URING_CMD: cmd_op in the low half */
	uint64_t addr;
	uint32_t len;
	uint32_t op_flags;
	uint64_t user_data;
	uint16_t buf_index;
	uint16_t personality;
	int32_t file_index;
	uint64_t cmd[2]; /* URING_CMD: the payload; else addr3 */
};
_Static_assert(sizeof(struct pu_sqe) == 64, "io_uring_sqe");

struct pu_cqe { /* io_uring_cqe; a 32-byte entry continues behind it */
	uint64_t user_data;
	int32_t res;
	uint32_t flags;
};
_Static_assert(sizeof(struct pu_cqe) == 16, "io_uring_cqe");

struct pu_provided { /* io_uring_buf; the first one's last field is the ring's tail */
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t tail;
};

struct pu_ring {
	int fd;
	int process, thread; /* who made it */
	bool severed;
	int enter_fd; /* fd, or its registered index */
	uint32_t enter_flags;
	uint32_t setup_flags; /* what the kernel accepted */
	uint32_t features;
	uint32_t sq_entries, cq_entries;
	uint32_t sq_mask, cq_mask;
	uint32_t sq_tail; /* filled so far; published by pu_ring_submit */
	uint8_t sqe_shift, cqe_shift;
	uint32_t *k_sq_head, *k_sq_tail, *k_sq_flags;
	uint32_t *k_cq_head, *k_cq_tail, *k_cq_overflow;
	uint8_t *sqes, *cqes;
	void *ring_map;
	size_t ring_bytes, sqe_bytes;
	uint64_t enters;
};

/* The same file under a number above those of most others, or fd itself. At the end of a process that
 * is killed the kernel closes files from the highest number down: one that has its own disk open,
 * with a request in flight, would else wait for that request, beyond any signal, before what serves
 * it is closed, and keep all of ublk waiting with it. */
#define PU_FD_HIGH 768 /* a table up to there takes little memory, and fits in every limit */
int pu_fd_high(int fd);

/* Opens a ring. `required` setup flags must be had; each of `wanted` is dropped when this kernel
 * does not know it (setup_flags tells). cq_entries 0: the kernel's choice. 0 or -errno. */
int pu_ring_open(struct pu_ring *ring, uint32_t entries, uint32_t cq_entries, uint32_t required,
		 uint32_t wanted);
/* Closes it; the kernel ends by itself what is in flight, some time. A forked child only lets go of
 * its copy of the descriptor: the rest is the parent's. */
void pu_ring_close(struct pu_ring *ring);

/* How long a ring's end is waited for: a disk that answers has answered by then. */
#define PU_END_NS INT64_C(1000000000)

/* Told of an operation that is over, or (-ECANCELED) was never begun. */
typedef void (*pu_over)(void *context, uint64_t user_data, int32_t result);

/* Before a ring is closed whose operations use memory that is to be freed: forgets what the kernel
 * has not taken, cancels the rest and takes completions until *in_flight is 0, which is for `over` to
 * count down; at most for PU_END_NS. False: some may still go on, also after the ring is closed, and
 * their memory must stay for ever. So it is when another thread than the one that may submit asks,
 * unless that one has ended. */
bool pu_ring_end(struct pu_ring *ring, const uint32_t *in_flight, pu_over over, void *context);

/* Gives the file behind a number up, and keeps the number: whoever comes to use it late meets
 * `inert`, such as an eventfd, never somebody else's file. 0 or -errno. */
int pu_replace_file(int fd, int inert);

/* Replaces the ring under its (stuck) owner by inert memory and an inert file, so that the kernel
 * lets go of it and the owner's next call fails instead of touching freed memory.
 * [any thread] The owner still calls pu_ring_close. 0 or -errno. */
int pu_ring_sever(struct pu_ring *ring, int inert);

int pu_ring_register(struct pu_ring *ring, uint32_t opcode, const void *arg, uint32_t count);
/* Whether the kernel has an operation. */
bool pu_ring_knows(const struct pu_ring *ring, uint8_t opcode);
/* An empty table for `count` registered files, and one of its places: a file, or (-1) none. */
int pu_ring_register_sparse_files(struct pu_ring *ring, uint32_t count);
int pu_ring_update_file(struct pu_ring *ring, uint32_t place, int fd);
/* An empty table for `count` registered buffers. 0 or -errno. */
int pu_ring_register_sparse_buffers(struct pu_ring *ring, uint32_t count);
/* Makes `entries` (a power of two) at `provided` (page-aligned) buffer group `group`. */
int pu_ring_register_provided(struct pu_ring *ring, struct pu_provided *provided, uint32_t entries,
			      uint16_t group);
/* Saves a descriptor look-up per enter; holds the ring until its thread ends or closes it. */
int pu_ring_register_self(struct pu_ring *ring);

/* The next free entry, zeroed, or NULL when the queue is full (submit, then ask again). */
struct pu_sqe *pu_ring_get_sqe(struct pu_ring *ring);
/* The same, not zeroed: for those who write every word of a 64-byte entry. */
static inline struct pu_sqe *pu_ring_take_sqe(struct pu_ring *ring)
{
	if (ring->sq_tail - __atomic_load_n(ring->k_sq_head, __ATOMIC_ACQUIRE) >= ring->sq_entries)
		return NULL;
	return (struct pu_sqe *)(void *)(ring->sqes +
					 ((size_t)(ring->sq_tail++ & ring->sq_mask) << ring->sqe_shift));
}
/* As pu_ring_get_sqe, after submitting what is there when the queue is full. */
struct pu_sqe *pu_ring_next_sqe(struct pu_ring *ring);
uint32_t pu_ring_unsubmitted(const struct pu_ring *ring);
/* Takes back the entries that the kernel has not taken. */
void pu_ring_retract(struct pu_ring *ring);

#define PU_FOREVER (-1)
/* Submits everything filled and waits until `wait` completions are there, for at most timeout_ns
 * (PU_FOREVER: no limit). min_wait_us > 0 (Linux 6.12): after that time one completion is enough.
 * Returns the number submitted, or -ETIME, -EINTR, -EAGAIN, -EBUSY (reap first), other -errno. */
int pu_ring_submit(struct pu_ring *ring, uint32_t wait, int64_t timeout_ns, uint32_t min_wait_us);

/* The same, for who counts on what was waited for: the kernel ends a wait when a time-out fires, too,
 * which is before its completion is there (io_should_wake in io_uring/io_uring.c). This waits on for
 * the rest of the time. Also ended by a signal, with what was submitted before. */
int pu_ring_submit_and_wait(struct pu_ring *ring, uint32_t wait, int64_t timeout_ns,
			    uint32_t min_wait_us);

uint32_t pu_ring_ready(const struct pu_ring *ring);

/* Whether an enter would bring completions that no eventfd tells of any more: what came while the
 * last enter ran, or was too much for it (Linux 6.14 and later stop at 20). */
static inline bool pu_ring_deferred(const struct pu_ring *ring)
{
	return __atomic_load_n(ring->k_sq_flags, __ATOMIC_ACQUIRE) & PU_SQ_TASKRUN;
}

static inline const struct pu_cqe *pu_ring_cqe(const struct pu_ring *ring, uint32_t nth)
{
	uint32_t index = (*ring->k_cq_head + nth) & ring->cq_mask;

	return (const struct pu_cqe *)(const void *)(ring->cqes + ((size_t)index << ring->cqe_shift));
}

static inline void pu_ring_advance(struct pu_ring *ring, uint32_t count)
{
	__atomic_store_n(ring->k_cq_head, *ring->k_cq_head + count, __ATOMIC_RELEASE);
}

#endif
