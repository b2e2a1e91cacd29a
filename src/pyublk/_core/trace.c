/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "trace.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define MAGIC 0x65617407u /* and the version */

enum { /* the upper half of an action: BLK_TC_* */
	READ = 1u << 16,
	WRITE = 1u << 17,
	FLUSH = 1u << 18,
	SYNC = 1u << 19,
	QUEUE = 1u << 20,
	ISSUE = 1u << 22,
	COMPLETE = 1u << 23,
	FS = 1u << 24, /* as the kernel says of all but ioctls */
	DISCARD = 1u << 29,
	FUA = 1u << 31,
};

int pu_trace_open(struct pu_trace *trace, size_t bytes)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
	void *map;

	memset(trace, 0, sizeof(*trace));
	map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (map == MAP_FAILED)
		return -ENOMEM;
	trace->records = map;
	trace->bytes = bytes;
	trace->room = bytes / sizeof(*trace->records);
	return 0;
}

void pu_trace_close(struct pu_trace *trace)
{
	if (trace->records)
		munmap(trace->records, trace->bytes);
	trace->records = NULL;
}

static uint32_t category(uint32_t op_flags)
{
	switch (op_flags & 0xff) {
	case PU_OP_READ:
	case PU_OP_REPORT_ZONES:
		return READ;
	case PU_OP_FLUSH:
		return WRITE | FLUSH | SYNC;
	case PU_OP_DISCARD:
		return WRITE | DISCARD;
	default:
		return op_flags & PU_FLAG_FUA ? WRITE | FUA | SYNC : WRITE;
	}
}

static uint32_t action(enum pu_trace_event event, uint32_t op_flags)
{
	switch (event) {
	case PU_TRACE_QUEUED:
		return event | category(op_flags) | QUEUE;
	case PU_TRACE_ISSUED:
		return event | category(op_flags) | ISSUE | FS;
	default:
		return event | category(op_flags) | COMPLETE | FS;
	}
}

void pu_trace_put(struct pu_trace *trace, enum pu_trace_event event, const struct pu_desc *desc,
		  int64_t now, int32_t result)
{
	uint64_t number = __atomic_fetch_add(&trace->next, 1, __ATOMIC_RELEASE);
	uint32_t flags = desc->op_flags;

	if (number >= trace->room)
		return;
	trace->records[number] = (struct pu_trace_record){
		.magic = MAGIC,
		.sequence = (uint32_t)number,
		.time = (uint64_t)now,
		.sector = pu_desc_offset(desc) >> PU_SECTOR_SHIFT,
		.bytes = (flags & 0xff) == PU_OP_FLUSH ? 0 : desc->nr_sectors << PU_SECTOR_SHIFT,
		.action = action(event, flags),
		.device = trace->device,
		.cpu = trace->cpu,
		.error = (uint16_t)(result < 0 ? -result : 0),
	};
}
