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

#include "forked.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/* The commonest way of a request is one piece of code, which counts at this rate: each call costs
 * ten instructions of some two thousand. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NEVER_INLINE static __attribute__((noinline))

#define WAKE PU_USER_DATA(PU_KIND_WAKE, 0)
#define WATCH PU_USER_DATA(PU_KIND_WATCH, 0)
#define IDLE PU_USER_DATA(PU_KIND_IDLE, 0)

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
	__atomic_store_n(&tag->life, pu_life(state, pu_tag_generation(tag)), __ATOMIC_RELEASE);
}

static inline bool try_to_claim(struct pu_tag *tag, uint32_t generation)
{
	uint64_t owned = pu_life(PU_TAG_OWNED, generation);

	return __atomic_compare_exchange_n(&tag->life, &owned, pu_life(PU_TAG_ANSWERED, generation),
					   false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* While somebody copies the request's data: until that is over, or `patience` looks at it. */
NEVER_INLINE bool claim_unpinned(struct pu_queue *q, uint16_t tag, uint32_t generation,
				 uint32_t patience)
{
	while (pu_queue_holds(q, tag, generation)) {
		if (try_to_claim(&q->tags[tag], generation))
			return true;
		if (!patience--)
			return false;
		nanosleep(&(struct timespec){ 0, 50000 }, NULL);
	}
	return false;
}

static inline bool claim_answer(struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	return try_to_claim(&q->tags[tag], generation) ||
	       claim_unpinned(q, tag, generation, UINT32_MAX);
}

/* The request of that generation is not answered, and its tag brings no other, until it is
 * unpinned. False when it is answered already. */
static bool pin(struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	uint64_t *life = &q->tags[tag].life, seen = __atomic_load_n(life, __ATOMIC_RELAXED);

	do
		if ((seen & ~PU_PINS) != pu_life(PU_TAG_OWNED, generation))
			return false;
	while (!__atomic_compare_exchange_n(life, &seen, seen + PU_PIN, true, __ATOMIC_ACQ_REL,
					    __ATOMIC_RELAXED));
	return true;
}

static void unpin(struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	uint64_t *life = &q->tags[tag].life, seen = __atomic_load_n(life, __ATOMIC_RELAXED);

	do
		if ((seen & ~PU_PINS) != pu_life(PU_TAG_OWNED, generation))
			return; /* the queue was closed meanwhile */
	while (!__atomic_compare_exchange_n(life, &seen, seen - PU_PIN, true, __ATOMIC_ACQ_REL,
					    __ATOMIC_RELAXED));
}

/* By the owner, who alone brings a tag its next request. */
static inline bool claim_current(struct pu_queue *q, uint16_t tag)
{
	return claim_answer(q, tag, pu_tag_generation(&q->tags[tag]));
}

static inline void own(struct pu_tag *tag)
{
	__atomic_store_n(&tag->life, pu_life(PU_TAG_OWNED, pu_tag_generation(tag) + 1),
			 __ATOMIC_RELEASE);
}

static int open_ring(struct pu_queue *q, uint32_t extra)
{
	uint32_t wanted = q->depth + 4u + extra; /* a few for wakes and batches */
	uint32_t entries = 8;
	int error;

	while (entries < wanted && entries < PU_RING_MAX_ENTRIES)
		entries *= 2;
	error = pu_ring_open(&q->ring, entries, entries * 2, PU_SETUP_CLAMP,
			     PU_SETUP_SUBMIT_ALL | PU_SETUP_COOP_TASKRUN | PU_SETUP_SINGLE_ISSUER |
				     PU_SETUP_DEFER_TASKRUN | PU_SETUP_NO_SQARRAY);
	if (!error && (q->auto_buffer || q->zero_copy))
		error = pu_ring_register_sparse_buffers(&q->ring, q->depth);
	return error < 0 ? error : 0;
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

static int give_buffers(struct pu_queue *q, struct pu_buffers *theirs, size_t bytes)
{
	q->buffers = theirs ? theirs : pu_buffers_new(q->depth, bytes);
	if (!q->buffers)
		return -ENOMEM;
	q->own_buffers = !theirs;
	for (uint32_t tag = 0; tag < q->depth; tag++)
		q->tags[tag].buffer = pu_queue_next_buffer(q, (uint16_t)tag);
	return 0;
}

static int register_files(struct pu_queue *q, const int *files, uint32_t count)
{
	int *all = calloc(count + 1u, sizeof(*all));
	int error;

	if (!all)
		return -ENOMEM;
	all[0] = q->cdev; /* -1, a loopback's, leaves the place empty */
	if (count)
		memcpy(all + 1, files, count * sizeof(*all));
	error = pu_ring_register(&q->ring, PU_REGISTER_FILES, all, count + 1u);
	free(all);
	return error < 0 ? error : 0;
}

static int open_parts(struct pu_queue *q, const struct pu_queue_options *options)
{
	int error = map_descriptors(q);

	if (!error)
		error = give_buffers(q, options->buffers, options->buffer_bytes);
	if (error || (q->loopback && !options->extra_entries))
		return error;
	error = open_ring(q, options->extra_entries);
	return error ? error : register_files(q, options->files, options->nr_files);
}

void pu_io_flusher(void)
{
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
}

int pu_queue_open(struct pu_queue *q, int cdev, const struct pu_queue_options *options)
{
	uint64_t flags = options->flags;
	int error;

	if (cdev >= 0)
		pu_io_flusher();
	memset(q, 0, sizeof(*q));
	q->ring.fd = -1;
	q->post_ring.fd = -1;
	q->wake_fd = -1;
	q->event_fd = -1;
	q->watch_fd = -1;
	q->cdev = cdev;
	q->own_cdev = options->own_device && cdev >= 0;
	q->process = pu_process();
	q->id = options->id;
	q->depth = options->depth;
	q->first_tag = options->first_tag;
	q->tag_step = options->tag_step ? options->tag_step : 1;
	q->faults = options->faults;
	q->idle_time[0] = options->trim_after_ns / 1000000000;
	q->idle_time[1] = options->trim_after_ns % 1000000000;
	q->client_memory = options->client_memory;
	q->loopback = cdev < 0;
	q->copies = !(flags & (PU_F_USER_COPY | PU_F_ZERO_COPY | PU_F_AUTO_BUF_REG));
	q->user_copy = !q->loopback && flags & PU_F_USER_COPY;
	q->zero_copy = flags & PU_F_ZERO_COPY;
	q->auto_buffer = flags & PU_F_AUTO_BUF_REG;
	q->zoned = flags & PU_F_ZONED;
	pthread_mutex_init(&q->inbox_lock, NULL);
	q->tags = calloc(q->depth, sizeof(*q->tags));
	q->ready = calloc(2u * q->depth, sizeof(*q->ready)); /* left ones, and as many that came */
	q->inbox = calloc(q->depth, sizeof(*q->inbox));
	q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!q->tags || !q->ready || !q->inbox)
		error = -ENOMEM;
	else if (q->wake_fd < 0)
		error = -errno;
	else
		error = open_parts(q, options);
	if (!error && !q->loopback && flags & PU_F_BATCH_IO)
		error = pu_batch_open(q);
	if (error) {
		pu_queue_close(q);
		pu_queue_free(q);
	}
	return error;
}

static void io_is_over(void *context, uint64_t user_data, int32_t result)
{
	struct pu_queue *q = context;
	enum pu_kind kind = (enum pu_kind)(user_data >> PU_KIND_SHIFT);

	if (kind >= PU_KIND_OTHER && kind < PU_KIND_WAKE)
		q->complete(q->completer, user_data, result);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Descriptors at the same address with no device behind them: whoever still has a request, on
 * whichever thread, may look at its descriptor until the queue is freed. */
static int leave_device(struct pu_queue *q)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

	if (!q->desc)
		return 0;
	return mmap(q->desc, q->desc_bytes, PROT_READ, flags, -1, 0) == MAP_FAILED ? -errno : 0;
}

/* No request is anybody's any more: what still ends meets a generation that it does not know, and
 * nobody may begin to copy a request's data. */
static void take_tags_away(struct pu_queue *q)
{
	for (uint32_t tag = 0; q->tags && tag < q->depth; tag++) {
		uint32_t next = pu_tag_generation(&q->tags[tag]) + 1;

		if (__atomic_exchange_n(&q->tags[tag].life, pu_life(PU_TAG_GONE, next),
					__ATOMIC_ACQ_REL) & PU_PINS)
			q->copying = true;
	}
}

static void leave_number(struct pu_queue *q)
{
	if (!q->own_cdev)
		return;
	if (q->copying && q->wake_fd >= 0 && !pu_replace_file(q->cdev, q->wake_fd))
		return;
	pu_fork_drop(q->cdev);
	close(q->cdev);
	q->own_cdev = false;
}

bool pu_queue_close(struct pu_queue *q)
{
	bool parents = q->process != pu_process(); /* of which the fork left out the mappings */
	bool over;

	take_tags_away(q);
	over = pu_ring_end(&q->ring, &q->foreign_inflight, io_is_over, q);
	pu_ring_close(&q->ring);
	if (!parents) {
		leave_device(q);
		pthread_mutex_lock(&q->inbox_lock); /* in a child whoever had it is not there */
	}
	leave_number(q);
	pu_ring_close(&q->post_ring);
	pu_batch_close(q); /* after the rings: they may read it */
	close_fd(&q->wake_fd);
	close_fd(&q->event_fd);
	if (!parents)
		pthread_mutex_unlock(&q->inbox_lock);
	return over;
}

void pu_queue_free(struct pu_queue *q)
{
	bool parents = q->process != pu_process();

	if (q->desc && !parents)
		munmap(q->desc, q->desc_bytes);
	if (q->own_buffers)
		pu_buffers_free(q->buffers);
	if (q->own_cdev) {
		pu_fork_drop(q->cdev);
		close(q->cdev);
	}
	free(q->tags);
	free(q->ready);
	free(q->inbox);
	pthread_mutex_destroy(&q->inbox_lock);
	q->desc = NULL;
	q->buffers = NULL;
	q->own_buffers = false;
	q->own_cdev = false;
	q->tags = NULL;
	q->ready = NULL;
	q->inbox = NULL;
}

int pu_queue_sever(struct pu_queue *q)
{
	__atomic_store_n(&q->severed, true, __ATOMIC_RELEASE);
	int error = leave_device(q);

	pthread_mutex_lock(&q->inbox_lock);
	if (!error && q->wake_fd >= 0 && q->ring.fd >= 0)
		error = pu_ring_sever(&q->ring, q->wake_fd);
	if (!error && q->wake_fd >= 0 && q->cdev >= 0)
		error = pu_replace_file(q->cdev, q->wake_fd);
	/* An owner that waits in the old ring keeps it. */
	if (q->wake_fd >= 0)
		eventfd_write(q->wake_fd, 1);
	if (q->event_fd >= 0)
		eventfd_write(q->event_fd, 1);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}

struct pu_sqe *pu_queue_sqe(struct pu_queue *q)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(&q->ring);

	if (!sqe && pu_ring_submit(&q->ring, 0, 0, 0) >= 0)
		sqe = pu_ring_get_sqe(&q->ring);
	return sqe;
}

static int queue_command(struct pu_queue *q, uint32_t cmd_op, uint16_t tag, int32_t result)
{
	struct pu_sqe *sqe = pu_ring_take_sqe(&q->ring);

	if (!sqe && pu_ring_submit(&q->ring, 0, 0, 0) >= 0)
		sqe = pu_ring_take_sqe(&q->ring);
	if (!sqe)
		return -EAGAIN;
	*sqe = (struct pu_sqe){
		.opcode = PU_OPCODE_URING_CMD,
		.flags = PU_SQE_FIXED_FILE,
		.off = cmd_op,
		.addr = q->auto_buffer ? pu_queue_buffer_index(q, tag) | PU_AUTO_BUF_FALLBACK : 0,
		.user_data = tag,
		.cmd = { q->id | (uint64_t)tag << 16 | (uint64_t)(uint32_t)result << 32,
			 q->copies ? (uint64_t)(uintptr_t)pu_queue_next_buffer(q, tag) :
				     q->tags[tag].zone_lba },
	};
	return 0;
}

static int arm_wake(struct pu_queue *q)
{
	struct pu_sqe *sqe = pu_queue_sqe(q);

	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_READ;
	sqe->fd = q->wake_fd;
	sqe->addr = (uint64_t)(uintptr_t)&q->wake_value;
	sqe->len = sizeof(q->wake_value);
	sqe->user_data = WAKE;
	return 0;
}

static int fetch_tags(struct pu_queue *q)
{
	int error = 0;

	for (uint32_t tag = q->first_tag; tag < q->depth && !error; tag += q->tag_step) {
		set_state(&q->tags[tag], PU_TAG_FETCHING);
		q->in_kernel++;
		if (!q->loopback && !q->batch)
			error = queue_command(q, PU_IO_FETCH_REQ, (uint16_t)tag, 0);
	}
	if (!error && q->batch) {
		q->in_kernel = 0; /* not told of each tag */
		error = pu_batch_fetch(q);
	}
	return error;
}

int pu_queue_fetch(struct pu_queue *q)
{
	bool ring = q->ring.fd >= 0;
	int error = ring ? arm_wake(q) : 0;

	if (!error)
		error = fetch_tags(q);
	while (!error && ring && pu_ring_unsubmitted(&q->ring)) {
		int done = pu_ring_submit(&q->ring, 0, 0, 0);

		if (done < 0 && done != -EINTR)
			error = done;
	}
	return error;
}

/* Never a short result: kernels disagree about what it means. `length` is that of the request. */
static inline int32_t value_for(uint32_t op, uint64_t length, int64_t result)
{
	if (result < 0)
		return result < -4095 ? -EIO : (int32_t)result;
	if (op <= PU_OP_WRITE || op == PU_OP_ZONE_APPEND)
		return (int32_t)length;
	return op == PU_OP_REPORT_ZONES ? (int32_t)((length >> PU_SECTOR_SHIFT) * PU_ZONE_BYTES) : 0;
}

static int32_t value_of(const struct pu_desc *desc, int64_t result)
{
	return value_for(desc->op_flags & 0xff, (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT, result);
}

static inline void commit_in_batch(struct pu_queue *q, uint16_t tag, int32_t value)
{
	struct pu_batch *b = q->batch;
	uint64_t *words;

	if (!b->plain) {
		pu_batch_commit(q, tag, value);
		return;
	}
	words = (uint64_t *)(void *)b->elements[b->filling] + ((size_t)b->filled++ << q->copies);
	words[0] = tag | (uint64_t)tag << 16 | (uint64_t)(uint32_t)value << 32;
	if (q->copies)
		words[1] = (uint64_t)(uintptr_t)pu_queue_next_buffer(q, tag);
}

NEVER_INLINE int commit_alone(struct pu_queue *q, uint16_t tag, int32_t value)
{
	q->in_kernel++;
	if (!q->loopback)
		return queue_command(q, PU_IO_COMMIT_AND_FETCH_REQ, tag, value);
	q->tags[tag].result = value;
	set_state(&q->tags[tag], PU_TAG_FETCHING);
	return 0;
}

ALWAYS_INLINE int commit(struct pu_queue *q, uint16_t tag, int32_t value)
{
	if (value < 0)
		count(&q->counters.errors, 1);
	q->owned--;
	if (!q->batch)
		return commit_alone(q, tag, value);
	commit_in_batch(q, tag, value);
	return 0;
}

/* The rarer ways are kept out of the commonest. */
NEVER_INLINE int64_t handle_copied(struct pu_queue *q, uint16_t tag, uint64_t length)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	uint32_t generation = pu_tag_generation(&q->tags[tag]);
	void *buffer = pu_queue_buffer(q, tag);
	int64_t result = pu_queue_fill_buffer(q, tag, generation);

	if (result < 0)
		return result;
	result = q->native->handler(q->native->context, op, desc->op_flags & ~0xffu,
				    pu_desc_offset(desc), length, buffer);
	if (result >= 0 && op == PU_OP_READ)
		result = pu_queue_copy(q, tag, generation, buffer, 0, length, 0);
	return result;
}

NEVER_INLINE int64_t handle_shared(struct pu_queue *q, uint16_t tag, uint64_t length)
{
	const struct pu_desc *desc = &q->desc[tag];
	void *bytes = pu_queue_shared(q, tag);

	if (!bytes)
		return -EIO;
	return q->native->handler(q->native->context, desc->op_flags & 0xff,
				  desc->op_flags & ~0xffu, pu_desc_offset(desc), length, bytes);
}

ALWAYS_INLINE void handle(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t length)
{
	const struct pu_native *native = q->native;
	struct pu_tag *t = &q->tags[tag];
	uint32_t op = op_flags & 0xff;
	int64_t result;
	int error;

	if (op_flags & PU_FLAG_SHMEM_ZC)
		result = handle_shared(q, tag, length);
	else if (native->copy)
		result = handle_copied(q, tag, length);
	else
		result = native->handler(native->context, op, op_flags & ~0xffu,
					 pu_desc_offset(&q->desc[tag]), length, t->buffer);
	if (!claim_current(q, tag)) /* failed from outside while the handler ran */
		return;
	error = commit(q, tag, value_for(op, length, result));
	if (error && !q->error)
		q->error = error;
}

ALWAYS_INLINE void take(struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];
	struct pu_tag *t = &q->tags[tag];
	uint32_t op_flags = desc->op_flags, op = op_flags % PU_OP_COUNT;
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;

	count(&q->counters.requests[op], 1);
	count(&q->counters.bytes[op], length);
	t->fetched = false;
	t->zone_lba = 0; /* the kernel refuses a commit that has one for nothing */
	t->buffer = pu_queue_next_buffer(q, tag); /* before anybody can fail it, and offer another */
	own(t);
	q->owned++;
	if (q->native) {
		q->nr_ready++;
		handle(q, tag, op_flags, length);
	} else {
		q->ready[q->nr_ready++] = tag;
	}
}

