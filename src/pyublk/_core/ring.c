/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <string.h>

#include "clock.h"
#include "forked.h"
#include "libc.h"

struct sq_offsets {
	uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1;
	uint64_t user_addr;
};
struct cq_offsets {
	uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1;
	uint64_t user_addr;
};
struct setup_params { /* io_uring_params */
	uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
	struct sq_offsets sq;
	struct cq_offsets cq;
};
_Static_assert(sizeof(struct setup_params) == 120, "io_uring_params");

struct enter_arg { /* io_uring_getevents_arg */
	uint64_t sigmask;
	uint32_t sigmask_size;
	uint32_t min_wait_us;
	uint64_t timeout;
};
struct kernel_timespec {
	int64_t seconds, nanoseconds;
};
struct rsrc_register { /* io_uring_rsrc_register */
	uint32_t count, flags;
	uint64_t resv, data, tags;
};
struct provided_ring { /* io_uring_buf_reg */
	uint64_t addr;
	uint32_t entries;
	uint16_t group, flags;
	uint64_t resv[3];
};
struct rsrc_update { /* io_uring_rsrc_update */
	uint32_t offset, resv;
	uint64_t data;
};
struct probe { /* io_uring_probe, for every operation that there may be */
	uint8_t last_op, ops_len;
	uint16_t resv;
	uint32_t resv2[3];
	struct {
		uint8_t op, resv;
		uint16_t flags;
		uint32_t resv2;
	} ops[256];
};
struct sync_cancel { /* io_uring_sync_cancel_reg */
	uint64_t addr;
	int32_t fd;
	uint32_t flags;
	struct kernel_timespec timeout;
	uint64_t opcode, pad[3];
};
_Static_assert(sizeof(struct sync_cancel) == 64, "io_uring_sync_cancel_reg");

enum {
	ENTER_GETEVENTS = 1u << 0,
	ENTER_EXT_ARG = 1u << 3,
	ENTER_REGISTERED_RING = 1u << 4,
};
#define OP_SUPPORTED 1u
enum {
	CANCEL_ALL = 1u << 0,
	CANCEL_ANY = 1u << 2,
};
#define MAP_OFFSET_RINGS 0ll
#define MAP_OFFSET_SQES 0x10000000ll

static int error_or(long result)
{
	return result < 0 ? -errno : (int)result;
}

/* The flags a kernel may lack, youngest first: dropping them in this order keeps what it has. */
static const uint32_t newest_first[] = {
	PU_SETUP_NO_SQARRAY,				 /* 6.6 */
	PU_SETUP_DEFER_TASKRUN,				 /* 6.1 */
	PU_SETUP_SINGLE_ISSUER,				 /* 6.0 */
	PU_SETUP_COOP_TASKRUN | PU_SETUP_TASKRUN_FLAG,	 /* 5.19 */
	PU_SETUP_SUBMIT_ALL,				 /* 5.18 */
};

static int setup(uint32_t entries, uint32_t cq_entries, uint32_t required, uint32_t wanted,
		 struct setup_params *params)
{
	size_t next = 0;

	for (;;) {
		memset(params, 0, sizeof(*params));
		params->flags = required | wanted;
		if (cq_entries) {
			params->flags |= PU_SETUP_CQSIZE;
			params->cq_entries = cq_entries;
		}
		int fd = pu_fd_high(error_or(syscall(SYS_io_uring_setup, entries, params)));

		if (fd != -EINVAL)
			return fd;
		while (next < sizeof(newest_first) / sizeof(*newest_first) &&
		       !(wanted & newest_first[next]))
			next++;
		if (next == sizeof(newest_first) / sizeof(*newest_first))
			return fd;
		wanted &= ~newest_first[next++];
	}
}

int pu_fd_high(int fd)
{
	int high = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, PU_FD_HIGH);

	if (high < 0)
		return fd; /* an error, or no such number is left */
	close(fd);
	return high;
}

static void *map_ring(int fd, size_t bytes, long long offset)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

	/* A child that inherited the mapping would keep the ring, and so the device, alive. */
	if (map != MAP_FAILED && madvise(map, bytes, MADV_DONTFORK)) {
		munmap(map, bytes);
		return MAP_FAILED;
	}
	return map;
}

