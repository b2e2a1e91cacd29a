/* SPDX-License-Identifier: MIT
 * Where a disk's bytes live: files, and which of their bytes are which of the disk's
 */
#ifndef PU_LAYOUT_H
#define PU_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pu_layout_kind {
	PU_LAYOUT_TABLE,   /* extents, one after the other */
	PU_LAYOUT_STRIPE,  /* chunks, in turn from every file */
	PU_LAYOUT_MIRROR,  /* the same in every file */
	PU_LAYOUT_PER_REQUEST, /* somebody says it for each request (pu_mapped_plan) */
};

struct pu_file {
	int fd;
	bool memory; /* its bytes are in memory: calls on it do not wait */
	bool device; /* a block device */
	uint8_t *map; /* of one in memory: its bytes; NULL: not mapped */
	uint64_t mapped;
};

struct pu_extent {
	uint64_t start; /* on the disk; all in bytes */
	uint64_t length;
	uint64_t offset; /* in the file */
	uint32_t file;
};

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

#define PU_NO_REGION UINT64_MAX

/* Writes begun and ended in a region of a mirror. */
struct pu_region {
	uint32_t begun, ended;
};

struct pu_layout {
	enum pu_layout_kind kind;
	uint64_t size;
	struct pu_file *files;
	uint32_t nr_files;
	uint32_t version; /* counts replaced files: queues that see a new one register them anew */
	struct pu_extent *extents;
	uint32_t nr_extents;
	uint64_t chunk;
	struct pu_leg legs[PU_MAX_LEGS];
	struct pu_leg_bits leg_bits; /* changed by one thread at a time, read by every queue */
	struct pu_region *regions;
	uint64_t region_bytes;
	uint64_t blocked_region; /* the one that is copied to another leg now: no write begins in it */
	int64_t leg_timeout_ns; /* 0: a leg may take as long as it likes */
};

/* A part of a request that is one contiguous range of one file. In the request's data it is
 * contiguous too, or (chunk > 0) cut into chunks that lie `stride` apart, the first one shorter. */
struct pu_part {
	uint32_t file;
	uint64_t offset; /* in the file */
	uint64_t length;
	uint64_t data;	 /* where it begins in the request's data */
	uint64_t first;	 /* bytes of the first chunk */
	uint64_t chunk, stride;
};

int pu_layout_init(struct pu_layout *layout, enum pu_layout_kind kind, uint64_t size,
		   uint32_t nr_files, uint32_t nr_extents);
void pu_layout_destroy(struct pu_layout *layout);

/* Gives it another size while queues use it: each request sees the old one or the new one. Of a table,
 * the last extent grows; what is cut off stays where it is. One thread at a time. -EINVAL: it cannot
 * have that size. */
int pu_layout_resize(struct pu_layout *layout, uint64_t size);
static inline uint64_t pu_layout_size(const struct pu_layout *layout)
{
	return __atomic_load_n(&layout->size, __ATOMIC_ACQUIRE);
}

/* Maps the files whose bytes are in memory: the kernel then copies between them and requests.
 * Nobody else may touch the mapping, which faults where a file was cut short. */
void pu_layout_map_memory(struct pu_layout *layout);
void pu_layout_unmap_memory(struct pu_layout *layout);
/* Whether all of a range is there: reading what is not would allocate it. */
bool pu_file_holds(const struct pu_file *file, uint64_t offset, uint64_t length);

/* The nth part of a range of the disk, for a table (where `at` is how far the parts before it
 * reached) or a stripe. False when there are no more. */
bool pu_layout_part(const struct pu_layout *layout, uint64_t offset, uint64_t length, uint32_t nth,
		    uint64_t at, struct pu_part *part);

/* Of a part: the place in the request's data of its byte `done`, and how many bytes lie there in
 * one piece. */
uint64_t pu_part_data(const struct pu_part *part, uint64_t done, uint64_t *contiguous);

struct pu_leg_bits pu_layout_leg_bits(const struct pu_layout *layout);
enum pu_leg_state pu_layout_leg(const struct pu_layout *layout, uint32_t leg);
void pu_layout_set_leg(struct pu_layout *layout, uint32_t leg, enum pu_leg_state state);
/* Leaves a leg alone from now on. False when it had failed before, is of another file_generation now, or
 * is the last in step, which is never given up. */
bool pu_layout_fail_leg(struct pu_layout *layout, uint32_t leg, uint32_t file_generation);
uint32_t pu_layout_incarnation(const struct pu_layout *layout, uint32_t leg);
/* How often a leg has had another file. */
uint32_t pu_layout_replaced(const struct pu_layout *layout, uint32_t leg);
/* Orphans of a leg's file, or (`before`) of the one before. */
uint32_t pu_layout_orphans(const struct pu_layout *layout, uint32_t leg, bool before);
/* Every leg that has failed is on record. */
void pu_layout_recorded(struct pu_layout *layout);
/* The queues take it up with their next request. `file_generation`: of the leg; a file that was in its
 * place before, whenever, has the number that it had. */
void pu_layout_replace_file(struct pu_layout *layout, uint32_t index, int fd, bool memory,
			    bool device, uint32_t file_generation);

static inline uint32_t pu_layout_version(const struct pu_layout *layout)
{
	return __atomic_load_n(&layout->version, __ATOMIC_ACQUIRE);
}

/* A leg to read `offset` from, not one of `without` (bits), or -1. */
int pu_layout_readable(const struct pu_layout *layout, uint64_t offset, uint32_t without);

/* A write (or discard) of a mirror begins, unless it touches the blocked region (false). */
bool pu_layout_write_begins(struct pu_layout *layout, uint64_t offset, uint64_t length);
void pu_layout_write_ends(struct pu_layout *layout, uint64_t offset, uint64_t length);
/* Keeps new writes out of a region, or of none; it may be copied once it is drained. */
void pu_layout_block_writes(struct pu_layout *layout, uint64_t region);
bool pu_layout_is_drained(const struct pu_layout *layout, uint64_t region);

#endif
