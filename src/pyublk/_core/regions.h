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

/* Requests begun and ended in a region. */
struct pu_region {
	uint32_t begun, ended;
};

struct pu_regions {
	struct pu_region *counters;
	uint64_t bytes; /* of one region */
	uint64_t blocked; /* no request begins in it */
};

/* Of a disk of that size. 0 or -ENOMEM. */
int pu_regions_init(struct pu_regions *regions, uint64_t size);
void pu_regions_destroy(struct pu_regions *regions);

/* A request begins, unless it touches the blocked region (false). */
bool pu_regions_begin(struct pu_regions *regions, uint64_t offset, uint64_t length);
void pu_regions_end(struct pu_regions *regions, uint64_t offset, uint64_t length);
/* Keeps new requests out of a region, or of none. */
void pu_regions_block(struct pu_regions *regions, uint64_t region);
bool pu_regions_are_drained(const struct pu_regions *regions, uint64_t region);
/* How many requests have begun in it; wraps around. */
uint32_t pu_regions_begun(const struct pu_regions *regions, uint64_t region);

#endif
