/* SPDX-License-Identifier: MIT
 * Requests under way, counted by region of a disk, so that somebody can have a region alone
 *
 * Who wants it blocks it, one at a time, and waits until it is drained: no request that is counted is
 * in it then, and none begins until the block is lifted.
 */
#ifndef PU_REGIONS_H
#define PU_REGIONS_H

#include <stdbool.h>
#include <stdint.h>

#define PU_NO_REGION UINT64_MAX

/* What a region is counted in. A disk that has grown has more regions than counters: those that share
 * one are blocked together. */
#define PU_REGION_COUNTERS (UINT64_C(1) << 16)

/* Requests begun and ended in a region. */
struct pu_region {
	uint32_t begun, ended;
};

struct pu_regions {
	struct pu_region *counters;
	uint64_t bytes; /* of one region: a power of two, of which this is */
	uint32_t shift;
	uint64_t blocked; /* no request begins in it */
};

/* Of a disk of that size. 0 or -ENOMEM. */
int pu_regions_init(struct pu_regions *regions, uint64_t size);
void pu_regions_destroy(struct pu_regions *regions);

static inline struct pu_region *pu_region_of(const struct pu_regions *regions, uint64_t offset)
{
	return &regions->counters[(offset >> regions->shift) % PU_REGION_COUNTERS];
}

/* Of a request that is in several regions, or while one is blocked. */
bool pu_regions_begin_slowly(struct pu_regions *regions, uint64_t offset, uint64_t length);
void pu_regions_end_slowly(struct pu_regions *regions, uint64_t offset, uint64_t length);

/* An empty request is in the region in which it would begin. */
static inline uint64_t pu_last_region(const struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	return (offset + length - !!length) >> regions->shift;
}

static inline bool pu_is_in_one_region(const struct pu_regions *regions, uint64_t offset,
				       uint64_t length)
{
	return offset >> regions->shift == pu_last_region(regions, offset, length);
}

/* A request begins, unless it touches the blocked region (false). */
static inline bool pu_regions_begin(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	struct pu_region *region = pu_region_of(regions, offset);

	if (!pu_is_in_one_region(regions, offset, length))
		return pu_regions_begin_slowly(regions, offset, length);
	__atomic_fetch_add(&region->begun, 1, __ATOMIC_SEQ_CST);
	/* After it is counted: who blocks the region now will see it, or it sees that. */
	if (__atomic_load_n(&regions->blocked, __ATOMIC_SEQ_CST) == PU_NO_REGION)
		return true;
	__atomic_fetch_add(&region->ended, 1, __ATOMIC_SEQ_CST);
	return pu_regions_begin_slowly(regions, offset, length);
}

static inline void pu_regions_end(struct pu_regions *regions, uint64_t offset, uint64_t length)
{
	if (pu_is_in_one_region(regions, offset, length))
		__atomic_fetch_add(&pu_region_of(regions, offset)->ended, 1, __ATOMIC_SEQ_CST);
	else
		pu_regions_end_slowly(regions, offset, length);
}

/* Keeps new requests out of a region, or of none. */
void pu_regions_block(struct pu_regions *regions, uint64_t region);
bool pu_regions_are_drained(const struct pu_regions *regions, uint64_t region);
/* How many requests have begun in it; wraps around. */
uint32_t pu_regions_begun(const struct pu_regions *regions, uint64_t region);

#endif
