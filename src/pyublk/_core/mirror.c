/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "mirror.h"

#include <string.h>

int pu_mirror_init(struct pu_mirror *mirror, struct pu_layout *layout, int64_t leg_timeout_ns)
{
	memset(mirror, 0, sizeof(*mirror));
	mirror->layout = layout;
	mirror->leg_timeout_ns = leg_timeout_ns;
	mirror->bits.in_step = (uint16_t)((1u << layout->nr_files) - 1);
	return pu_regions_init(&mirror->writes, layout->size);
}

void pu_mirror_destroy(struct pu_mirror *mirror)
{
	pu_regions_destroy(&mirror->writes);
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
	uint32_t first = (uint32_t)(offset / mirror->writes.bytes % mirror->layout->nr_files);
	uint32_t legs = pu_mirror_leg_bits(mirror).in_step & ~without;
	uint32_t from_first = legs >> first << first;

	return legs ? __builtin_ctz(from_first ? from_first : legs) : -1;
}
