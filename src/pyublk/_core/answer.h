/* SPDX-License-Identifier: MIT
 * Answering requests, once each, from whichever thread
 */
#ifndef PU_ANSWER_H
#define PU_ANSWER_H

#include "commit.h"
#include "queue.h"

/* pu_queue_answer, of a request that may be pinned: waits until it is not. */
int pu_queue_answer_unpinned(struct pu_queue *q, uint16_t tag, int64_t result);

/* Answers a request. result < 0: -errno; else success. Owner thread only.
 * 0, or -EALREADY when the tag holds no unanswered request. */
PU_ALWAYS_INLINE int pu_queue_answer(struct pu_queue *q, uint16_t tag, int64_t result)
{
	struct pu_tag *t = &q->tags[tag];

	if (!pu_tag_try_to_claim(t, pu_tag_generation(t)))
		return pu_queue_answer_unpinned(q, tag, result);
	return pu_commit(q, tag, pu_commit_value_of(&q->desc[tag], result));
}

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

/* Commits what other threads have left to the owner. 0 or -EAGAIN. */
int pu_queue_commit_messages(struct pu_queue *q);

/* The same with an unlocked look first: an idle inbox must not cost the fast path a lock. A message
 * that is missed here has called the owner, so the wait that follows returns at once. */
static inline int pu_queue_read_inbox(struct pu_queue *q)
{
	return __atomic_load_n(&q->nr_inbox, __ATOMIC_RELAXED) ? pu_queue_commit_messages(q) : 0;
}

#endif