void pu_queue_take(struct pu_queue *q, const uint16_t *tags, uint32_t how_many)
{
	for (uint32_t i = 0; i < how_many; i++)
		take(q, tags[i]);
}

void pu_queue_lose(struct pu_queue *q, uint16_t tag, int32_t result)
{
	set_state(&q->tags[tag], PU_TAG_GONE);
	q->aborted = true;
	if (result != -ENODEV && result != -ECANCELED && !q->error)
		q->error = result;
}

static inline int complete_tag(struct pu_queue *q, uint16_t tag, int32_t result)
{
	if (result == PU_RES_NEED_GET_DATA)
		return queue_command(q, PU_IO_NEED_GET_DATA, tag, 0);
	q->in_kernel--;
	if (result >= 0)
		take(q, tag);
	else
		pu_queue_lose(q, tag, result);
	return 0;
}

static int reap(struct pu_queue *q)
{
	uint32_t there = pu_ring_ready(&q->ring);
	int error = 0;

	for (uint32_t i = 0; i < there; i++) {
		const struct pu_cqe *cqe = pu_ring_cqe(&q->ring, i);
		enum pu_kind kind = (enum pu_kind)(cqe->user_data >> PU_KIND_SHIFT);
		int failed = 0;

		if (kind == PU_KIND_TAG)
			failed = complete_tag(q, (uint16_t)cqe->user_data, cqe->res);
		else if (kind <= PU_KIND_COMMIT)
			pu_batch_complete(q, cqe);
		else if (kind < PU_KIND_WAKE)
			q->complete(q->completer, cqe->user_data, cqe->res);
		else if (cqe->user_data == WATCH) {
			q->watching = false;
			q->watched = true;
		} else if (cqe->user_data == IDLE) {
			q->timing = false;
			q->elapsed = true;
		} else
			failed = arm_wake(q);
		error = error ? error : failed;
	}
	pu_ring_advance(&q->ring, there);
	return error;
}

