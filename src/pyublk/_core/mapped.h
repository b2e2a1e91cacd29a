/* SPDX-License-Identifier: MIT
 * Serving a queue from files, by the queue's own ring
 *
 * A request is cut into parts (layout.h), each an operation on one file; the request is answered when
 * all have ended. What an operation moves is the request's own memory where the device's path is
 * zero copy, else the tag's buffer. Short transfers go on where they stopped. Nothing is allocated
 * while requests are served: with more parts than slots, the rest waits for slots to be free.
 *
 * Files whose bytes are in memory are read and written on the spot, unless the request's memory is
 * registered: the ring would hand each of them to a worker thread. With user copy, and all files
 * mapped, the kernel copies between request and file without a stop in between.
 */
#ifndef PU_MAPPED_H
#define PU_MAPPED_H

#include "layout.h"
#include "policy.h"
#include "queue.h"

struct pu_slot;
struct pu_work;
struct iovec;

struct pu_mapped {
	struct pu_queue *q;
	struct pu_layout *layout;
	const struct pu_policy_functions *policy;
	const struct pu_policy *context; /* whose functions these are */
	void *own; /* what the policy keeps for this queue */
	struct pu_work *works; /* for each tag; in one mapping with the two that follow */
	struct pu_slot *slots;
	struct iovec *vectors;
	size_t works_bytes;
	uint32_t nr_slots;
	uint32_t free_slot; /* head of the list of free ones; nr_slots: none is */
	uint16_t *waiting;  /* tags with parts left but no slot, first come first */
	uint32_t nr_waiting;
	uint16_t *blocked; /* tags whose request the policy does not admit yet */
	uint32_t nr_blocked;
	uint32_t nr_deferred; /* that nobody has been told of */
	uint64_t *outcomes; /* for each tag, by other threads: see deferred.c */
	bool resolved; /* there are some */
	uint32_t version;	  /* of the layout's files, as registered */
	bool straight; /* data goes between requests and mapped files, without a stop in between */
	bool to_tell; /* by the policy: the turns are to be interrupted for it */
	int64_t look_every_ns; /* the policy looks after I/O that is under way; 0: never */
	int64_t look_at_ns;    /* when it does so again; 0: at once */
	int64_t turn_ns; /* of a clock for I/O, by turns, if the policy looks; see tick() */
	int64_t turned_ns; /* when that was */
	void *zeroes;
	uint64_t zeroes_bytes;
	bool no_holes, no_zero_range; /* a file system that cannot: zeroes are written */
};

/* Completions that the ring needs room for beside the tags' own. */
uint32_t pu_mapped_entries(const struct pu_policy *policy, uint16_t depth);

/* `version`: the layout's before its files were taken to be registered. 0 or -errno. Layout
 * and policy outlive it. */
int pu_mapped_open(struct pu_mapped *m, struct pu_queue *q, struct pu_layout *layout,
		   const struct pu_policy *policy, uint32_t version);
/* With the queue closed (true, all is over), but not freed. */
void pu_mapped_close(struct pu_mapped *m);

/* Waits and serves. Returns how many requests came that need a plan (they are in q->ready; with any
 * other layout always 0), or as pu_queue_wait. With to_tell set, whoever waits for nothing
 * else is to look there. */
int pu_mapped_turn(struct pu_mapped *m, int64_t timeout_ns);

/* A layout by request: the parts of a request (start is not looked at), from the first byte on, then
 * begin. 0 or -errno: -EINVAL when they are not as long as the request, or name no file, -EROFS when
 * the request would change a file that can only be read. */
int pu_mapped_plan(struct pu_mapped *m, uint16_t tag, const struct pu_extent *parts, uint32_t count);

#endif
