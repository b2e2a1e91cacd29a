/* SPDX-License-Identifier: MIT
 * Requests while a mapped queue serves them: what mapped.c and mirror.c share, and nobody else
 */
#ifndef PU_WORK_H
#define PU_WORK_H

#include <time.h>

#include "mapped.h"

/* Where a request's data is while it is served. */
enum place {
	IN_BUFFER,     /* the tag's, where the kernel copied or will copy it */
	IN_USER_COPY,  /* the tag's: we copy */
	IN_FILES,      /* in mapped files: the kernel copies from and to the request */
	IN_REGISTERED, /* the request's own memory, registered under the tag's number */
	IN_SHARED,     /* in memory that is shared with the client: the request's own, too */
};

struct pu_work {
	uint64_t offset, length;
	uint64_t cut; /* bytes (or, of a stripe or mirror, parts) that have been given to slots */
	uint32_t op, flags;
	uint32_t generation; /* of the tag: another one is another request */
	uint32_t open; /* operations under way */
	uint8_t place;
	bool by_hand;	  /* its memory is to be unregistered */
	bool unregistered; /* its memory could not be registered */
	bool by_writing;  /* zeroes are written */
	bool queued;	  /* it is in `waiting`, or was failed from outside while it was */
	bool blocked;	  /* it is in `blocked` */
	bool writes_mirror; /* counted in the layout's regions */
	int error;
	uint32_t good_legs, bad_legs; /* bits */
	uint32_t told; /* bits: it is held until these legs' failures are on record */
	struct pu_extent *mapped_parts;
	uint32_t nr_mapped_parts, mapped_room;
};

struct pu_slot {
	struct pu_part part;
	uint64_t done;
	uint64_t asked; /* bytes of the operation under way */
	uint8_t *memory; /* the tag's buffer when the part began: a later one may be another */
	int64_t begun_ns;
	uint32_t next_free;
	uint32_t generation;
	uint32_t file_generation, replaced; /* of the leg */
	uint16_t tag;
	bool busy;
	bool orphan; /* nobody waits for it any more */
	bool punch;  /* the device did not take the discard as such */
};

static inline int64_t pu_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline bool pu_has_data(uint32_t op)
{
	return op == PU_OP_READ || op == PU_OP_WRITE;
}

/* A slot for a part of the tag's request, which has one operation more under way then; NULL when
 * none is free: the request is to wait for one. */
struct pu_slot *pu_slot_take(struct pu_mapped *m, uint16_t tag, const struct pu_part *part);
void pu_slot_free(struct pu_mapped *m, struct pu_slot *slot);
void pu_work_wait_for_slots(struct pu_mapped *m, uint16_t tag);

/* Begins, or continues, the operation of a slot. */
void pu_slot_operate(struct pu_mapped *m, struct pu_slot *slot);
/* A part of the tag's request in that file has ended: 0 or -errno. `file_generation`: of a leg. */
void pu_work_part_ends(struct pu_mapped *m, uint16_t tag, uint32_t file, uint32_t file_generation,
		       int64_t result);
/* One operation less is under way: answers when it was the last. */
void pu_work_release(struct pu_mapped *m, uint16_t tag);
/* Gives what is left of a request to slots. */
void pu_work_proceed(struct pu_mapped *m, uint16_t tag);
/* Tells the client. */
void pu_work_finish(struct pu_mapped *m, uint16_t tag, int64_t result);

/* ---- mirrors (mirror.c) ---- */

/* The next leg for a write, discard or flush, from `nth` on; false: no more. */
bool pu_mirror_next_leg(const struct pu_layout *layout, uint64_t *nth);
/* Reads from a leg, another one than those that have failed the request. */
void pu_mirror_read(struct pu_mapped *m, uint16_t tag);
void pu_mirror_leg_ends(struct pu_mapped *m, uint16_t tag, uint32_t leg, uint32_t file_generation,
			int64_t result);
/* Every leg has ended: the client is told, or waits until failures are on record. */
void pu_mirror_answer(struct pu_mapped *m, uint16_t tag);
/* Gives up what legs have held for too long, where the request can do without. */
void pu_mirror_look_for_hanging(struct pu_mapped *m);
/* One of these has ended after all. */
void pu_mirror_orphan_ends(struct pu_mapped *m, struct pu_slot *slot);

#endif
