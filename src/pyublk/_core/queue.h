/* SPDX-License-Identifier: MIT
 * One ublk queue: the descriptor map, a buffer per tag, and each tag's way round
 *
 *     IDLE --fetch--> FETCHING --request--> OWNED --answer--> ANSWERED
 *                                             ^                   |
 *                                             +-----request-------+ (a commit is the next fetch)
 *     FETCHING, ANSWERED --abort (-ENODEV)--> GONE
 *
 * A kernel's queue may be served by several of these, each on a thread of its own. The thread that
 * opened one owns it: the kernel takes commits from the thread that fetched. Other threads may only
 * answer (pu_queue_post), copy a request's data, read counters, and sever.
 *
 * How data travels follows from the device's flags: none, the kernel copies from and to the tag's
 * buffer; PU_F_NEED_GET_DATA, the same with a round more for writes; PU_F_USER_COPY, we copy what we
 * want (pu_queue_copy); PU_F_ZERO_COPY and PU_F_AUTO_BUF_REG, the ring's own I/O moves it, from and
 * to the buffer that is registered under the tag's number. With PU_F_BATCH_IO, commands carry many
 * tags (batch.h).
 *
 * In loopback mode there is no kernel: requests are injected by a test, answers are kept for it.
 */
#ifndef PU_QUEUE_H
#define PU_QUEUE_H

#include <pthread.h>
#include <time.h>

#include "batch.h"
#include "buffers.h"
#include "ring.h"
#include "shared.h"
#include "ublk.h"

typedef int64_t (*pu_handler)(void *context, uint32_t op, uint32_t flags, uint64_t offset,
			      uint64_t length, void *buffer);

enum pu_tag_state {
	PU_TAG_IDLE,
	PU_TAG_FETCHING,
	PU_TAG_OWNED,
	PU_TAG_ANSWERED,
	PU_TAG_GONE,
};

struct pu_tag {
	/* Its generation, which counts requests, above its pins and its state. In one, so that an
	 * answer that comes late cannot be given to the tag's next request, and none is given while
	 * somebody copies the request's data. */
	uint64_t life;
	bool fetched; /* user copy: a write's data is in the buffer already */
	bool carried_over; /* within pu_queue_carry_over: seen */
	int32_t result; /* loopback: the last answer */
	uint8_t *buffer; /* of its request, whatever the next one is offered */
	uint64_t zone_lba; /* zone append: where it was written, in 512-byte sectors */
};

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

struct pu_queue_options {
	uint16_t id, depth;
	uint16_t first_tag, tag_step; /* the tags of this one: first, first + step, ... */
	uint64_t flags;		      /* the device's PU_F_* */
	size_t buffer_bytes;
	struct pu_buffers *buffers; /* NULL: its own; else they stay the caller's */
	bool own_device; /* the queue closes the number of the char device, when it is freed */
	uint32_t extra_entries; /* of the ring, for others' I/O */
	const int *files;	/* for it: registered behind the char device, which has index 0 */
	uint32_t nr_files;
	int64_t trim_after_ns;	/* idle for so long, buffers are given back; 0: never */
	uint32_t faults;	/* enum pu_fault */
	const struct pu_shared *client_memory; /* with clients; NULL: no memory */
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
	uint32_t nr_injected; /* loopback: of these, not yet waited for */
	uint32_t in_kernel; /* commands that the kernel holds */
	uint32_t owned;	    /* requests that this took and did not answer itself */
	uint32_t posted;    /* of these, answered by other threads straight to the kernel */
	uint32_t foreign_inflight; /* other I/O under way on the ring */
	uint32_t orphans;   /* of that, what nobody waits for */
	struct pu_buffers *buffers;
	bool own_buffers;
	size_t desc_bytes;
	int cdev; /* the number is taken as long as the queue is there */
	bool own_cdev;
	bool copying; /* when it was closed, somebody was at a request's data, by that number */
	int process; /* whose it is */
	uint16_t id, depth, first_tag, tag_step;
	bool loopback;
	bool copies;	  /* the kernel copies */
	bool user_copy;	  /* pu_queue_copy reads and writes the char device */
	bool auto_buffer; /* the kernel registers each request's buffer */
	bool zero_copy;	  /* buffers may be registered by hand */
	bool zoned;
	bool aborted; /* the kernel has begun to take the tags away */
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
	int wake_fd; /* written by other threads, read by the ring */
	uint64_t wake_value;
	int event_fd; /* -1 until somebody asks for it */
	int watch_fd; /* loopback without a ring: the descriptor that is watched, or -1 */
	bool watching; /* the ring polls a descriptor */
	bool watched;  /* it became readable */
	struct pu_ring post_ring; /* batch: other threads commit here; fd -1 until one does */