int pu_ring_open(struct pu_ring *ring, uint32_t entries, uint32_t cq_entries, uint32_t required,
		 uint32_t wanted)
{
	struct setup_params p;

	memset(ring, 0, sizeof(*ring));
	pu_fork_hold();
	ring->fd = pu_fork_add(setup(entries, cq_entries, required, wanted, &p));
	pu_fork_release();
	if (ring->fd < 0)
		return ring->fd;
	ring->enter_fd = ring->fd;
	ring->process = pu_process();
	ring->thread = gettid();
	ring->setup_flags = p.flags;
	ring->features = p.features;
	ring->sqe_shift = p.flags & PU_SETUP_SQE128 ? 7 : 6;
	ring->cqe_shift = p.flags & PU_SETUP_CQE32 ? 5 : 4;
	ring->sqe_bytes = (size_t)p.sq_entries << ring->sqe_shift;
	ring->ring_bytes = p.cq.cqes + ((size_t)p.cq_entries << ring->cqe_shift);
	if (!(p.flags & PU_SETUP_NO_SQARRAY)) {
		size_t array_end = p.sq.array + p.sq_entries * sizeof(uint32_t);

		if (array_end > ring->ring_bytes)
			ring->ring_bytes = array_end;
	}
	/* SINGLE_MMAP is Linux 5.4, a NODROP completion queue 5.5: older than every flag we need. */
	if (!(p.features & PU_FEAT_SINGLE_MMAP) || !(p.features & PU_FEAT_NODROP)) {
		pu_ring_close(ring);
		return -ENOSYS;
	}
	ring->ring_map = map_ring(ring->fd, ring->ring_bytes, MAP_OFFSET_RINGS);
	ring->sqes = map_ring(ring->fd, ring->sqe_bytes, MAP_OFFSET_SQES);
	if (ring->ring_map == MAP_FAILED || ring->sqes == MAP_FAILED) {
		int error = -errno;

		pu_ring_close(ring);
		return error;
	}

	uint8_t *base = ring->ring_map;

	ring->k_sq_head = (uint32_t *)(void *)(base + p.sq.head);
	ring->k_sq_tail = (uint32_t *)(void *)(base + p.sq.tail);
	ring->k_sq_flags = (uint32_t *)(void *)(base + p.sq.flags);
	ring->k_cq_head = (uint32_t *)(void *)(base + p.cq.head);
	ring->k_cq_tail = (uint32_t *)(void *)(base + p.cq.tail);
	ring->k_cq_overflow = (uint32_t *)(void *)(base + p.cq.overflow);
	ring->cqes = base + p.cq.cqes;
	ring->sq_entries = p.sq_entries;
	ring->cq_entries = p.cq_entries;
	ring->sq_mask = p.sq_entries - 1;
	ring->cq_mask = p.cq_entries - 1;
	if (!(p.flags & PU_SETUP_NO_SQARRAY)) {
		uint32_t *array = (uint32_t *)(void *)(base + p.sq.array);

		for (uint32_t i = 0; i < p.sq_entries; i++)
			array[i] = i;
	}
	return 0;
}

static void unmap(void *map, size_t bytes)
{
	if (map && map != MAP_FAILED)
		munmap(map, bytes);
}

void pu_ring_close(struct pu_ring *ring)
{
	if (ring->fd < 0)
		return;
	if (ring->process == pu_process()) {
		if (ring->enter_flags & ENTER_REGISTERED_RING) {
			struct rsrc_update self = { .offset = (uint32_t)ring->enter_fd };

			pu_ring_register(ring, PU_UNREGISTER_RING_FDS, &self, 1);
		}
		unmap(ring->sqes, ring->sqe_bytes);
		unmap(ring->ring_map, ring->ring_bytes);
	}
	pu_fork_drop(ring->fd);
	close(ring->fd);
	ring->fd = -1;
}

static int replace_mapping(void *map, size_t bytes)
{
	void *inert = mmap(map, bytes, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);

	return inert == MAP_FAILED ? -errno : 0;
}

int pu_replace_file(int fd, int inert)
{
	int error = error_or(dup3(inert, fd, O_CLOEXEC));

	return error < 0 ? error : 0;
}

int pu_ring_sever(struct pu_ring *ring, int inert)
{
	int error;

	__atomic_store_n(&ring->severed, true, __ATOMIC_RELEASE);
	error = pu_replace_file(ring->fd, inert);
	if (error < 0)
		return error;
	error = replace_mapping(ring->ring_map, ring->ring_bytes);
	return error ? error : replace_mapping(ring->sqes, ring->sqe_bytes);
}