NEVER_INLINE int answer_unpinned(struct pu_queue *q, uint16_t tag, int64_t result)
{
	if (!claim_current(q, tag))
		return -EALREADY;
	return commit(q, tag, value_of(&q->desc[tag], result));
}

int pu_queue_answer(struct pu_queue *q, uint16_t tag, int64_t result)
{
	if (!try_to_claim(&q->tags[tag], pu_tag_generation(&q->tags[tag])))
		return answer_unpinned(q, tag, result);
	return commit(q, tag, value_of(&q->desc[tag], result));
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

static bool takes_posts(const struct pu_queue *q)
{
	/* A buffer that the kernel registered by itself must go back over the ring it came by. */
	return q->batch && !q->auto_buffer && !__atomic_load_n(&q->severed, __ATOMIC_ACQUIRE);
}

static int post_to_kernel(struct pu_queue *q, uint16_t tag, int64_t result)
{
	int32_t value = value_of(&q->desc[tag], result);
	int error = 0;

	pthread_mutex_lock(&q->inbox_lock);
	if (q->wake_fd < 0) /* closed */
		error = -ESHUTDOWN;
	else if (q->post_ring.fd < 0)
		error = pu_ring_open(&q->post_ring, 4, 0, 0, PU_SETUP_SUBMIT_ALL | PU_SETUP_NO_SQARRAY);
	if (!error)
		error = pu_batch_commit_now(q, &q->post_ring, tag, value);
	if (!error) {
		if (value < 0)
			__atomic_fetch_add(&q->counters.errors, 1, __ATOMIC_RELAXED);
		__atomic_fetch_add(&q->posted, 1, __ATOMIC_RELEASE);
		if (__atomic_load_n(&q->aborted, __ATOMIC_ACQUIRE))
			eventfd_write(q->wake_fd, 1); /* it may have waited for this one alone */
	}
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}

static void post(struct pu_queue *q, uint16_t tag, int64_t result)
{
	/* The kernel may bring the tag's next request before this returns: its state is not touched. */
	if (takes_posts(q) && !post_to_kernel(q, tag, result))
		return;
	send_message(q, tag, result < 0 ? (result < -4095 ? -EIO : (int32_t)result) : 0);
}

int pu_queue_post(struct pu_queue *q, uint16_t tag, uint32_t generation, int64_t result)
{
	if (!claim_answer(q, tag, generation))
		return -EALREADY;
	post(q, tag, result);
	return 0;
}

/* The kernel takes a read's data from the place that the commit names for the next request. */
static void bring_along(const struct pu_queue *q, uint16_t tag, uint8_t *fresh)
{
	const struct pu_desc *desc = &q->desc[tag];

	if (q->copies && (desc->op_flags & 0xff) == PU_OP_READ)
		memcpy(fresh, pu_queue_buffer(q, tag), (size_t)desc->nr_sectors << PU_SECTOR_SHIFT);
}

int pu_queue_answer_kept(struct pu_queue *q, uint16_t tag, uint32_t generation, int64_t result,
			 bool here, uint8_t **kept)
{
	uint8_t *fresh = pu_buffers_map(q->buffers);

	*kept = NULL;
	if (!fresh)
		return -ENOMEM;
	if (!claim_answer(q, tag, generation)) {
		pu_buffers_unmap(q->buffers, fresh);
		return -EALREADY;
	}
	if (result >= 0)
		bring_along(q, tag, fresh);
	*kept = pu_buffers_exchange(q->buffers, tag, fresh);
	if (here)
		return commit(q, tag, value_of(&q->desc[tag], result));
	post(q, tag, result);
	return 0;
}

static void fail(struct pu_queue *q, uint16_t tag, int error)
{
	uint32_t generation = pu_tag_generation(&q->tags[tag]);
	uint8_t *fresh;

	if (!pu_queue_holds(q, tag, generation))
		return;
	fresh = pu_buffers_map(q->buffers);
	if (!fresh) /* it is lost with its queue */
		return;
	if (claim_unpinned(q, tag, generation, 100)) {
		pu_buffers_retire(q->buffers, pu_buffers_exchange(q->buffers, tag, fresh));
		post(q, tag, -error);
	} else {
		pu_buffers_unmap(q->buffers, fresh);
	}
}

void pu_queue_fail_held(struct pu_queue *q, int error)
{
	for (uint32_t tag = 0; tag < q->depth; tag++)
		fail(q, (uint16_t)tag, error);
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
	for (uint32_t i = 0; i < q->nr_inbox && !error; i++) {
		uint16_t tag = q->inbox[i].tag;

		error = commit(q, tag, value_of(&q->desc[tag], q->inbox[i].result));
	}
	__atomic_store_n(&q->nr_inbox, 0, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}

int pu_queue_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		    uint32_t nr_sectors)
{
	if (!q->loopback || pu_tag_state(&q->tags[tag]) != PU_TAG_FETCHING)
		return -EINVAL;
	q->desc[tag] = (struct pu_desc){ op_flags, nr_sectors, start_sector, 0 };
	q->in_kernel--;
	q->nr_ready = q->nr_injected;
	take(q, tag);
	q->nr_injected = q->nr_ready;
	return 0;
}

static int wait_loopback(struct pu_queue *q, int64_t timeout_ns)
{
	struct timespec limit = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
	struct pollfd fds[] = {
		{ .fd = q->wake_fd, .events = POLLIN },
		{ .fd = q->watch_fd, .events = POLLIN },
	};

	if (q->nr_injected)
		limit = (struct timespec){ 0, 0 };
	if (ppoll(fds, 2, timeout_ns < 0 && !q->nr_injected ? NULL : &limit, NULL) > 0 &&
	    fds[0].revents)
		eventfd_read(q->wake_fd, &q->wake_value);
	q->watched = fds[1].revents;
	q->nr_ready = q->nr_injected;
	q->nr_injected = 0;
	return 0;
}

static bool drained(const struct pu_queue *q)
{
	if (q->loopback || q->in_kernel || pu_queue_awaits(q) || pu_queue_held(q))
		return false;
	return !q->batch || pu_batch_idle(q->batch);
}

static int end_of(const struct pu_queue *q)
{
	return q->error ? q->error : -ENODEV;
}

int pu_queue_event_fd(struct pu_queue *q)
{
	int fd, error;

	if (q->loopback && q->ring.fd < 0)
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

int pu_queue_watch(struct pu_queue *q, int fd)
{
	struct pu_sqe *sqe;

	q->watched = false;
	if (q->ring.fd < 0) {
		q->watch_fd = fd;
		return 0;
	}
	if (q->watching)
		return 0;
	sqe = pu_queue_sqe(q);
	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_POLL_ADD;
	sqe->fd = fd;
	sqe->op_flags = POLLIN;
	sqe->user_data = WATCH;
	q->watching = true;
	return 0;
}

static int wait_kernel(struct pu_queue *q, int64_t timeout_ns)
{
	eventfd_t events;
	int done;

	/* Before the enter: what comes after it is told anew. */
	if (q->event_fd >= 0)
		eventfd_read(q->event_fd, &events);
	if (q->batch) {
		done = pu_batch_submit(q);
		if (done < 0 && done != -EAGAIN)
			return done;
	}
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

static int wait_loopback_ring(struct pu_queue *q, int64_t timeout_ns)
{
	q->nr_ready = q->nr_injected;
	q->nr_injected = 0;
	return wait_kernel(q, q->nr_ready ? 0 : timeout_ns);
}

static int wait_somewhere(struct pu_queue *q, int64_t timeout_ns)
{
	if (!q->loopback)
		return wait_kernel(q, timeout_ns);
	return q->ring.fd < 0 ? wait_loopback(q, timeout_ns) : wait_loopback_ring(q, timeout_ns);
}

/* By the ring, once in a while: a time-out of every wait was dearer than the rest of a round. Needs
 * a ring that brings nothing, no write's data either, but in a wait. */
static void set_idle_timer(struct pu_queue *q)
{
	bool wanted = q->idle_time[0] || q->idle_time[1];
	struct pu_sqe *sqe = NULL;

	if (wanted && q->ring.fd >= 0 && q->ring.setup_flags & PU_SETUP_DEFER_TASKRUN)
		sqe = pu_queue_sqe(q);
	if (!sqe)
		return;
	sqe->opcode = PU_OPCODE_TIMEOUT;
	sqe->fd = -1;
	sqe->addr = (uint64_t)(uintptr_t)q->idle_time;
	sqe->len = 1;
	sqe->user_data = IDLE;
	q->timing = true;
	q->used = false;
}

/* The memory of requests goes back to the kernel until the next one, unless it is in use: by a
 * request, or by an answer that is still to be sent. */
static void trim(struct pu_queue *q)
{
	bool sent = !pu_ring_unsubmitted(&q->ring) && (!q->batch || pu_batch_sent(q->batch));

	q->elapsed = false;
	if (q->used || pu_queue_held(q) || q->foreign_inflight || !sent)
		set_idle_timer(q);
	else
		pu_buffers_trim(q->buffers);
}

/* One that was failed from outside meanwhile is not left, and none twice: the tag may have brought
 * its next request already. */
void pu_queue_carry_over(struct pu_queue *q, uint32_t served)
{
	q->nr_carried_over = 0;
	for (uint32_t i = served; i < q->nr_ready; i++) {
		struct pu_tag *tag = &q->tags[q->ready[i]];

		if (pu_tag_state(tag) == PU_TAG_OWNED && !tag->carried_over) {
			tag->carried_over = true;
			q->ready[q->nr_carried_over++] = q->ready[i];
		}
	}
	for (uint32_t i = 0; i < q->nr_carried_over; i++)
		q->tags[q->ready[i]].carried_over = false;
	if (q->loopback) {
		q->nr_injected = q->nr_carried_over;
		q->nr_carried_over = 0;
	}
}

int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns)
{
	uint32_t left = q->nr_carried_over;
	int error = read_inbox(q);

	q->nr_ready = left;
	q->nr_carried_over = 0;
	if (left)
		timeout_ns = 0;
	if (!error && drained(q))
		return end_of(q);
	if (!error)
		error = wait_somewhere(q, timeout_ns);
	if (!error)
		error = read_inbox(q);
	if (error)
		return error;
	if (q->nr_ready)
		q->used = true;
	if (q->elapsed)
		trim(q);
	else if (q->used && !q->timing)
		set_idle_timer(q);
	if (q->nr_ready - left > q->counters.largest_batch)
		count(&q->counters.largest_batch, q->nr_ready - left - q->counters.largest_batch);
	/* Said at once: nothing will ever wake a caller that waits for the descriptor instead. */
	if (drained(q))
		return end_of(q);
	return (int)q->nr_ready;
}

void *pu_queue_shared(const struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];

	if (!q->client_memory)
		return NULL;
	return pu_shared_find(q->client_memory, desc->addr,
			      (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
}

static int copy_in_memory(const struct pu_queue *q, uint16_t tag, bool out, uint8_t *bytes,
			  uint64_t at, uint64_t length)
{
	bool shared = q->desc[tag].op_flags & PU_FLAG_SHMEM_ZC;
	uint8_t *buffer = shared ? pu_queue_shared(q, tag) : pu_queue_buffer(q, tag);

	if (!buffer)
		return -EIO;
	buffer += at;
	memcpy(out ? buffer : bytes, out ? bytes : buffer, length);
	return 0;
}

static int copy_by_device(const struct pu_queue *q, uint64_t place, bool out, uint8_t *bytes,
			  uint64_t length)
{
	while (length) {
		ssize_t done = out ? pwrite(q->cdev, bytes, length, (off_t)place) :
				     pread(q->cdev, bytes, length, (off_t)place);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		bytes += done;
		place += (uint64_t)done;
		length -= (uint64_t)done;
	}
	return 0;
}

int pu_queue_copy(struct pu_queue *q, uint16_t tag, uint32_t generation, void *memory, uint64_t at,
		  uint64_t length, uint64_t where)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	bool out = op == PU_OP_READ || op == PU_OP_REPORT_ZONES;
	int error;

	/* Else the bytes might be those of the tag's next request. */
	if (!pin(q, tag, generation))
		return -ESTALE;
	if (q->user_copy && (where || !(desc->op_flags & PU_FLAG_SHMEM_ZC)))
		error = copy_by_device(q, pu_user_copy_offset(q->id, tag, at) | where, out, memory,
				       length);
	else
		error = where ? -EOPNOTSUPP : copy_in_memory(q, tag, out, memory, at, length);
	unpin(q, tag, generation);
	return error;
}

int pu_queue_fill_buffer(struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags & 0xff;
	int error;

	if (!q->user_copy || q->tags[tag].fetched || (op != PU_OP_WRITE && op != PU_OP_ZONE_APPEND))
		return 0;
	error = pu_queue_copy(q, tag, generation, pu_queue_buffer(q, tag), 0,
			      (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT, 0);
	q->tags[tag].fetched = !error;
	return error;
}

int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context, bool blind)
{
	struct pu_native native = { handler, context, q->user_copy && !blind };
	int there;

	q->native = &native;
	do
		there = pu_queue_wait(q, PU_FOREVER);
	while (there >= 0 && !q->loopback);
	/* Injected before somebody was there to serve. */
	for (uint32_t i = 0; q->loopback && i < q->nr_ready; i++) {
		const struct pu_desc *desc = &q->desc[q->ready[i]];

		handle(q, q->ready[i], desc->op_flags,
		       (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
	}
	q->native = NULL;
	return there >= 0 || there == -ENODEV ? 0 : there;
}

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot)
{
	const uint64_t *from = (const uint64_t *)&q->counters;
	uint64_t *to = (uint64_t *)snapshot;

	for (size_t i = 0; i < sizeof(*snapshot) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
