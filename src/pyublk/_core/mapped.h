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
#include "answer.h"
#include "copy.h"
#include "queue.h"

struct pu_slot;
struct pu_work;
struct iovec;

struct pu_leg_failure {
	uint32_t leg;
	uint32_t file_generation; /* of the leg, when it failed */
	int error; /* errno, positive; 0: a failure that is known is only to be put on record */
};

struct pu_mapped {
	struct pu_queue *q;
	struct pu_layout *layout;
	struct pu_work *works; /* for each tag */
	struct pu_slot *slots;
	struct iovec *vectors;
	uint32_t nr_slots;
	uint32_t free_slot; /* head of the list of free ones */
	uint16_t *waiting;  /* tags with parts left but no slot, first come first */
	uint32_t nr_waiting;
	uint16_t *blocked; /* tags whose write must wait until a region is copied */
	uint32_t nr_blocked;
	uint32_t version;	  /* of the layout's files, as registered */
	bool every_file_mapped;
	uint32_t held;		  /* requests that wait until legs' failures are on record */
	uint32_t failed_legs;	  /* bits: to be given up, and put on record */
	struct pu_leg_failure failures[PU_MAX_LEGS];
	int64_t look_at_ns; /* when to look for legs that hang; 0: at once */
	void *zeroes;
	uint64_t zeroes_bytes;
	bool no_holes, no_zero_range; /* a file system that cannot: zeroes are written */
};

/* Entries that the ring needs beside the tags' own. */
uint32_t pu_mapped_entries(const struct pu_layout *layout, uint16_t depth);

/* `version`: the layout's before its files were taken to be registered. 0 or -errno. The layout
 * outlives it. */
int pu_mapped_open(struct pu_mapped *m, struct pu_queue *q, struct pu_layout *layout,
		   uint32_t version);
/* With the queue closed (true, all is over), but not freed. */
void pu_mapped_close(struct pu_mapped *m);

/* Waits and serves. Returns how many requests came that need a plan (they are in q->ready; with any
 * other layout always 0), or as pu_queue_wait. Comes back at once with 0 when a leg failed. */
int pu_mapped_turn(struct pu_mapped *m, int64_t timeout_ns);

/* A layout by request: the parts of a request (start is not looked at), from the first byte on, then
 * begin. 0 or -errno: -EINVAL when they are not as long as the request, or name no file. */
int pu_mapped_plan(struct pu_mapped *m, uint16_t tag, const struct pu_extent *parts, uint32_t count);

/* The next leg that failed, to be given up (pu_layout_fail_leg) and put on record; false: none. */
bool pu_mapped_next_failure(struct pu_mapped *m, struct pu_leg_failure *failure);
/* That was done, or tried, for all that were told: answers those who waited. */
void pu_mapped_recorded(struct pu_mapped *m);

#endif
