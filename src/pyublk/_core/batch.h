/* SPDX-License-Identifier: MIT
 * Batch I/O (Linux 7.0): one command commits many tags, one multishot command fetches them
 *
 * Commits are gathered in an array and go with the next submission. There are two arrays, since the
 * kernel may still read one. Tags arrive in buffers of a provided ring, which are given back at once.
 *
 * The completion of a commit would end the wait that follows it, so a request at depth 1 would cost
 * two system calls. A commit of one tag therefore completes only when it fails. With several tags it
 * always completes: the result is how many of them the kernel took.
 */
#ifndef PU_BATCH_H
#define PU_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "queue.h"

struct pu_batch {
	uint8_t *elements[2];
	uint8_t *alone;	  /* an element for each tag: it is read before the tag's next request comes */
	uint32_t sent[2]; /* elements that the kernel has; 0: the array is free */
	uint32_t filled;  /* elements in the array that is being filled */
	uint8_t filling;  /* which one that is */
	bool plain;	  /* no zones, and no faults on purpose */
	uint8_t element_bytes;
	uint16_t flags;
	uint32_t preparing; /* PREP_IO_CMDS under way */
	bool fetching;	    /* FETCH_IO_CMDS under way */
	bool ended;	    /* and it will not be again */
	struct pu_provided *provided;
	uint32_t nr_provided;
	uint16_t provided_tail;
	uint16_t *arrivals; /* the buffers, PU_BATCH_MAX_TAGS tags apart */
	uint32_t arrival_tags; /* what each may hold */
	uint64_t posted[3]; /* the element of pu_batch_commit_now */
};

int pu_batch_open(struct pu_queue *q);
void pu_batch_close(struct pu_queue *q);
/* Prepares the queue's tags, then fetches. 0 or -errno. */
int pu_batch_fetch(struct pu_queue *q);
/* Queues a commit for the next submission; pu_commit_in_batch has the shorter way for plain ones. */
void pu_batch_commit(struct pu_queue *q, uint16_t tag, int32_t value);
/* Turns queued commits into a command, and fetches again where that ended. 0 or -errno. */
int pu_batch_submit(struct pu_queue *q);
/* Tags whose requests a completion brings. To be taken before it is handled, which gives the kernel
 * their buffer back. */
static inline const uint16_t *pu_batch_arrivals(const struct pu_batch *batch,
						const struct pu_cqe *cqe, uint32_t *count)
{
	bool fetched = cqe->user_data >> PU_KIND_SHIFT == PU_KIND_FETCH && cqe->res >= 0 &&
		       cqe->flags & PU_CQE_BUFFER;

	*count = fetched ? (uint32_t)cqe->res / sizeof(*batch->arrivals) : 0;
	return batch->arrivals + (size_t)(cqe->flags >> PU_CQE_BUFFER_SHIFT) * PU_BATCH_MAX_TAGS;
}

/* Handles a completion of one of the three commands. */
void pu_batch_complete(struct pu_queue *q, const struct pu_cqe *cqe);
/* No answer is in the kernel, or waiting to go there; one that went alone was carried out as it was
 * submitted. */
bool pu_batch_sent(const struct pu_batch *batch);
/* No request comes any more, and no command is in the kernel. */
bool pu_batch_ended(const struct pu_batch *batch);
/* Commits one tag through a ring that is not the owner's, at once; one caller at a time. 0 or
 * -errno: then the kernel has not taken the answer, and will not. */
int pu_batch_commit_now(struct pu_queue *q, struct pu_ring *ring, uint16_t tag, int32_t value);

#endif
