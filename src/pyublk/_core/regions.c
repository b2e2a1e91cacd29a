/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "regions.h"

#include <errno.h>
#include <stdlib.h>

#define SMALLEST (UINT64_C(1) << 20)
#define MOST (UINT64_C(1) << 16)

int pu_regions_init(struct pu_regions *regions, uint64_t size)
{
	*regions = (struct pu_regions){ .bytes = SMALLEST, .blocked = PU_NO_REGION };
	while ((size - 1) / regions->bytes >= MOST)
		regions->bytes *= 2;
	regions->counters = calloc(MOST, sizeof(*regions->counters));
	return regions->counters ? 0 : -ENOMEM;
}

void pu_regions_destroy(struct pu_regions *regions)
{
	free(regions->counters);
	regions->counters = NULL;
}

/* A disk that has grown has more regions than counters: those that share them are blocked together. */
static struct pu_region *counters_of(const struct pu_regions *regions, uint64_t region)
{
	return &regions->counters[region % MOST];
}

static uint64_t last_region(const struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	return (offset + (length ? length : 1) - 1) / regions->bytes;
}

bool pu_regions_begin(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	uint64_t first = offset / regions->bytes, last = last_region(regions, offset, length);
	uint64_t blocked;

	for (uint64_t region = first; region <= last; region++)
		__atomic_fetch_add(&counters_of(regions, region)->begun, 1, __ATOMIC_SEQ_CST);
	/* After it is counted: who blocks the region now will see it, or it sees that. */
	blocked = __atomic_load_n(&regions->blocked, __ATOMIC_SEQ_CST);
	if (blocked == PU_NO_REGION)
		return true;
	for (uint64_t region = first; region <= last; region++) {
		if (counters_of(regions, region) != counters_of(regions, blocked))
			continue;
		pu_regions_end(regions, offset, length);
		return false;
	}
	return true;
}

void pu_regions_end(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	uint64_t last = last_region(regions, offset, length);

	for (uint64_t region = offset / regions->bytes; region <= last; region++)
		__atomic_fetch_add(&counters_of(regions, region)->ended, 1, __ATOMIC_SEQ_CST);
}

void pu_regions_block(struct pu_regions *regions, uint64_t region)
{
	__atomic_store_n(&regions->blocked, region, __ATOMIC_SEQ_CST);
}

bool pu_regions_are_drained(const struct pu_regions *regions, uint64_t region)
{
	const struct pu_region *r = counters_of(regions, region);
	uint32_t ended = __atomic_load_n(&r->ended, __ATOMIC_SEQ_CST);

	return ended == __atomic_load_n(&r->begun, __ATOMIC_SEQ_CST);
}

uint32_t pu_regions_begun(const struct pu_regions *regions, uint64_t region)
{
	return __atomic_load_n(&counters_of(regions, region)->begun, __ATOMIC_RELAXED);
}
