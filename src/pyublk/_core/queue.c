/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "queue.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "answer.h"
#include "batch.h"
#include "commit.h"
#include "copy.h"
#include "loopback.h"
#include "tapping.h"

#define WAKE PU_USER_DATA(PU_KIND_WAKE, 0)
#define WATCH PU_USER_DATA(PU_KIND_WATCH, 0)
#define IDLE PU_USER_DATA(PU_KIND_IDLE, 0)

#define GIVEN_BACK_WITHIN 5000000 /* ns: tags that the kernel takes from idle commands */

static int fetch_tags(struct pu_queue *q)
{
	int error = 0;

	for (uint32_t tag = q->first_tag; tag < q->depth && !error; tag += q->tag_step) {
		pu_tag_set_state(&q->tags[tag], PU_TAG_FETCHING);
		q->in_kernel++;
		if (!q->loopback && !q->batch)
			error = pu_commit_command(q, PU_IO_FETCH_REQ, (uint16_t)tag, 0);
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
	int error = ring ? pu_wake_arm(&q->wake, &q->ring, WAKE) : 0;

	pu_queue_set_ending(q, false);
	if (!error)
		error = fetch_tags(q);
	while (!error && ring && pu_ring_unsubmitted(&q->ring)) {
		int done = pu_ring_submit(&q->ring, 0, 0, 0);

		if (done < 0 && done != -EINTR)
			error = done;
	}
	return error;
}

PU_NEVER_INLINE int64_t handle_copied(struct pu_queue *q, uint16_t tag, uint64_t length)
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

PU_NEVER_INLINE int64_t handle_shared(struct pu_queue *q, uint16_t tag, uint64_t length)
{
	const struct pu_desc *desc = &q->desc[tag];
	void *bytes = pu_queue_shared(q, tag);

	if (!bytes)
		return -EIO;
	return q->native->handler(q->native->context, desc->op_flags & 0xff,
				  desc->op_flags & ~0xffu, pu_desc_offset(desc), length, bytes);
}

PU_ALWAYS_INLINE void handle(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t length)
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
	if (!pu_tag_claim(t, pu_tag_generation(t))) /* failed from outside while the handler ran */
		return;
	error = pu_commit(q, tag, pu_commit_value(op, length, result));
	if (error && !q->error)
		q->error = error;
}

/* To its target: at once, or with others when the wait returns. */
PU_ALWAYS_INLINE void deliver(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t length)
{
	if (q->native) {
		q->nr_ready++;
		handle(q, tag, op_flags, length);
	} else {
		q->ready[q->nr_ready++] = tag;
	}
}

