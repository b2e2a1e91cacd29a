/* SPDX-License-Identifier: MIT
 * The memory of a queue's requests: a buffer for each tag
 *
 * The kernel's requests come into it and go out of it, and handlers look at it. A tag whose memory
 * somebody may still see or fill when its request is over gets another buffer for the next one:
 * what is seen stays as it was, and what comes late goes nowhere.
 */
#ifndef PU_BUFFERS_H
#define PU_BUFFERS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pu_buffers {
	uint8_t *first;	  /* one mapping that holds every tag's buffer, until it gets another */
	uint8_t **of_tag; /* what each tag's next request is offered */
	uint16_t depth;
	int process;  /* whose it is: a fork leaves the memory out */
	size_t bytes; /* of one buffer; whole pages */
	pthread_mutex_t lock; /* guards retired */
	struct pu_retired *retired;
};

/* Buffers of at least `bytes` for `depth` tags: not inherited by children, and sparse until used.
 * NULL: no memory. */
struct pu_buffers *pu_buffers_new(uint16_t depth, size_t bytes);
/* With whatever the tags have now, and what was retired. */
void pu_buffers_free(struct pu_buffers *b);

/* One more buffer, or NULL. */
uint8_t *pu_buffers_map(const struct pu_buffers *b);
/* Gives a buffer that no tag has any more back to the kernel. */
void pu_buffers_unmap(const struct pu_buffers *b, uint8_t *buffer);

/* Offers `fresh` to the tag's next request; returns what its last one had. By whoever has claimed
 * the answer to that one, since a commit tells the kernel. */
static inline uint8_t *pu_buffers_exchange(struct pu_buffers *b, uint16_t tag, uint8_t *fresh)
{
	uint8_t *before = b->of_tag[tag];

	b->of_tag[tag] = fresh;
	return before;
}

/* Keeps a buffer that no tag has any more until pu_buffers_free: nobody can tell who looks at it.
 * [any thread] */
void pu_buffers_retire(struct pu_buffers *b, uint8_t *buffer);

/* Gives the memory of all tags back to the kernel, until it is used again. */
void pu_buffers_trim(const struct pu_buffers *b);

#endif
