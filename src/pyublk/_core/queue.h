/* SPDX-License-Identifier: MIT
 * One ublk queue: the descriptor map, a buffer per tag, and each tag's way round
 *
 *     IDLE --fetch--> FETCHING --request--> OWNED --answer--> ANSWERED --commit--> COMMITTING
 *                        ^                                                             |
 *                        +---------------- (the commit is the next fetch) -------------+
 *     FETCHING, COMMITTING --abort (-ENODEV)--> GONE
 *
 * The thread that opened a queue owns it: the kernel takes commits from the thread that fetched.
 * Other threads may only answer (pu_queue_post), read counters, and sever.
 *
 * In loopback mode there is no kernel: requests are injected by a test, answers are kept for it.
 */
#ifndef PU_QUEUE_H
#define PU_QUEUE_H

#include <pthread.h>

#include "ring.h"
#include "ublk.h"

typedef int64_t (*pu_handler)(void *context, uint32_t op, uint32_t flags, uint64_t offset,
			      uint64_t length, void *buffer);

enum pu_tag_state {
	PU_TAG_IDLE,
	PU_TAG_FETCHING,
	PU_TAG_OWNED,
	PU_TAG_ANSWERED,
	PU_TAG_COMMITTING,
	PU_TAG_GONE,
};

struct pu_tag {
	uint32_t generation; /* counts requests: tells a stale reference from a live one */
	uint8_t state;
	int32_t result; /* loopback: the last answer */
};

struct pu_counters {
	uint64_t requests[PU_OP_COUNT];
	uint64_t bytes[PU_OP_COUNT];
	uint64_t errors;
	uint64_t enters;
	uint64_t largest_batch;
};

struct pu_message {
	uint16_t tag;
	int32_t result;
};

struct pu_queue {
	struct pu_ring ring;
	struct pu_desc *desc;
	struct pu_tag *tags;
	uint16_t *ready; /* tags that the last wait brought, nr_ready of them */
	uint32_t nr_ready;
	uint32_t nr_injected; /* loopback: of these, not yet waited for */
	uint32_t in_kernel; /* commands that the kernel holds */
	uint32_t owned;	    /* requests that we hold */
	uint8_t *buffers;
	size_t buffer_bytes; /* from one tag's buffer to the next */
	size_t desc_bytes;
	int cdev;
	uint16_t id, depth;
	bool loopback;
	bool aborted; /* the kernel has begun to take the tags away */
	bool severed;
	int error; /* the first refusal that is not an abort */

	pthread_mutex_t inbox_lock; /* guards inbox and nr_inbox */
	struct pu_message *inbox;
	uint32_t nr_inbox;
	int wake_fd; /* written by other threads, read by the ring */
	uint64_t wake_value;
	int event_fd; /* -1 until somebody asks for it */

	struct pu_counters counters;
};

/* Opens queue `id` of the char device: maps descriptors, makes ring and buffers. To be called by
 * the thread that will serve it. cdev < 0: loopback. 0 or -errno; nothing is left on failure. */
int pu_queue_open(struct pu_queue *q, int cdev, uint16_t id, uint16_t depth, size_t buffer_bytes);
/* Gives everything back but tags and buffers, which late readers may still look at. */
void pu_queue_close(struct pu_queue *q);
void pu_queue_free(struct pu_queue *q);

/* Takes ring, descriptors and char device away from a stuck owner. [any thread] */
int pu_queue_sever(struct pu_queue *q);

/* Fetches every tag: the queue is primed when this returns 0. */
int pu_queue_fetch(struct pu_queue *q);

/* Submits all commits, then waits for requests, at most timeout_ns (0: do not wait).
 * Returns how many are in q->ready; 0 after a time-out, a signal or a wake; -ENODEV when the kernel
 * has taken every tag back (the normal end); -ESHUTDOWN when severed; other -errno. */
int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns);

/* A descriptor that becomes readable when there is something to wait for, or -errno. Not the ring's
 * own: a ring that defers its work does not wake those who poll it. Owner thread only. */
int pu_queue_event_fd(struct pu_queue *q);

/* Answers a request. result < 0: -errno; else success. Owner thread only.
 * 0, or -EALREADY when the tag holds no unanswered request. */
int pu_queue_answer(struct pu_queue *q, uint16_t tag, int64_t result);
/* The same from any thread: the owner is woken and commits. */
int pu_queue_post(struct pu_queue *q, uint16_t tag, int64_t result);
/* Fails every request not yet answered (a handler that never returns). [any thread] */
void pu_queue_fail_held(struct pu_queue *q, int error);
/* Makes a wait return. [any thread] */
void pu_queue_wake(struct pu_queue *q);

/* Serves until the kernel takes the tags back: 0, or -errno as pu_queue_wait. */
int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context);

/* Loopback: makes a request appear; `tag` must be FETCHING. */
int pu_queue_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		    uint32_t nr_sectors);

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot);

static inline void *pu_queue_buffer(const struct pu_queue *q, uint16_t tag)
{
	return q->buffers + (size_t)tag * q->buffer_bytes;
}

static inline bool pu_queue_holds(const struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	return q->tags[tag].generation == generation &&
	       __atomic_load_n(&q->tags[tag].state, __ATOMIC_ACQUIRE) == PU_TAG_OWNED;
}

#endif