/* What the gate lets go on, or answers itself. */
PU_NEVER_INLINE void pass(struct pu_queue *q, uint16_t tag, int32_t verdict)
{
	const struct pu_desc *desc = &q->desc[tag];
	int error;

	if (verdict == PU_GATE_KEEP)
		return;
	if (verdict == PU_GATE_SERVE) {
		pu_taps_issue(q, tag);
		deliver(q, tag, desc->op_flags, (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
		return;
	}
	error = pu_queue_answer(q, tag, verdict);
	if (error && error != -EALREADY && !q->error)
		q->error = error;
}

PU_ALWAYS_INLINE void own(struct pu_queue *q, uint16_t tag, uint32_t op, uint64_t length)
{
	struct pu_tag *t = &q->tags[tag];

	pu_count(&q->counters.requests[op], 1);
	pu_count(&q->counters.bytes[op], length);
	t->fetched = false;
	t->zone_lba = 0; /* the kernel refuses a commit that has one for nothing */
	t->buffer = pu_queue_next_buffer(q, tag); /* before anybody can fail it, and offer another */
	t->arrived = q->taps.now;
	t->operation = pu_operations[op];
	pu_tag_own(t);
	q->owned++;
}

/* With a trace, or with rules. */
PU_NEVER_INLINE void take_watched(struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];
	bool gated = pu_taps_gated(q);

	if (gated)
		pu_gate_see(q, tag);
	own(q, tag, desc->op_flags % PU_OP_COUNT, (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT);
	pu_taps_arrive(q, tag);
	pass(q, tag, gated ? pu_gate_arrive(q, tag) : PU_GATE_SERVE);
}

PU_ALWAYS_INLINE void take(struct pu_queue *q, uint16_t tag)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op_flags = desc->op_flags;
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;

	if (__builtin_expect(q->taps.countable < 0, 0)) {
		take_watched(q, tag);
		return;
	}
	own(q, tag, op_flags % PU_OP_COUNT, length);
	deliver(q, tag, op_flags, length);
}

static inline int complete_tag(struct pu_queue *q, uint16_t tag, int32_t result)
{
	if (result == PU_RES_NEED_GET_DATA)
		return pu_commit_command(q, PU_IO_NEED_GET_DATA, tag, 0);
	q->in_kernel--;
	if (result >= 0)
		take(q, tag);
	else
		pu_queue_lose(q, tag, result);
	return 0;
}

static void complete_batch(struct pu_queue *q, const struct pu_cqe *cqe)
{
	uint32_t count;
	const uint16_t *tags = pu_batch_arrivals(q->batch, cqe, &count);

	for (uint32_t i = 0; i < count; i++)
		take(q, tags[i]);
	pu_batch_complete(q, cqe);
}

/* `only_commits`: nothing else has come. */
static int reap(struct pu_queue *q, bool *only_commits)
{
	uint32_t there = pu_ring_ready(&q->ring);
	int error = 0;

	*only_commits = there > 0;
	if (there)
		pu_taps_begin_batch(q);
	for (uint32_t i = 0; i < there; i++) {
		const struct pu_cqe *cqe = pu_ring_cqe(&q->ring, i);
		enum pu_kind kind = (enum pu_kind)(cqe->user_data >> PU_KIND_SHIFT);
		int failed = 0;

		if (kind != PU_KIND_COMMIT)
			*only_commits = false;
		if (kind == PU_KIND_TAG)
			failed = complete_tag(q, (uint16_t)cqe->user_data, cqe->res);
		else if (kind <= PU_KIND_COMMIT)
			complete_batch(q, cqe);
		else if (kind < PU_KIND_WAKE)
			q->complete(q->completer, cqe->user_data, cqe->res);
		else if (cqe->user_data == WATCH) {
			q->watching = false;
			q->watched = true;
		} else if (cqe->user_data == IDLE) {
			q->timing = false;
			q->elapsed = true;
		} else if (kind == PU_KIND_GATE)
			pu_gate_timer_ended(q);
		else if (kind == PU_KIND_WAKE)
			failed = pu_wake_arm(&q->wake, &q->ring, WAKE);
		error = error ? error : failed;
	}
	pu_ring_advance(&q->ring, there);
	return error;
}

/* Once the kernel gives tags back: nothing is ours any more, and nothing wakes who waits for more. */
static bool over(const struct pu_queue *q)
{
	if (pu_queue_awaits(q) || pu_queue_held(q))
		return false;
	if (q->batch)
		return pu_batch_ended(q->batch);
	return !q->in_kernel || !q->error; /* an error is of one tag: the others are served on */
}

static int end_of(const struct pu_queue *q)
{
	return q->error ? q->error : -ENODEV;
}

int pu_queue_event_fd(struct pu_queue *q)
{
	int fd, error;

	if (q->loopback && q->ring.fd < 0)
		return q->wake.fd;
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
		q->loopback->watch_fd = fd;
		return 0;
	}
	if (q->watching)
		return 0;
	sqe = pu_ring_next_sqe(&q->ring);
	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_POLL_ADD;
	sqe->fd = fd;
	sqe->op_flags = POLLIN;
	sqe->user_data = WATCH;
	q->watching = true;
	return 0;
}

int pu_queue_submit(struct pu_queue *q)
{
	int error;

	pu_taps_flush(q);
	error = q->batch ? pu_batch_submit(q) : 0;
	return error < 0 ? error : pu_ring_submit(&q->ring, 0, 0, 0);
}

static int enter(struct pu_queue *q, int64_t timeout_ns)
{
	eventfd_t events;
	int done;

	/* Before the enter: what comes after it is told anew. */
	if (q->event_fd >= 0)
		eventfd_read(q->event_fd, &events);
	pu_taps_flush(q);
	if (q->batch) {
		done = pu_batch_submit(q);
		if (done < 0 && done != -EAGAIN)
			return done;
	}
	done = pu_ring_submit(&q->ring, timeout_ns != 0, timeout_ns, 0);
	pu_count(&q->counters.enters, 1);
	if (q->event_fd >= 0 && pu_ring_deferred(&q->ring))
		eventfd_write(q->event_fd, 1);
	if (__atomic_load_n(&q->severed, __ATOMIC_ACQUIRE))
		return -ESHUTDOWN;
	/* Out of memory or completions to be reaped first: the commits stay queued, try again. */
	if (done == -EAGAIN && !pu_ring_ready(&q->ring))
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	if (done < 0 && done != -ETIME && done != -EINTR && done != -EAGAIN && done != -EBUSY)
		return done;
	return 0;
}

/* That answers were taken is nothing that a caller waits for. */
static int wait_kernel(struct pu_queue *q, int64_t timeout_ns)
{
	bool only_commits;
	int error;

	do {
		error = enter(q, timeout_ns);
		if (!error)
			error = reap(q, &only_commits);
	} while (!error && only_commits && timeout_ns == PU_FOREVER && !q->ending);
	return error;
}

/* A tag that was answered after its device was quiesced fetches for nobody: it brings no request, and
 * is not given back either. The others are, at once: what does not come within a round never will.
 * 0: the queue goes on. */
