/* SPDX-License-Identifier: MIT
 * One ublk queue: its tags (tag.h), a descriptor and a buffer for each, and the ring that waits for
 * their requests
 *
 * A kernel's queue may be served by several of these, each on a thread of its own. The thread that
 * opened one owns it: the kernel takes commits from the thread that fetched. Other threads may only
 * answer (answer.h), copy a request's data (copy.h), read counters, and sever.
 *
 * How data travels follows from the device's flags: none, the kernel copies from and to the tag's
 * buffer; PU_F_NEED_GET_DATA, the same with a round more for writes; PU_F_USER_COPY, we copy what we
 * want (pu_queue_copy); PU_F_ZERO_COPY and PU_F_AUTO_BUF_REG, the ring's own I/O moves it, from and
 * to the buffer that is registered under the tag's number. With PU_F_BATCH_IO, commands carry many
 * tags (batch.h). A queue without a kernel is one for tests (loopback.h).
 */
#ifndef PU_QUEUE_H
#define PU_QUEUE_H

#include <errno.h>
#include <pthread.h>

#include "buffers.h"
#include "clock.h"
#include "gate.h"
#include "ring.h"
#include "shared.h"
#include "tag.h"
#include "taps.h"
#include "ublk.h"
#include "wake.h"

/* What each request runs through counts by the instruction: a call costs ten of some two thousand.
 * The commonest way is one piece of code, and the rarer ones are kept out of it. */
#define PU_ALWAYS_INLINE static inline __attribute__((always_inline))
#define PU_NEVER_INLINE static __attribute__((noinline))

struct pu_batch;
struct pu_loopback;

typedef int64_t (*pu_handler)(void *context, uint32_t op, uint32_t flags, uint64_t offset,
			      uint64_t length, void *buffer);

struct pu_counters {
	uint64_t requests[PU_OP_COUNT];
	uint64_t bytes[PU_OP_COUNT];
	uint64_t errors;
	uint64_t enters;
	uint64_t largest_batch;
	uint64_t fallbacks; /* requests that left their path because the path failed */
};

struct pu_message {
	uint16_t tag;
	int32_t result;
};

enum pu_fault { /* failures of a path, made on purpose: tests want to see them survived */
	PU_FAULT_AUTO_BUFFER = 1u << 0, /* every other request's buffer is not registered */
	PU_FAULT_REGISTER = 1u << 1,	/* registering by hand fails too */
	PU_FAULT_FEW_BUFFERS = 1u << 2, /* batch: the buffer ring is empty after every request */
	PU_FAULT_COMMIT = 1u << 3,	/* batch: a commit in the middle of each batch is refused */
};

/* A native target: served on the spot, as its requests arrive. */
struct pu_native {
	pu_handler handler;
	void *context;
	bool copy; /* user copy, and the handler looks at the buffer */
};

/* What the owner of other I/O on the ring is told: user_data and result of a completion. */
typedef void (*pu_completer)(void *context, uint64_t user_data, int32_t result);

struct pu_queue {
	struct pu_ring ring;
	struct pu_desc *desc;
	struct pu_tag *tags;
	uint16_t *ready; /* tags that the last wait brought, unless they were served natively */
	uint32_t nr_ready; /* how many it brought */
	uint32_t nr_carried_over; /* of these, left for the next wait to bring again */
	uint32_t in_kernel; /* commands that the kernel holds */
	uint32_t owned;	    /* requests that this took and did not answer itself */
	uint32_t posted;    /* of these, answered by other threads straight to the kernel */
	uint32_t foreign_inflight; /* other I/O under way on the ring */
	uint32_t orphans;   /* of that, what nobody waits for */
	uint32_t standing;  /* and what uses no request's memory */
	struct pu_buffers *buffers;
	bool own_buffers;
	size_t desc_bytes;
	int cdev; /* the number is taken as long as the queue is there */
	bool own_cdev;
	bool copying; /* when it was closed, somebody was at a request's data, by that number */
	int process; /* whose it is */
	uint16_t id, depth, first_tag, tag_step;
	bool copies;	  /* the kernel copies */
	bool user_copy;	  /* pu_queue_copy reads and writes the char device */
	bool auto_buffer; /* the kernel registers each request's buffer */
	bool zero_copy;	  /* buffers may be registered by hand */
	bool zoned;
	bool ending; /* the kernel has no tags yet, or has begun to give them back */
	bool severed;
	int64_t idle_time[2]; /* after it buffers are given back: a __kernel_timespec; 0: never */
	bool used;    /* since the idle timer was set */
	bool timing;  /* the ring runs the idle timer */
	bool elapsed; /* it has ended */
	uint32_t faults;
	int error; /* the first refusal that is not an abort */

	pthread_mutex_t inbox_lock; /* guards inbox, nr_inbox and post_ring */
	struct pu_message *inbox;
	uint32_t nr_inbox;
	struct pu_wake wake; /* called by other threads */
	int event_fd; /* -1 until somebody asks for it */
	int inert; /* takes the place of files that are given up */
	bool watching; /* the ring polls a descriptor */
	bool watched;  /* it became readable */
	struct pu_ring post_ring; /* batch: other threads commit here; fd -1 until one does */

