/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "mirror.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SMALLEST_REGION (UINT64_C(1) << 20)
#define MOST_REGIONS (UINT64_C(1) << 16)

static uint32_t nr_legs(const struct pu_mirror *mirror)
{
	return mirror->layout->nr_files;
}

int pu_mirror_init(struct pu_mirror *mirror, struct pu_layout *layout, int64_t leg_timeout_ns)
{
	uint64_t bytes = SMALLEST_REGION;

	memset(mirror, 0, sizeof(*mirror));
	while ((layout->size - 1) / bytes >= MOST_REGIONS)
		bytes *= 2;
	mirror->layout = layout;
	mirror->region_bytes = bytes;
	mirror->blocked_region = PU_NO_REGION;
	mirror->leg_timeout_ns = leg_timeout_ns;
	mirror->bits.in_step = (uint16_t)((1u << layout->nr_files) - 1);
	mirror->regions = calloc(MOST_REGIONS, sizeof(*mirror->regions));
	return mirror->regions ? 0 : -ENOMEM;
}

void pu_mirror_destroy(struct pu_mirror *mirror)
{
	free(mirror->regions);
	mirror->regions = NULL;
}

static uint16_t with(uint16_t bits, uint32_t leg, bool set)
{
	return (uint16_t)(set ? bits | 1u << leg : bits & ~(1u << leg));
}

void pu_mirror_set_leg(struct pu_mirror *mirror, uint32_t leg, enum pu_leg_state state)
{
	struct pu_leg_bits bits = pu_mirror_leg_bits(mirror);

	bits.in_step = with(bits.in_step, leg, state == PU_LEG_SYNCED);
	bits.resync = with(bits.resync, leg, state == PU_LEG_RESYNC);
	__atomic_store(&mirror->bits, &bits, __ATOMIC_RELEASE);
}

uint32_t pu_mirror_orphans(const struct pu_mirror *mirror, uint32_t leg, bool before)
{
	uint32_t which = (pu_mirror_replaced(mirror, leg) + before) & 1;

	return __atomic_load_n(&mirror->legs[leg].orphans[which], __ATOMIC_ACQUIRE);
}

bool pu_mirror_fail_leg(struct pu_mirror *mirror, uint32_t leg, uint32_t file_generation)
{
	struct pu_leg_bits bits = pu_mirror_leg_bits(mirror);

	if (pu_mirror_leg_state(mirror, leg) == PU_LEG_FAILED || bits.in_step == 1u << leg ||
	    file_generation != pu_mirror_file_generation(mirror, leg))
		return false;
	bits.in_step = with(bits.in_step, leg, false);
	bits.resync = with(bits.resync, leg, false);
	bits.unrecorded = with(bits.unrecorded, leg, true);
	__atomic_store(&mirror->bits, &bits, __ATOMIC_RELEASE);
	return true;
}

void pu_mirror_set_recorded(struct pu_mirror *mirror)
{
	struct pu_leg_bits bits = pu_mirror_leg_bits(mirror);

	bits.unrecorded = 0;
	__atomic_store(&mirror->bits, &bits, __ATOMIC_RELEASE);
}

void pu_mirror_replace_file(struct pu_mirror *mirror, uint32_t leg, int fd, bool memory, bool device,
			    uint32_t file_generation)
{
	pu_layout_set_file(mirror->layout, leg, fd, memory, device);
	if (file_generation != pu_mirror_file_generation(mirror, leg))
		__atomic_fetch_add(&mirror->legs[leg].replaced, 1, __ATOMIC_RELEASE);
	__atomic_store_n(&mirror->legs[leg].file_generation, file_generation, __ATOMIC_RELEASE);
	pu_layout_publish_files(mirror->layout); /* who sees it sees the generation */
}

int pu_mirror_readable(const struct pu_mirror *mirror, uint64_t offset, uint32_t without)
{
	/* Neighbours from the same leg: it may read ahead. */
	uint32_t start = (uint32_t)(offset / mirror->region_bytes % nr_legs(mirror));

	for (uint32_t i = 0; i < nr_legs(mirror); i++) {
		uint32_t leg = (start + i) % nr_legs(mirror);

		if (!(without & 1u << leg) && pu_mirror_leg_state(mirror, leg) == PU_LEG_SYNCED)
			return (int)leg;
	}
	return -1;
}

/* One that has grown has more regions than counters: those that share them are blocked together. */
static struct pu_region *counters_of(const struct pu_mirror *mirror, uint64_t region)
{
	return &mirror->regions[region % MOST_REGIONS];
}

static uint64_t last_region(const struct pu_mirror *mirror, uint64_t offset, uint64_t length)
{
	return (offset + (length ? length : 1) - 1) / mirror->region_bytes;
}

bool pu_mirror_write_begins(struct pu_mirror *mirror, uint64_t offset, uint64_t length)
{
	uint64_t first = offset / mirror->region_bytes, last = last_region(mirror, offset, length);
	uint64_t blocked;

	for (uint64_t region = first; region <= last; region++)
		__atomic_fetch_add(&counters_of(mirror, region)->begun, 1, __ATOMIC_SEQ_CST);
	/* After it is counted: who blocks the region now will see it, or it sees that. */
	blocked = __atomic_load_n(&mirror->blocked_region, __ATOMIC_SEQ_CST);
	if (blocked == PU_NO_REGION)
		return true;
	for (uint64_t region = first; region <= last; region++) {
		if (counters_of(mirror, region) != counters_of(mirror, blocked))
			continue;
		pu_mirror_write_ends(mirror, offset, length);
		return false;
	}
	return true;
}

void pu_mirror_write_ends(struct pu_mirror *mirror, uint64_t offset, uint64_t length)
{
	uint64_t last = last_region(mirror, offset, length);

	for (uint64_t region = offset / mirror->region_bytes; region <= last; region++)
		__atomic_fetch_add(&counters_of(mirror, region)->ended, 1, __ATOMIC_SEQ_CST);
}

void pu_mirror_block_writes(struct pu_mirror *mirror, uint64_t region)
{
	__atomic_store_n(&mirror->blocked_region, region, __ATOMIC_SEQ_CST);
}

bool pu_mirror_is_drained(const struct pu_mirror *mirror, uint64_t region)
{
	const struct pu_region *r = counters_of(mirror, region);
	uint32_t ended = __atomic_load_n(&r->ended, __ATOMIC_SEQ_CST);

	return ended == __atomic_load_n(&r->begun, __ATOMIC_SEQ_CST);
}
