/* SPDX-License-Identifier: MIT
 * A queue without a kernel: tests inject its requests, and read their answers
 *
 * It has descriptors, buffers and tags as any other, and a ring only if it is to have other I/O.
 */
#ifndef PU_LOOPBACK_H
#define PU_LOOPBACK_H

#include "queue.h"

struct pu_loopback {
	uint16_t *injected; /* tags whose requests no wait has brought yet */
	uint32_t nr_injected;
	int32_t *results; /* each tag's last answer */
	int watch_fd;	  /* without a ring: the descriptor that is watched, or -1 */
};

/* 0 or -ENOMEM; pu_loopback_free in either case. */
int pu_loopback_open(struct pu_queue *q);
void pu_loopback_free(struct pu_queue *q);

/* Makes a request appear. It is held from now on, and the next wait brings it. -EINVAL unless the tag
 * is FETCHING. */
int pu_loopback_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		       uint32_t nr_sectors);
/* Keeps an answer. */
int pu_loopback_commit(struct pu_queue *q, uint16_t tag, int32_t value);
/* Of a queue without a ring: until somebody wakes it, or the watched descriptor is readable. */
void pu_loopback_wait(struct pu_queue *q, int64_t timeout_ns);

/* The tag's last answer. */
static inline int32_t pu_loopback_result(const struct pu_queue *q, uint16_t tag)
{
	return q->loopback->results[tag];
}

#endif