	struct pu_batch *batch; /* NULL: a command for each tag */
	struct pu_loopback *loopback; /* NULL: there is a kernel */
	const struct pu_shared *client_memory; /* NULL: no memory is shared with clients */
	const struct pu_native *native; /* NULL: requests are gathered in `ready` */
	pu_completer complete;
	void *completer;

	struct pu_gate *gate; /* NULL: none, ever */
	struct pu_counters counters;
	struct pu_taps taps;
};

/* user_data: what a completion is about is in the top byte, its number below. */
#define PU_KIND_SHIFT 56
enum pu_kind {
	PU_KIND_TAG = 0,     /* a command of that tag */
	PU_KIND_PREPARE = 1, /* batch */
	PU_KIND_FETCH = 2,
	PU_KIND_COMMIT = 3,
	PU_KIND_OTHER = 4, /* and all up to WAKE: for the completer */
	PU_KIND_WAKE = 0x80,
	PU_KIND_WATCH = 0x81,
	PU_KIND_IDLE = 0x82,
	PU_KIND_GATE = 0x83,
	PU_KIND_NOTHING = 0x84, /* is to be done */
};
#define PU_USER_DATA(kind, number) ((uint64_t)(kind) << PU_KIND_SHIFT | (uint64_t)(number))

/* Fetches every tag: the queue is primed when this returns 0. */
int pu_queue_fetch(struct pu_queue *q);

/* Submits all commits, then waits for requests, at most timeout_ns (0: do not wait).
 * Returns how many it brought; 0 after a time-out, a signal, a wake, or others' completions;
 * -ENODEV when the kernel brings no more requests, and every one is answered (the normal end);
 * -ESHUTDOWN when severed; other -errno. */
int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns);

/* Leaves what the last wait brought, from ready[served] on, to the next one: it brings that first,
 * and waits for nothing. So the answers that there are go out before. */
void pu_queue_carry_over(struct pu_queue *q, uint32_t served);

/* Submits all commits, for who will not wait next. 0 or -errno. */
int pu_queue_submit(struct pu_queue *q);

/* A descriptor that becomes readable when there is something to wait for, or -errno. Not the ring's
 * own: a ring that defers its work does not wake those who poll it. Owner thread only. */
int pu_queue_event_fd(struct pu_queue *q);

/* Lets the next waits return, with q->watched set, when `fd` is readable too; to be said again
 * before every wait, always of the same one, which stays open as long as the queue. 0 or -errno. */
int pu_queue_watch(struct pu_queue *q, int fd);

/* Whether a wait has something to do at once, but for what the kernel has. */
bool pu_queue_pending(const struct pu_queue *q);

/* How a native handler is served: `blind` when it never looks at the buffer. Serves until the
 * kernel takes the tags back: 0, or -errno as pu_queue_wait. */
int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context, bool blind);

#define PU_TURN_ROUNDS 4 /* before others have their turn */
/* Serves what there is, without waiting. 0: there may be more; else as pu_queue_wait. */
int pu_queue_turn(struct pu_queue *q, pu_handler handler, void *context, bool blind);

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot);

/* Written by the owner, read by anyone: whole values, no order wanted. */
static inline void pu_count(uint64_t *counter, uint64_t add)
{
	__atomic_store_n(counter, *counter + add, __ATOMIC_RELAXED);
}

/* Of the tag's request. */
static inline uint8_t *pu_queue_buffer(const struct pu_queue *q, uint16_t tag)
{
	return q->tags[tag].buffer;
}

/* Of the tag's next request: what a commit names. */
static inline uint8_t *pu_queue_next_buffer(const struct pu_queue *q, uint16_t tag)
{
	return q->buffers->of_tag[tag];
}

/* The place in the buffer table where the kernel is to put the tag's next request. */
static inline uint16_t pu_queue_buffer_index(const struct pu_queue *q, uint16_t tag)
{
	if (q->faults & PU_FAULT_AUTO_BUFFER && tag < q->depth &&
	    pu_tag_generation(&q->tags[tag]) & 1)
		return UINT16_MAX;
	return tag;
}

/* Whether somebody waits for others' I/O. */
static inline bool pu_queue_awaits(const struct pu_queue *q)
{
	return q->foreign_inflight != q->orphans;
}

static inline bool pu_queue_holds(const struct pu_queue *q, uint16_t tag, uint32_t generation)
{
	return pu_tag_holds(&q->tags[tag], generation);
}

/* Requests that were taken, and not answered. */
static inline uint32_t pu_queue_held(const struct pu_queue *q)
{
	return q->owned - __atomic_load_n(&q->posted, __ATOMIC_SEQ_CST);
}

/* Whoever posts an answer counts it, and then looks at `ending`; the owner sets that, and then looks
 * at the count before it waits. In one order for both, or neither would see the other. */
static inline void pu_queue_set_ending(struct pu_queue *q, bool ending)
{
	__atomic_store_n(&q->ending, ending, __ATOMIC_SEQ_CST);
}

/* The kernel has taken a tag away, or did not take its answer. */
static inline void pu_queue_lose(struct pu_queue *q, uint16_t tag, int32_t result)
{
	pu_tag_set_state(&q->tags[tag], PU_TAG_GONE);
	if (!q->ending)
		pu_queue_set_ending(q, true);
	if (result != -ENODEV && result != -ECANCELED && !q->error)
		q->error = result;
}

#endif
