/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "loopback.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>

#include "tapping.h"

int pu_loopback_open(struct pu_queue *q)
{
	struct pu_loopback *loopback = calloc(1, sizeof(*loopback));

	q->loopback = loopback;
	if (!loopback)
		return -ENOMEM;
	loopback->watch_fd = -1;
	loopback->injected = calloc(q->depth, sizeof(*loopback->injected));
	loopback->results = calloc(q->depth, sizeof(*loopback->results));
	return loopback->injected && loopback->results ? 0 : -ENOMEM;
}

void pu_loopback_free(struct pu_queue *q)
{
	if (!q->loopback)
		return;
	free(q->loopback->injected);
	free(q->loopback->results);
	free(q->loopback);
	q->loopback = NULL;
}

int pu_loopback_inject(struct pu_queue *q, uint16_t tag, uint32_t op_flags, uint64_t start_sector,
		       uint32_t nr_sectors)
{
	struct pu_loopback *loopback = q->loopback;

	if (!loopback || pu_tag_state(&q->tags[tag]) != PU_TAG_FETCHING)
		return -EINVAL;
	q->desc[tag] = (struct pu_desc){ op_flags, nr_sectors, start_sector, 0 };
	pu_tag_set_state(&q->tags[tag], PU_TAG_IDLE);
	q->in_kernel--;
	q->owned++;
	loopback->injected[loopback->nr_injected++] = tag;
	return 0;
}

int pu_loopback_commit(struct pu_queue *q, uint16_t tag, int32_t value)
{
	pu_taps_flush(q); /* who asked sees the answer at once */
	q->loopback->results[tag] = value;
	pu_tag_set_state(&q->tags[tag], PU_TAG_FETCHING);
	return 0;
}

void pu_loopback_wait(struct pu_queue *q, int64_t timeout_ns)
{
	struct timespec limit = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
	struct pollfd fds[] = {
		{ .fd = q->wake.fd, .events = POLLIN },
		{ .fd = q->loopback->watch_fd, .events = POLLIN },
	};

	if (ppoll(fds, 2, timeout_ns < 0 ? NULL : &limit, NULL) > 0 && fds[0].revents)
		eventfd_read(q->wake.fd, &q->wake.value);
	q->watched = fds[1].revents;
}
