/* SPDX-License-Identifier: MIT
 * A mirror: the same bytes in several files, its legs, of which it may lose all but one
 *
 * What is here is the disk's, and shared by its queues (mirrored.h): which legs are read and written,
 * and which region is being copied to a leg that is brought in step. It is changed by one thread at a
 * time, and read by every queue's.
 */
#ifndef PU_MIRROR_H
#define PU_MIRROR_H

#include "layout.h"
#include "policy.h"
#include "regions.h"

enum pu_leg_state {
	PU_LEG_SYNCED, /* read and written */
	PU_LEG_RESYNC, /* written, not yet read */
	PU_LEG_FAILED, /* left alone */
};

#define PU_MAX_LEGS 16u
/* Files of one leg that hold operations at the same time: it may be replaced while one hangs, but
 * not again when the next does. What they hold is bounded by that. */
#define PU_FILES_PER_LEG 2u

struct pu_leg {
	uint32_t file_generation; /* a number for its file: what one does is not charged to the next */
	uint32_t errors;      /* requests that failed on it */
	uint32_t replaced;    /* how often it has had another file */
	/* Operations that are still held, though nobody waits for them, by files that came when that
	 * was even and odd: the present one and the one before. */
	uint32_t orphans[2];
};

/* Legs by state, a bit for each; one word, so that nobody sees half of a change. */
struct pu_leg_bits {
	_Alignas(8) uint16_t in_step;
	uint16_t resync; /* those in neither have failed */
	uint16_t unrecorded; /* have failed, and a restart would not know */
	uint16_t unused;
};

struct pu_mirror {
	struct pu_policy policy; /* first: who has the policy has the mirror */
	struct pu_layout *layout;
	struct pu_leg legs[PU_MAX_LEGS];
	struct pu_leg_bits bits;
	struct pu_regions writes; /* and discards; the blocked region is copied to another leg */
	int64_t leg_timeout_ns; /* 0: a leg may take as long as it likes */
};

/* Of a layout that has every byte in every file, PU_MAX_LEGS at most. 0 or -ENOMEM. */
int pu_mirror_init(struct pu_mirror *mirror, struct pu_layout *layout, int64_t leg_timeout_ns);
void pu_mirror_destroy(struct pu_mirror *mirror);

static inline struct pu_leg_bits pu_mirror_leg_bits(const struct pu_mirror *mirror)
{
	struct pu_leg_bits bits;

	__atomic_load(&mirror->bits, &bits, __ATOMIC_ACQUIRE);
	return bits;
}

static inline enum pu_leg_state pu_mirror_leg_state(const struct pu_mirror *mirror, uint32_t leg)
{
	struct pu_leg_bits bits = pu_mirror_leg_bits(mirror);

	if (bits.in_step & 1u << leg)
		return PU_LEG_SYNCED;
	return bits.resync & 1u << leg ? PU_LEG_RESYNC : PU_LEG_FAILED;
}

void pu_mirror_set_leg(struct pu_mirror *mirror, uint32_t leg, enum pu_leg_state state);
/* Leaves a leg alone from now on. False when it had failed before, has a file of another generation
 * now, or is the last in step, which is never given up. */
bool pu_mirror_fail_leg(struct pu_mirror *mirror, uint32_t leg, uint32_t file_generation);
/* Every leg that has failed is on record. */
void pu_mirror_set_recorded(struct pu_mirror *mirror);

static inline uint32_t pu_mirror_file_generation(const struct pu_mirror *mirror, uint32_t leg)
{
	return __atomic_load_n(&mirror->legs[leg].file_generation, __ATOMIC_ACQUIRE);
}

/* How often a leg has had another file. */
static inline uint32_t pu_mirror_replaced(const struct pu_mirror *mirror, uint32_t leg)
{
	return __atomic_load_n(&mirror->legs[leg].replaced, __ATOMIC_ACQUIRE);
}

/* Orphans of a leg's file, or (`before`) of the one before. */
uint32_t pu_mirror_orphans(const struct pu_mirror *mirror, uint32_t leg, bool before);
/* The queues take it up with their next request. A file that was in the leg's place before, whenever,
 * has the generation that it had. */
void pu_mirror_replace_file(struct pu_mirror *mirror, uint32_t leg, int fd, bool memory, bool device,
			    uint32_t file_generation);

/* A leg to read `offset` from, not one of `without` (bits), or -1. */
int pu_mirror_readable(const struct pu_mirror *mirror, uint64_t offset, uint32_t without);

#endif
