/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "open.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "batch.h"
#include "forked.h"
#include "loopback.h"
#include "tapping.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

static size_t page_round(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (bytes + page - 1) / page * page;
}

/* What takes the place of files that are given up; open as long as queues are, since then it may be too
 * late for one more descriptor. Guarded by pu_fork_hold. */
static int inert = -1;
static uint32_t inert_users;

static int get_inert(struct pu_queue *q)
{
	int error = 0;

	pu_fork_hold();
	if (!inert_users)
		inert = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (inert < 0)
		error = -errno;
	else
		inert_users++;
	q->inert = inert;
	pu_fork_release();
	return error;
}

static void put_inert(struct pu_queue *q)
{
	if (q->inert < 0)
		return;
	q->inert = -1;
	pu_fork_hold();
	if (!--inert_users)
		close(inert);
	pu_fork_release();
}

static uint32_t at_least(uint32_t wanted)
{
	uint32_t entries = 8;

	while (entries < wanted && entries < PU_RING_MAX_ENTRIES)
		entries *= 2;
	return entries;
}

/* A batch is one entry, whatever the depth; beside it there are fetches, the wake and the timer. All of
 * others' I/O may end at once, but half the depth is enough to submit it: a queue of entries that is
 * full is submitted, and goes on. An idle ring's memory is mostly these entries. */
static int open_ring(struct pu_queue *q, const struct pu_queue_options *options)
{
	bool batch = !q->loopback && options->flags & PU_F_BATCH_IO;
	uint32_t own = batch ? 12u : q->depth + 4u;
	uint32_t entries = at_least(own + (options->extra_entries ? q->depth / 2u : 0u));
	uint32_t completions = at_least(own + options->extra_entries);
	int error;

	if (completions < entries * 2)
		completions = entries * 2;
	error = pu_ring_open(&q->ring, entries, completions, PU_SETUP_CLAMP, PU_SETUP_OF_A_THREAD);
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
		return error ? error : pu_wake_open(&q->wake, NULL);
	error = open_ring(q, options);
	if (!error)
		error = pu_wake_open(&q->wake, &q->ring);
	return error ? error : register_files(q, options->files, options->nr_files);
}

void pu_io_flusher(void)
{
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
}

int pu_queue_open(struct pu_queue *q, int cdev, const struct pu_queue_options *options)
{
	uint64_t flags = options->flags;
	int error = 0;

	if (cdev >= 0)
		pu_io_flusher();
	memset(q, 0, sizeof(*q));
	q->ring.fd = -1;
	q->post_ring.fd = -1;
	q->wake = (struct pu_wake){ .fd = -1, .closed = true };
	q->event_fd = -1;
	q->inert = -1;
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
	q->copies = !(flags & (PU_F_USER_COPY | PU_F_ZERO_COPY | PU_F_AUTO_BUF_REG));
	q->user_copy = cdev >= 0 && flags & PU_F_USER_COPY;
	q->zero_copy = flags & PU_F_ZERO_COPY;
	q->auto_buffer = flags & PU_F_AUTO_BUF_REG;
	q->zoned = flags & PU_F_ZONED;
	q->ending = cdev >= 0;
	pthread_mutex_init(&q->inbox_lock, NULL);
	q->tags = calloc(q->depth, sizeof(*q->tags));
	q->ready = calloc(2u * q->depth, sizeof(*q->ready)); /* left ones, and as many that came */
	q->inbox = calloc(q->depth, sizeof(*q->inbox));
	if (!q->tags || !q->ready || !q->inbox)
		error = -ENOMEM;
	else
		error = get_inert(q);
	if (!error)
		error = pu_taps_open(q);
	if (!error && cdev < 0)
		error = pu_loopback_open(q);
	if (!error)
		error = open_parts(q, options);
	if (!error && cdev >= 0 && flags & PU_F_BATCH_IO)
		error = pu_batch_open(q);
	if (!error && options->rules)
		error = pu_gate_open(q, options->rules);
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
	if (mmap(q->desc, q->desc_bytes, PROT_READ, flags, -1, 0) == MAP_FAILED)
		return -errno;
	return q->gate ? pu_gate_leave_device(q) : 0;
}

/* No request is anybody's any more: what still ends meets a generation that it does not know, and
 * nobody may begin to copy a request's data. */
static void take_tags_away(struct pu_queue *q)
{
	for (uint32_t tag = 0; q->tags && tag < q->depth; tag++)
		if (pu_tag_take_away(&q->tags[tag]))
			q->copying = true;
}

static void leave_number(struct pu_queue *q)
{
	if (!q->own_cdev)
		return;
	if (q->copying && !pu_replace_file(q->cdev, q->inert))
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
		pu_gate_close(q);
		leave_device(q);
		pthread_mutex_lock(&q->inbox_lock); /* in a child whoever had it is not there */
	}
	leave_number(q);
	pu_ring_close(&q->post_ring);
	pu_batch_close(q); /* after the rings: they may read it */
	pu_wake_close(&q->wake);
	close_fd(&q->event_fd);
	if (!parents)
		pthread_mutex_unlock(&q->inbox_lock);
	put_inert(q);
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
	put_inert(q);
	pu_loopback_free(q);
	pu_taps_close(q);
	pu_gate_free(q);
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
	int error;

	__atomic_store_n(&q->severed, true, __ATOMIC_RELEASE);
	error = leave_device(q);
	pthread_mutex_lock(&q->inbox_lock);
	if (!error && !q->wake.closed && q->ring.fd >= 0)
		error = pu_ring_sever(&q->ring, q->inert);
	if (!error && !q->wake.closed && q->cdev >= 0)
		error = pu_replace_file(q->cdev, q->inert);
	/* An owner that waits in the old ring keeps it. */
	pu_wake_call(&q->wake);
	if (q->event_fd >= 0)
		eventfd_write(q->event_fd, 1);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}
