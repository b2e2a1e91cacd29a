/* SPDX-License-Identifier: MIT
 * A record of each request as it arrives, goes to its target, and is answered
 *
 * The records are blktrace's own (struct blk_io_trace of linux/blktrace_api.h), so that its programs
 * read them. They go into memory that is there before the first: recording takes no memory, touches no
 * file, and waits for nobody, also when the trace will be kept on the very disk. When it is full,
 * the others are counted.
 */
#ifndef PU_TRACE_H
#define PU_TRACE_H

#include <stddef.h>
#include <stdint.h>

#include "ublk.h"

enum pu_trace_event {
	PU_TRACE_QUEUED = 1,
	PU_TRACE_ISSUED = 7,
	PU_TRACE_COMPLETED = 8,
};

struct pu_trace_record { /* blk_io_trace */
	uint32_t magic;
	uint32_t sequence;
	uint64_t time; /* ns, CLOCK_MONOTONIC */
	uint64_t sector;
	uint32_t bytes;
	uint32_t action;
	uint32_t pid;
	uint32_t device; /* major << 20 | minor */
	uint32_t cpu;
	uint16_t error;
	uint16_t pdu_len;
};

_Static_assert(sizeof(struct pu_trace_record) == 48, "blk_io_trace");

struct pu_trace {
	struct pu_trace_record *records;
	size_t bytes;
	uint64_t room; /* so many records */
	uint64_t next; /* how many there were, with those for which there was no room */
	int64_t began; /* what arrived before has no record */
	uint32_t device;
	uint32_t cpu; /* the number of the file */
};

/* Takes memory for so many bytes of records, all of it now; 0 or -ENOMEM. */
int pu_trace_open(struct pu_trace *trace, size_t bytes);
void pu_trace_close(struct pu_trace *trace);

/* [any thread] */
void pu_trace_put(struct pu_trace *trace, enum pu_trace_event event, const struct pu_desc *desc,
		  int64_t now, int32_t result);

/* Of the memory, by anyone while it is recorded, too: those that are there, and those that are not. */
static inline uint64_t pu_trace_kept(const struct pu_trace *trace)
{
	uint64_t next = __atomic_load_n(&trace->next, __ATOMIC_ACQUIRE);

	return next < trace->room ? next : trace->room;
}

static inline uint64_t pu_trace_lost(const struct pu_trace *trace)
{
	return __atomic_load_n(&trace->next, __ATOMIC_ACQUIRE) - pu_trace_kept(trace);
}

#endif
