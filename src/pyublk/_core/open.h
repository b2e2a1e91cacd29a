/* SPDX-License-Identifier: MIT
 * Opening and closing queues, and cutting one off from its owner
 */
#ifndef PU_OPEN_H
#define PU_OPEN_H

#include "queue.h"

struct pu_queue_options {
	uint16_t id, depth;
	uint16_t first_tag, tag_step; /* the tags of this one: first, first + step, ... */
	uint64_t flags;		      /* the device's PU_F_* */
	size_t buffer_bytes;
	struct pu_buffers *buffers; /* NULL: its own; else they stay the caller's */
	bool own_device; /* the queue closes the number of the char device, when it is freed */
	uint32_t extra_entries; /* completions of others' I/O that the ring has room for */
	const int *files;	/* for it: registered behind the char device, which has index 0 */
	uint32_t nr_files;
	int64_t trim_after_ns;	/* idle for so long, buffers are given back; 0: never */
	uint32_t faults;	/* enum pu_fault */
	const struct pu_shared *client_memory; /* with clients; NULL: no memory */
	struct pu_rules *rules; /* of its disk, which outlive the queue; NULL: none, ever */
};

/* Memory that the calling thread allocates must not wait for dirty pages that only it can write:
 * for each that serves requests. Needs CAP_SYS_RESOURCE; without it a disk works, but not below heavy
 * memory pressure. pu_queue_open does it, too. */
void pu_io_flusher(void);

/* Opens a queue of the char device: maps descriptors, makes ring and buffers. To be called by the
 * thread that will serve it. cdev < 0: loopback. 0 or -errno; nothing is left on failure. */
int pu_queue_open(struct pu_queue *q, int cdev, const struct pu_queue_options *options);
/* Gives everything back but tags, buffers, and the number of the char device, which others may still
 * come to look at; others' I/O is cancelled, and waited for (PU_END_NS). False: the kernel still has
 * some of it, so the queue, its completer, and all memory of both must stay where they are for ever.
 * In a forked child it lets go of the child's copies of descriptors, and nothing else. */
bool pu_queue_close(struct pu_queue *q);
void pu_queue_free(struct pu_queue *q);

/* Takes ring, descriptors and char device away from a stuck owner. The number of the char device
 * stays taken: who comes late to copy meets no other file. [any thread] */
int pu_queue_sever(struct pu_queue *q);

#endif