	struct pu_batch *batch; /* NULL: a command for each tag */
	const struct pu_shared *client_memory; /* NULL: no memory is shared with clients */
	const struct pu_native *native; /* NULL: requests are gathered in `ready` */
	pu_completer complete;
	void *completer;

	struct pu_counters counters;
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
};
#define PU_USER_DATA(kind, number) ((uint64_t)(kind) << PU_KIND_SHIFT | (uint64_t)(number))

/* Memory that the calling thread allocates must not wait for dirty pages that only it can write:
 * for each that serves requests. Needs CAP_SYS_RESOURCE; without it a disk works, but not below heavy
 * memory pressure. pu_queue_open does it, too. */
void pu_io_flusher(void);

/* Opens a queue of the char device: maps descriptors, makes ring and buffers. To be called by the
 * thread that will serve it. cdev < 0: loopback. 0 or -errno; nothing is left on failure. */
int pu_queue_open(struct pu_queue *q, int cdev, const struct pu_queue_options *options);
/* Gives everything back but tags, buffers, and the number of the char device, which others may still
 * come to look at; others' I/O is cancelled, and waited for (PU_END_NS). False: the kernel still has some of it, so the
 * queue, its completer, and all memory of both must stay where they are for ever. In a forked child
 * it lets go of the child's copies of descriptors, and nothing else. */
bool pu_queue_close(struct pu_queue *q);
void pu_queue_free(struct pu_queue *q);

/* Takes ring, descriptors and char device away from a stuck owner. The number of the char device
 * stays taken: who comes late to copy meets no other file. [any thread] */
int pu_queue_sever(struct pu_queue *q);

/* Fetches every tag: the queue is primed when this returns 0. */
int pu_queue_fetch(struct pu_queue *q);

/* Submits all commits, then waits for requests, at most timeout_ns (0: do not wait).
 * Returns how many it brought; 0 after a time-out, a signal, a wake, or others' completions;
 * -ENODEV when the kernel has taken every tag back (the normal end); -ESHUTDOWN when severed; other
 * -errno. */
int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns);

/* Leaves what the last wait brought, from ready[served] on, to the next one: it brings that first,
 * and waits for nothing. So the answers that there are go out before. */
void pu_queue_carry_over(struct pu_queue *q, uint32_t served);

/* A descriptor that becomes readable when there is something to wait for, or -errno. Not the ring's
 * own: a ring that defers its work does not wake those who poll it. Owner thread only. */
int pu_queue_event_fd(struct pu_queue *q);

/* Lets the next waits return, with q->watched set, when `fd` is readable too; to be said again
 * before every wait, always of the same one, which stays open as long as the queue. 0 or -errno. */
int pu_queue_watch(struct pu_queue *q, int fd);

/* Answers a request. result < 0: -errno; else success. Owner thread only.
 * 0, or -EALREADY when the tag holds no unanswered request. */
int pu_queue_answer(struct pu_queue *q, uint16_t tag, int64_t result);
/* The same from any thread, for the request of that generation. With batch I/O the kernel takes it
 * at once where it can; else the owner is woken and commits. */