PU_NEVER_INLINE int find_end(struct pu_queue *q)
{
	uint32_t before = 0;
	int error = 0;

	if (q->batch)
		return over(q) && pu_batch_sent(q->batch) ? end_of(q) : 0;
	while (!error && over(q)) {
		if (!q->in_kernel || (before == q->in_kernel && !pu_ring_unsubmitted(&q->ring)))
			return end_of(q);
		before = q->in_kernel;
		nanosleep(&(struct timespec){ 0, GIVEN_BACK_WITHIN }, NULL);
		error = wait_kernel(q, 0);
	}
	return error;
}

static void take_injected(struct pu_queue *q)
{
	struct pu_loopback *loopback = q->loopback;

	pu_taps_begin_batch(q);
	q->owned -= loopback->nr_injected; /* counted again as they are taken */
	for (uint32_t i = 0; i < loopback->nr_injected; i++)
		take(q, loopback->injected[i]);
	loopback->nr_injected = 0;
}

static int wait_somewhere(struct pu_queue *q, int64_t timeout_ns)
{
	int error = 0;

	if (!q->loopback)
		return wait_kernel(q, timeout_ns);
	if (q->loopback->nr_injected)
		timeout_ns = 0;
	if (q->ring.fd < 0)
		pu_loopback_wait(q, timeout_ns);
	else
		error = wait_kernel(q, timeout_ns);
	take_injected(q);
	return error;
}

/* By the ring, once in a while: a time-out of every wait was dearer than the rest of a round. Needs
 * a ring that brings nothing, no write's data either, but in a wait. */
static void set_idle_timer(struct pu_queue *q)
{
	bool wanted = q->idle_time[0] || q->idle_time[1];
	struct pu_sqe *sqe = NULL;

	if (wanted && q->ring.fd >= 0 && q->ring.setup_flags & PU_SETUP_DEFER_TASKRUN)
		sqe = pu_ring_next_sqe(&q->ring);
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
	if (q->used || pu_queue_held(q) || q->foreign_inflight != q->standing || !sent)
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
}

/* What the gate has kept until now. */
PU_NEVER_INLINE void take_from_gate(struct pu_queue *q)
{
	int32_t tag, verdict;

	while ((tag = pu_gate_next(q, &verdict)) >= 0)
		pass(q, (uint16_t)tag, verdict);
}

int pu_queue_wait(struct pu_queue *q, int64_t timeout_ns)
{
	uint32_t left = q->nr_carried_over;
	int error = pu_queue_read_inbox(q);

	q->nr_ready = left;
	q->nr_carried_over = 0;
	if (left || (q->ending && over(q)))
		timeout_ns = 0;
	if (__builtin_expect(pu_taps_gated(q), 0))
		timeout_ns = pu_gate_before_wait(q, timeout_ns);
	if (!error)
		error = wait_somewhere(q, timeout_ns);
	if (!error && __builtin_expect(pu_taps_gated(q), 0))
		take_from_gate(q);
	if (!error)
		error = pu_queue_read_inbox(q);
	if (error)
		return error;
	if (q->nr_ready)
		q->used = true;
	if (q->elapsed)
		trim(q);
	else if (q->used && !q->timing)
		set_idle_timer(q);
	if (q->nr_ready - left > q->counters.largest_batch)
		pu_count(&q->counters.largest_batch, q->nr_ready - left - q->counters.largest_batch);
	/* Said at once: nothing will ever wake a caller that waits for the descriptor instead. */
	if (q->ending)
		error = find_end(q);
	return error ? error : (int)q->nr_ready;
}

int pu_queue_serve(struct pu_queue *q, pu_handler handler, void *context, bool blind)
{
	struct pu_native native = { handler, context, q->user_copy && !blind };
	int there;

	q->native = &native;
	do
		there = pu_queue_wait(q, PU_FOREVER);
	while (there >= 0 && !q->loopback);
	q->native = NULL;
	return there >= 0 || there == -ENODEV ? 0 : there;
}

bool pu_queue_pending(const struct pu_queue *q)
{
	if (q->nr_carried_over || __atomic_load_n(&q->nr_inbox, __ATOMIC_RELAXED))
		return true;
	if (q->loopback && q->loopback->nr_injected)
		return true;
	return q->ring.fd >= 0 && (pu_ring_unsubmitted(&q->ring) || pu_ring_ready(&q->ring) ||
				   pu_ring_deferred(&q->ring) || (q->batch && q->batch->filled));
}

int pu_queue_turn(struct pu_queue *q, pu_handler handler, void *context, bool blind)
{
	struct pu_native native = { handler, context, q->user_copy && !blind };
	int there = 0;

	q->native = &native;
	for (int round = 0; round < PU_TURN_ROUNDS; round++) {
		there = pu_queue_wait(q, 0);
		if (there < 0 || !pu_queue_pending(q))
			break;
	}
	q->native = NULL;
	return there < 0 ? there : 0;
}

void pu_queue_counters(const struct pu_queue *q, struct pu_counters *snapshot)
{
	const uint64_t *from = (const uint64_t *)&q->counters;
	uint64_t *to = (uint64_t *)snapshot;

	for (size_t i = 0; i < sizeof(*snapshot) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
