/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/* user_data: a tag, or this */
#define WAKE (UINT64_C(1) << 63)

static size_t page_round(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (bytes + page - 1) / page * page;
}

/* Written by the owner, read by anyone: whole values, no order wanted. */
static inline void count(uint64_t *counter, uint64_t add)
{
	__atomic_store_n(counter, *counter + add, __ATOMIC_RELAXED);
}

static inline void set_state(struct pu_tag *tag, enum pu_tag_state state)
{
	__atomic_store_n(&tag->state, (uint8_t)state, __ATOMIC_RELEASE);
}

static inline bool claim_answer(struct pu_tag *tag)
{
	uint8_t owned = PU_TAG_OWNED;

	return __atomic_compare_exchange_n(&tag->state, &owned, PU_TAG_ANSWERED, false,
					   __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static int open_ring(struct pu_queue *q)
{
	uint32_t entries = 8;

	while (entries < q->depth + 1u) /* one for the wake */
		entries *= 2;
	return pu_ring_open(&q->ring, entries, entries * 2, PU_SETUP_CLAMP,
			    PU_SETUP_SUBMIT_ALL | PU_SETUP_COOP_TASKRUN | PU_SETUP_SINGLE_ISSUER |
				    PU_SETUP_DEFER_TASKRUN | PU_SETUP_NO_SQARRAY);
}

static int map_descriptors(struct pu_queue *q)
{
	/* The stride is that of the deepest queue the kernel allows, whatever ours is. */
	size_t stride = page_round(PU_MAX_DEPTH * sizeof(struct pu_desc));
	void *map;

	q->desc_bytes = page_round(q->depth * sizeof(struct pu_desc));
	if (q->loopback)
		map = mmap(NULL, q->desc_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);
	else
		map = mmap(NULL, q->desc_bytes, PROT_READ, MAP_SHARED, q->cdev,
			   (off_t)(q->id * stride));
	if (map == MAP_FAILED)
		return -errno;
	q->desc = map;
	return madvise(map, q->desc_bytes, MADV_DONTFORK) ? -errno : 0;
}

static int map_buffers(struct pu_queue *q)
{
	size_t bytes = q->depth * q->buffer_bytes;
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (map == MAP_FAILED)
		return -errno;
	q->buffers = map;
	return madvise(map, bytes, MADV_DONTFORK) ? -errno : 0;
}

int pu_queue_open(struct pu_queue *q, int cdev, uint16_t id, uint16_t depth, size_t buffer_bytes)
{
	int error;

	/* Memory this thread allocates must not wait for dirty pages that only it can write. Needs
	 * CAP_SYS_RESOURCE; without it the disk works, but not below heavy memory pressure. */
	if (cdev >= 0)
		prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	memset(q, 0, sizeof(*q));
	q->ring.fd = -1;
	q->wake_fd = -1;
	q->event_fd = -1;
	q->cdev = cdev;
	q->id = id;
	q->depth = depth;
	q->loopback = cdev < 0;
	q->buffer_bytes = page_round(buffer_bytes);
	pthread_mutex_init(&q->inbox_lock, NULL);
	q->tags = calloc(depth, sizeof(*q->tags));
	q->ready = calloc(depth, sizeof(*q->ready));
	q->inbox = calloc(depth, sizeof(*q->inbox));
	q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!q->tags || !q->ready || !q->inbox)
		error = -ENOMEM;
	else if (q->wake_fd < 0)
		error = -errno;
	else
		error = map_descriptors(q);
	if (!error)
		error = map_buffers(q);
	if (!error && !q->loopback)
		error = open_ring(q);
	if (!error && !q->loopback) {
		error = pu_ring_register(&q->ring, PU_REGISTER_FILES, &cdev, 1);
		error = error < 0 ? error : 0;
	}
	if (error) {
		pu_queue_close(q);
		pu_queue_free(q);
	}
	return error;
}

void pu_queue_close(struct pu_queue *q)
{
	pu_ring_close(&q->ring);
	if (q->desc)
		munmap(q->desc, q->desc_bytes);
	q->desc = NULL;
	for (uint16_t tag = 0; q->tags && tag < q->depth; tag++)
		set_state(&q->tags[tag], PU_TAG_GONE);
	pthread_mutex_lock(&q->inbox_lock);
	if (q->wake_fd >= 0)
		close(q->wake_fd);
	q->wake_fd = -1;
	if (q->event_fd >= 0)
		close(q->event_fd);
	q->event_fd = -1;
	pthread_mutex_unlock(&q->inbox_lock);
}

void pu_queue_free(struct pu_queue *q)
{
	if (q->buffers)
		munmap(q->buffers, q->depth * q->buffer_bytes);
	free(q->tags);
	free(q->ready);
	free(q->inbox);
	pthread_mutex_destroy(&q->inbox_lock);
	q->buffers = NULL;
	q->tags = NULL;
	q->ready = NULL;
	q->inbox = NULL;
}

int pu_queue_sever(struct pu_queue *q)
{
	__atomic_store_n(&q->severed, true, __ATOMIC_RELEASE);
	/* Same address, no device behind it: the owner may read it whenever it comes back. */
	if (mmap(q->desc, q->desc_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		return -errno;

	int error = pu_ring_sever(&q->ring);

	/* An owner that waits in the old ring keeps it. */
	pthread_mutex_lock(&q->inbox_lock);
	if (q->wake_fd >= 0)
		eventfd_write(q->wake_fd, 1);
	if (q->event_fd >= 0)
		eventfd_write(q->event_fd, 1);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}

static struct pu_sqe *get_sqe(struct pu_queue *q)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(&q->ring);

	if (!sqe && pu_ring_submit(&q->ring, 0, 0, 0) >= 0)
		sqe = pu_ring_get_sqe(&q->ring);
	return sqe;
}

static int queue_command(struct pu_queue *q, uint32_t cmd_op, uint16_t tag, int32_t result)
{
	struct pu_sqe *sqe = get_sqe(q);

	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->off = cmd_op;
	sqe->user_data = tag;
	sqe->cmd[0] = q->id | (uint64_t)tag << 16 | (uint64_t)(uint32_t)result << 32;
	sqe->cmd[1] = (uint64_t)(uintptr_t)pu_queue_buffer(q, tag);
	q->in_kernel++;
	return 0;
}

static int arm_wake(struct pu_queue *q)
{
	struct pu_sqe *sqe = get_sqe(q);

	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_READ;
	sqe->fd = q->wake_fd;
	sqe->addr = (uint64_t)(uintptr_t)&q->wake_value;
	sqe->len = sizeof(q->wake_value);
	sqe->user_data = WAKE;
	return 0;
}

int pu_queue_fetch(struct pu_queue *q)
{
	int error = q->loopback ? 0 : arm_wake(q);

	for (uint16_t tag = 0; tag < q->depth && !error; tag++) {
		set_state(&q->tags[tag], PU_TAG_FETCHING);
		if (q->loopback)
			q->in_kernel++;
		else
			error = queue_command(q, PU_IO_FETCH_REQ, tag, 0);
	}
	while (!error && !q->loopback && pu_ring_unsubmitted(&q->ring)) {
		int done = pu_ring_submit(&q->ring, 0, 0, 0);

		if (done < 0 && done != -EINTR)
			error = done;
	}
	return error;
}

static void take_request(struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags % PU_OP_COUNT;

	count(&q->counters.requests[op], 1);
	count(&q->counters.bytes[op], (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
	q->tags[tag].generation++;
	set_state(&q->tags[tag], PU_TAG_OWNED);
	q->in_kernel--;
	q->owned++;
	q->ready[q->nr_ready++] = tag;
}

static void lose_tag(struct pu_queue *q, uint16_t tag, int32_t result)
{
	set_state(&q->tags[tag], PU_TAG_GONE);
	q->in_kernel--;
	q->aborted = true;
	if (result != -ENODEV && result != -ECANCELED && !q->error)
		q->error = result;
}

static int reap(struct pu_queue *q)
{
	uint32_t there = pu_ring_ready(&q->ring);
	int error = 0;

	for (uint32_t i = 0; i < there; i++) {
		const struct pu_cqe *cqe = pu_ring_cqe(&q->ring, i);

		if (cqe->user_data == WAKE)
			error = arm_wake(q);
		else if (cqe->res >= 0)
			take_request(q, (uint16_t)cqe->user_data);
		else
			lose_tag(q, (uint16_t)cqe->user_data, cqe->res);
	}
	pu_ring_advance(&q->ring, there);
	return error;
}

static int commit(struct pu_queue *q, uint16_t tag, int64_t result)
{
	struct pu_tag *t = &q->tags[tag];
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	int32_t value = 0;

	/* Never a short result: kernels disagree about what it means. */
	if (result < 0) {
		value = result < -4095 ? -EIO : (int32_t)result;
		count(&q->counters.errors, 1);
	} else if (op == PU_OP_READ || op == PU_OP_WRITE) {
		value = (int32_t)(desc->nr_sectors << PU_SECTOR_SHIFT);
	}
	q->owned--;
	t->result = value;
	if (q->loopback) {
		set_state(t, PU_TAG_FETCHING);
		q->in_kernel++;
		return 0;
	}
	set_state(t, PU_TAG_COMMITTING);
	return queue_command(q, PU_IO_COMMIT_AND_FETCH_REQ, tag, value);
}

int pu_queue_answer(struct pu_queue *q, uint16_t tag, int64_t result)
{
	if (!claim_answer(&q->tags[tag]))
		return -EALREADY;
	return commit(q, tag, result);
}

static void send_message(struct pu_queue *q, uint16_t tag, int32_t result)
{
	pthread_mutex_lock(&q->inbox_lock);
	q->inbox[q->nr_inbox] = (struct pu_message){ tag, result };
	__atomic_store_n(&q->nr_inbox, q->nr_inbox + 1, __ATOMIC_RELAXED);
	if (q->nr_inbox == 1 && q->wake_fd >= 0)
		eventfd_write(q->wake_fd, 1);
	pthread_mutex_unlock(&q->inbox_lock);
}

int pu_queue_post(struct pu_queue *q, uint16_t tag, int64_t result)
{
	if (!claim_answer(&q->tags[tag]))
		return -EALREADY;
	send_message(q, tag, result < 0 ? (result < -4095 ? -EIO : (int32_t)result) : 0);
	return 0;
}

void pu_queue_fail_held(struct pu_queue *q, int error)
{
	for (uint16_t tag = 0; tag < q->depth; tag++)
		pu_queue_post(q, tag, -error);
}

void pu_queue_wake(struct pu_queue *q)
{
	pthread_mutex_lock(&q->inbox_lock);
	if (q->wake_fd >= 0)
		eventfd_write(q->wake_fd, 1);
	pthread_mutex_unlock(&q->inbox_lock);
}

static int read_inbox(struct pu_queue *q)
{
	int error = 0;

	/* Unlocked look first: an idle inbox must not cost the fast path a lock. A message that is
	 * missed here has written the wake_fd, so the wait that follows returns at once. */
	if (!__atomic_load_n(&q->nr_inbox, __ATOMIC_RELAXED))
		return 0;
	pthread_mutex_lock(&q->inbox_lock);
	for (uint32_t i = 0; i < q->nr_inbox && !error; i++)
		error = commit(q, q->inbox[i].tag, q->inbox[i].result);
	__atomic_store_n(&q->nr_inbox, 0, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}

int pu_queue_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		    uint32_t nr_sectors)
{
	if (!q->loopback || q->tags[tag].state != PU_TAG_FETCHING)
		return -EINVAL;
	q->desc[tag] = (struct pu_desc){ op_flags, nr_sectors, start_sector, 0 };
	q->nr_ready = q->nr_injected;
	take_request(q, tag);
	q->nr_injected = q->nr_ready;
	return 0;
}

static int wait_loopback(struct pu_queue *q, int64_t timeout_ns)
{
	struct timespec limit = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
	struct pollfd wake = { .fd = q->wake_fd, .events = POLLIN };

	if (!q->nr_injected && ppoll(&wake, 1, timeout_ns < 0 ? NULL : &limit, NULL) > 0)
		eventfd_read(q->wake_fd, &q->wake_value);
	q->nr_ready = q->nr_injected;
	q->nr_injected = 0;
	return 0;
}

static bool drained(const struct pu_queue *q)
{
	return !q->loopback && q->in_kernel == 0 && q->owned == 0;
}

static int end_of(const struct pu_queue *q)
{
	return q->error ? q->error : -ENODEV;
}

int pu_queue_event_fd(struct pu_queue *q)
{
	int fd, error;

	if (q->loopback)
		return q->wake_fd;
	if (q->event_fd >= 0)
		return q->event_fd;
	fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fd < 0)
		return -errno;
	error = pu_ring_register(&q->ring, PU_REGISTER_EVENTFD, &fd, 1);
	if (error < 0)
		close(fd);
	else
		q->event_fd = fd;
	return error < 0 ? error : fd;
}

static int wait_kernel(struct pu_queue *q, int64_t timeout_ns)
{
	eventfd_t events;
	int done;

	/* Before the enter: what comes after it is told anew. */
	if (q->event_fd >= 0)
		eventfd_read(q->event_fd, &events);
	done = pu_ring_submit(&q->ring, timeout_ns != 0, timeout_ns, 0);
	count(&q->counters.enters, 1);
	if (__atomic_load_n(&q->severed, __ATOMIC_ACQUIRE))
		return -ESHUTDOWN;
	/* Out of memory or completions to be reaped first: the commits stay queued, try again. */
	if (done == -EAGAIN && !pu_ring_ready(&q->ring))
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	if (done < 0 && done != -ETIME && done != -EINTR && done != -EAGAIN && done != -EBUSY)
		return done;
	return reap(q);
}

int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns)
{
	int error = read_inbox(q);

	q->nr_ready = 0;
	if (!error && drained(q))
		return end_of(q);
	if (!error)
		error = q->loopback ? wait_loopback(q, timeout_ns) : wait_kernel(q, timeout_ns);
	if (!error)
		error = read_inbox(q);
	if (error)
		return error;
	if (q->nr_ready > q->counters.largest_batch)
		count(&q->counters.largest_batch, q->nr_ready - q->counters.largest_batch);
	/* Said at once: nothing will ever wake a caller that waits for the descriptor instead. */
	if (drained(q))
		return end_of(q);
	return (int)q->nr_ready;
}

int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context)
{
	for (;;) {
		int there = pu_queue_wait(q, PU_FOREVER);

		if (there < 0)
			return there == -ENODEV ? 0 : there;
		for (uint32_t i = 0; i < q->nr_ready; i++) {
			uint16_t tag = q->ready[i];
			const struct pu_desc *desc = &q->desc[tag];
			int64_t result = handler(context, desc->op_flags & 0xff,
						 desc->op_flags & ~0xffu,
						 pu_desc_offset(desc),
						 (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT,
						 pu_queue_buffer(q, tag));
			int error = pu_queue_answer(q, tag, result);

			/* -EALREADY: failed from outside while the handler ran */
			if (error && error != -EALREADY)
				return error;
		}
		if (q->loopback)
			return 0;
	}
}

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot)
{
	const uint64_t *from = (const uint64_t *)&q->counters;
	uint64_t *to = (uint64_t *)snapshot;

	for (size_t i = 0; i < sizeof(*snapshot) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