int pu_ring_register(struct pu_ring *ring, uint32_t opcode, const void *arg, uint32_t count)
{
	return error_or(syscall(SYS_io_uring_register, ring->fd, opcode, arg, count));
}

bool pu_ring_knows(const struct pu_ring *ring, uint8_t opcode)
{
	struct probe probe = { .last_op = 0 };

	if (error_or(syscall(SYS_io_uring_register, ring->fd, PU_REGISTER_PROBE, &probe, 256)) < 0)
		return false;
	return opcode <= probe.last_op && probe.ops[opcode].flags & OP_SUPPORTED;
}

int pu_ring_register_sparse_files(struct pu_ring *ring, uint32_t count)
{
	struct rsrc_register table = { .count = count, .flags = 1 /* sparse */ };

	return pu_ring_register(ring, PU_REGISTER_FILES2, &table, sizeof(table));
}

int pu_ring_update_file(struct pu_ring *ring, uint32_t place, int fd)
{
	struct rsrc_update update = { .offset = place, .data = (uint64_t)(uintptr_t)&fd };

	return pu_ring_register(ring, PU_REGISTER_FILES_UPDATE, &update, 1);
}

int pu_ring_register_sparse_buffers(struct pu_ring *ring, uint32_t count)
{
	struct rsrc_register table = { .count = count, .flags = 1 /* sparse */ };

	return pu_ring_register(ring, PU_REGISTER_BUFFERS2, &table, sizeof(table));
}

int pu_ring_register_provided(struct pu_ring *ring, struct pu_provided *provided, uint32_t entries,
			      uint16_t group)
{
	struct provided_ring new_ring = {
		.addr = (uint64_t)(uintptr_t)provided, .entries = entries, .group = group
	};

	return pu_ring_register(ring, PU_REGISTER_PBUF_RING, &new_ring, 1);
}

int pu_ring_register_self(struct pu_ring *ring)
{
	struct rsrc_update self = { .offset = UINT32_MAX, .data = (uint64_t)ring->fd };
	int error = pu_ring_register(ring, PU_REGISTER_RING_FDS, &self, 1);

	if (error < 0)
		return error;
	ring->enter_fd = (int)self.offset;
	ring->enter_flags = ENTER_REGISTERED_RING;
	return 0;
}

uint32_t pu_ring_unsubmitted(const struct pu_ring *ring)
{
	return ring->sq_tail - __atomic_load_n(ring->k_sq_head, __ATOMIC_ACQUIRE);
}

void pu_ring_retract(struct pu_ring *ring)
{
	ring->sq_tail = __atomic_load_n(ring->k_sq_head, __ATOMIC_ACQUIRE);
	__atomic_store_n(ring->k_sq_tail, ring->sq_tail, __ATOMIC_RELEASE);
}

struct pu_sqe *pu_ring_get_sqe(struct pu_ring *ring)
{
	struct pu_sqe *sqe = pu_ring_take_sqe(ring);

	return sqe ? memset(sqe, 0, (size_t)1 << ring->sqe_shift) : NULL;
}

static int enter(struct pu_ring *ring, uint32_t submit, uint32_t wait, int64_t timeout_ns,
		 uint32_t min_wait_us)
{
	struct kernel_timespec ts;
	struct enter_arg arg;
	uint32_t flags = ring->enter_flags;
	void *extra = NULL;
	size_t extra_bytes = 0;

	/* GETEVENTS even without a wait: it runs deferred work and flushes overflown completions. */
	flags |= ENTER_GETEVENTS;
	if (wait && (timeout_ns >= 0 || min_wait_us) && (ring->features & PU_FEAT_EXT_ARG)) {
		memset(&arg, 0, sizeof(arg));
		if (timeout_ns >= 0) {
			ts.seconds = timeout_ns / 1000000000;
			ts.nanoseconds = timeout_ns % 1000000000;
			arg.timeout = (uint64_t)(uintptr_t)&ts;
		}
		if (ring->features & PU_FEAT_MIN_TIMEOUT)
			arg.min_wait_us = min_wait_us;
		extra = &arg;
		extra_bytes = sizeof(arg);
		flags |= ENTER_EXT_ARG;
	}
	ring->enters++;
	return error_or(syscall(SYS_io_uring_enter, ring->enter_fd, submit, wait, flags, extra,
				extra_bytes));
}

