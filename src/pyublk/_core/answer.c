/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "answer.h"

#include <errno.h>
#include <string.h>

#include "batch.h"
#include "commit.h"

int pu_queue_answer_unpinned(struct pu_queue *q, uint16_t tag, int64_t result)
{
	struct pu_tag *t = &q->tags[tag];

	if (!pu_tag_claim(t, pu_tag_generation(t)))
		return -EALREADY;
	return pu_commit(q, tag, pu_commit_value_of(&q->desc[tag], result));
}

static void send_message(struct pu_queue *q, uint16_t tag, int32_t result)
{
	pthread_mutex_lock(&q->inbox_lock);
	q->inbox[q->nr_inbox] = (struct pu_message){ tag, result };
	__atomic_store_n(&q->nr_inbox, q->nr_inbox + 1, __ATOMIC_RELAXED);
	if (q->nr_inbox == 1)
		pu_wake_call(&q->wake);
	pthread_mutex_unlock(&q->inbox_lock);
}

static bool takes_posts(const struct pu_queue *q)
{
	/* A buffer that the kernel registered by itself must go back over the ring it came by. */
	return q->batch && !q->auto_buffer && !__atomic_load_n(&q->severed, __ATOMIC_ACQUIRE) &&
	       !pu_taps_gated(q); /* which may have its own answer */
}

static int post_to_kernel(struct pu_queue *q, uint16_t tag, int64_t result)
{
	int32_t value = pu_commit_value_of(&q->desc[tag], result);
	struct pu_posted posted = pu_taps_before_post(q, tag);
	int error = 0;

	pthread_mutex_lock(&q->inbox_lock);
	if (q->wake.closed)
		error = -ESHUTDOWN;
	else if (q->post_ring.fd < 0)
		error = pu_ring_open(&q->post_ring, 4, 0, 0, PU_SETUP_SUBMIT_ALL | PU_SETUP_NO_SQARRAY);
	if (!error)
		error = pu_batch_commit_now(q, &q->post_ring, tag, value);
	if (!error) {
		if (value < 0)
			__atomic_fetch_add(&q->counters.errors, 1, __ATOMIC_RELAXED);
		pu_taps_post(q, &posted, value);
		__atomic_fetch_add(&q->posted, 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&q->ending, __ATOMIC_SEQ_CST))
			pu_wake_call(&q->wake); /* it may have waited for this one alone */
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
	if (!pu_tag_claim(&q->tags[tag], generation))
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
	if (!pu_tag_claim(&q->tags[tag], generation)) {
		pu_buffers_unmap(q->buffers, fresh);
		return -EALREADY;
	}
	if (result >= 0)
		bring_along(q, tag, fresh);
	*kept = pu_buffers_exchange(q->buffers, tag, fresh);
	if (here)
		return pu_commit(q, tag, pu_commit_value_of(&q->desc[tag], result));
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
	if (pu_tag_claim_unpinned(&q->tags[tag], generation, 100)) {
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
	pu_wake_call(&q->wake);
	pthread_mutex_unlock(&q->inbox_lock);
}

int pu_queue_commit_messages(struct pu_queue *q)
{
	int error = 0;

	pthread_mutex_lock(&q->inbox_lock);
	for (uint32_t i = 0; i < q->nr_inbox && !error; i++) {
		uint16_t tag = q->inbox[i].tag;

		error = pu_commit(q, tag, pu_commit_value_of(&q->desc[tag], q->inbox[i].result));
	}
	__atomic_store_n(&q->nr_inbox, 0, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&q->inbox_lock);
	return error;
}
