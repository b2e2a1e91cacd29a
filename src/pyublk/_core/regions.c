/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "regions.h"

#include <errno.h>
#include <stdlib.h>

#define SMALLEST 20u

int pu_regions_init(struct pu_regions *regions, uint64_t size)
{
	*regions = (struct pu_regions){ .shift = SMALLEST, .blocked = PU_NO_REGION };
	while ((size - 1) >> regions->shift >= PU_REGION_COUNTERS)
		regions->shift++;
	regions->bytes = UINT64_C(1) << regions->shift;
	regions->counters = calloc(PU_REGION_COUNTERS, sizeof(*regions->counters));
	return regions->counters ? 0 : -ENOMEM;
}

void pu_regions_destroy(struct pu_regions *regions)
{
	free(regions->counters);
	regions->counters = NULL;
}

static struct pu_region *counters_of(const struct pu_regions *regions, uint64_t region)
{
	return &regions->counters[region % PU_REGION_COUNTERS];
}

bool pu_regions_begin_slowly(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	uint64_t first = offset >> regions->shift, last = pu_last_region(regions, offset, length);
	uint64_t blocked;

	for (uint64_t region = first; region <= last; region++)
		__atomic_fetch_add(&counters_of(regions, region)->begun, 1, __ATOMIC_SEQ_CST);
	blocked = __atomic_load_n(&regions->blocked, __ATOMIC_SEQ_CST);
	if (blocked == PU_NO_REGION)
		return true;
	for (uint64_t region = first; region <= last; region++) {
		if (counters_of(regions, region) != counters_of(regions, blocked))
			continue;
		pu_regions_end_slowly(regions, offset, length);
		return false;
	}
	return true;
}

void pu_regions_end_slowly(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	uint64_t last = pu_last_region(regions, offset, length);

	for (uint64_t region = offset >> regions->shift; region <= last; region++)
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