int pu_ring_submit(struct pu_ring *ring, uint32_t wait, int64_t timeout_ns, uint32_t min_wait_us)
{
	int total = 0;

	__atomic_store_n(ring->k_sq_tail, ring->sq_tail, __ATOMIC_RELEASE);
	for (;;) {
		uint32_t pending = pu_ring_unsubmitted(ring);
		int done = enter(ring, pending, wait, timeout_ns, min_wait_us);

		if (done < 0)
			return total ? total : done;
		total += done;
		if ((uint32_t)done == pending)
			return total;
		/* A short submission did not wait either: out of memory, or an entry was refused
		 * (its completion says so). The rest is still in the queue. */
		if (done == 0)
			return total ? total : -EAGAIN;
	}
}

int pu_ring_submit_and_wait(struct pu_ring *ring, uint32_t wait, int64_t timeout_ns,
			    uint32_t min_wait_us)
{
	uint32_t wanted = wait < ring->cq_entries ? wait : ring->cq_entries;
	int64_t end = timeout_ns < 0 ? 0 : pu_now_ns() + timeout_ns;
	int done = pu_ring_submit(ring, wait, timeout_ns, min_wait_us);

	if (min_wait_us && wanted)
		wanted = 1;
	while (done >= 0 && pu_ring_ready(ring) < wanted && !pu_ring_unsubmitted(ring)) {
		int64_t left = timeout_ns < 0 ? PU_FOREVER : end - pu_now_ns();
		int again;

		if (timeout_ns >= 0 && left <= 0)
			break;
		again = pu_ring_submit(ring, wanted, left, 0);
		if (again == -ETIME || again == -EINTR)
			break;
		if (again < 0)
			return again;
	}
	return done;
}

struct pu_sqe *pu_ring_next_sqe(struct pu_ring *ring)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(ring);

	if (!sqe && pu_ring_submit(ring, 0, 0, 0) >= 0)
		sqe = pu_ring_get_sqe(ring);
	return sqe;
}

uint32_t pu_ring_ready(const struct pu_ring *ring)
{
	return __atomic_load_n(ring->k_cq_tail, __ATOMIC_ACQUIRE) - *ring->k_cq_head;
}

static void tell_of_unsubmitted(struct pu_ring *ring, pu_over over, void *context)
{
	uint32_t count = pu_ring_unsubmitted(ring);

	for (uint32_t i = 0; i < count; i++) {
		size_t index = (ring->sq_tail - count + i) & ring->sq_mask;
		const void *sqe = ring->sqes + (index << ring->sqe_shift);

		over(context, ((const struct pu_sqe *)sqe)->user_data, -ECANCELED);
	}
	pu_ring_retract(ring);
}

static void tell_of_completed(struct pu_ring *ring, pu_over over, void *context)
{
	uint32_t there = pu_ring_ready(ring);

	for (uint32_t i = 0; i < there; i++) {
		const struct pu_cqe *cqe = pu_ring_cqe(ring, i);

		if (!(cqe->flags & PU_CQE_MORE))
			over(context, cqe->user_data, cqe->res);
	}
	pu_ring_advance(ring, there);
}

/* A thread ends when all that it had begun is over. */
static bool submitter_has_ended(const struct pu_ring *ring)
{
	return ring->setup_flags & PU_SETUP_SINGLE_ISSUER &&
	       syscall(SYS_tgkill, ring->process, ring->thread, 0) && errno == ESRCH;
}

bool pu_ring_end(struct pu_ring *ring, const uint32_t *in_flight, pu_over over, void *context)
{
	struct sync_cancel everything = { .flags = CANCEL_ALL | CANCEL_ANY };
	int64_t until = pu_now_ns() + PU_END_NS, left = PU_END_NS;

	if (ring->fd < 0 || ring->process != pu_process())
		return true; /* the kernel works on the parent's memory, not on the child's copy */
	if (__atomic_load_n(&ring->severed, __ATOMIC_ACQUIRE))
		return !*in_flight || submitter_has_ended(ring);
	tell_of_unsubmitted(ring, over, context);
	tell_of_completed(ring, over, context);
	if (*in_flight)
		pu_ring_register(ring, PU_REGISTER_SYNC_CANCEL, &everything, 1);
	while (*in_flight && left > 0) {
		int done = enter(ring, 0, 1, left, 0);

		if (done < 0 && done != -ETIME && done != -EINTR)
			return submitter_has_ended(ring);
		tell_of_completed(ring, over, context);
		left = until - pu_now_ns();
	}
	return !*in_flight;
}