int pu_queue_post(struct pu_queue *q, uint16_t tag, uint32_t generation, int64_t result);
/* Answers a request whose memory somebody still sees, and may go on to fill: the tag's next request
 * gets other memory. *kept is what it had, to be given to pu_buffers_unmap when nobody sees it any
 * more. `here`: the caller is the owner thread. 0; -EALREADY, with *kept NULL, as above; -ENOMEM:
 * the request is not answered. */
int pu_queue_answer_kept(struct pu_queue *q, uint16_t tag, uint32_t generation, int64_t result,
			 bool here, uint8_t **kept);
/* Fails every request not yet answered (a handler that never returns), and takes the memory that it
 * had from use: handlers, and files' I/O under way, may come back to it. [any thread] */
void pu_queue_fail_held(struct pu_queue *q, int error);
/* Makes a wait return. [any thread] */
void pu_queue_wake(struct pu_queue *q);

/* Copies `length` bytes at byte `at` of a request's data: a write's into `memory`, a read's out of
 * it. `where`: 0, or PU_USER_COPY_INTEGRITY for its metadata. 0 or -errno; -ESTALE when the request
 * of that generation is answered already. [any thread] */
int pu_queue_copy(struct pu_queue *q, uint16_t tag, uint32_t generation, void *memory, uint64_t at,
		  uint64_t length, uint64_t where);
/* The bytes of a request in memory shared with the client (PU_FLAG_SHMEM_ZC), or NULL.
 * [any thread] */
void *pu_queue_shared(const struct pu_queue *q, uint16_t tag);
/* User copy: brings a write's data into the tag's buffer, once. 0 or -errno, as above. */
int pu_queue_fill_buffer(struct pu_queue *q, uint16_t tag, uint32_t generation);

/* How a native handler is served: `blind` when it never looks at the buffer. Serves until the
 * kernel takes the tags back: 0, or -errno as pu_queue_wait. */
int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context, bool blind);

/* For others' I/O on the ring: an entry, zeroed, or NULL; its user_data must be of PU_KIND_OTHER.
 * They count it in q->foreign_inflight, and out again when q->complete tells. */
struct pu_sqe *pu_queue_sqe(struct pu_queue *q);

/* Loopback: makes a request appear; `tag` must be FETCHING. */
int pu_queue_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		    uint32_t nr_sectors);

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot);

/* Nanoseconds, as of the last tick of the kernel's clock: a cheap look at the time. */
static inline int64_t pu_queue_tick(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
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

#define PU_PIN UINT64_C(0x100) /* somebody copies the request's data: it is not answered meanwhile */
#define PU_PINS UINT64_C(0xffffff00)

static inline uint64_t pu_life(enum pu_tag_state state, uint32_t generation)
{
	return (uint64_t)generation << 32 | (uint32_t)state;
}

static inline enum pu_tag_state pu_tag_state(const struct pu_tag *tag)
{
	return (enum pu_tag_state)(uint8_t)__atomic_load_n(&tag->life, __ATOMIC_ACQUIRE);
}

static inline uint32_t pu_tag_generation(const struct pu_tag *tag)
{
	return (uint32_t)(__atomic_load_n(&tag->life, __ATOMIC_RELAXED) >> 32);
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
	uint64_t life = __atomic_load_n(&q->tags[tag].life, __ATOMIC_ACQUIRE);

	return (life & ~PU_PINS) == pu_life(PU_TAG_OWNED, generation);
}

static inline uint32_t pu_queue_held(const struct pu_queue *q)
{
	return q->owned - __atomic_load_n(&q->posted, __ATOMIC_ACQUIRE);
}

/* The request that a commit in the batch refers to was not taken by the kernel. */
void pu_queue_lose(struct pu_queue *q, uint16_t tag, int32_t result);
/* The requests of a FETCH_IO_CMDS completion. */
void pu_queue_take(struct pu_queue *q, const uint16_t *tags, uint32_t how_many);

#endif
