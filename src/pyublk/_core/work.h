/* SPDX-License-Identifier: MIT
 * Requests while a mapped queue serves them: what mapped.c, the operations and the policies share
 */
#ifndef PU_WORK_H
#define PU_WORK_H

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
	uint64_t cut; /* by the policy: how much has been given to slots; 0: nothing */
	uint32_t op, flags;
	uint32_t generation; /* of the tag: another one is another request */
	uint32_t open; /* operations under way */
	uint8_t place;
	bool by_hand;	  /* its memory is to be unregistered */
	bool unregistered; /* its memory could not be registered */
	bool by_writing;  /* zeroes are written */
	bool queued;	  /* it is in `waiting`, or was failed from outside while it was */
	bool blocked;	  /* it is in `blocked` */
	bool held;	  /* by the policy, which answers it later */
	bool told;	  /* it was deferred, and somebody knows */
	int error;
	struct pu_extent *mapped_parts;
	uint32_t nr_mapped_parts, mapped_room;
};

/* Which of the files that were in the part's place has the operation, where a policy replaces them. */
struct pu_slot_file {
	uint32_t generation, replaced;
};

struct pu_slot {
	struct pu_part part;
	uint64_t done;
	uint64_t asked; /* bytes of the operation under way */
	uint8_t *memory; /* the tag's buffer when the part began (a later one may be another), or the
			  * policy's own */
	int64_t begun_ns; /* turn_ns when the operation was given to the ring, if the policy looks for that */
	struct pu_slot_file file;
	uint32_t next_free; /* 1 + its index; 0: the slot after this one. So those never used take no memory */
	uint32_t generation;
	uint16_t tag;
	uint8_t op;    /* what it does: the request's, unless the part is the policy's own */
	uint8_t place; /* where its data is, likewise */
	bool zeroes;   /* it writes zeroes */
	bool busy;
	bool orphan; /* nobody waits for it any more */
	bool punch;  /* the device did not take the discard as such */
};

/* user_data of a part's operation: its slot. */
#define PU_KIND_PART PU_KIND_OTHER

static inline bool pu_has_data(uint32_t op)
{
	return op == PU_OP_READ || op == PU_OP_WRITE;
}

/* A part has ended, or is abandoned: 0 or -errno. */
void pu_slot_end_part(struct pu_mapped *m, struct pu_slot *slot, int64_t result);
/* Nobody waits for the slot's operation any more: it keeps the memory that it may still read or
 * fill, and the request gets other memory. The part is still to be ended. False: it must be waited
 * for. */
bool pu_slot_abandon(struct pu_mapped *m, struct pu_slot *slot);
/* Gives what is left of a request to slots. */
void pu_work_proceed(struct pu_mapped *m, uint16_t tag);
/* Tells the client. */
void pu_work_finish(struct pu_mapped *m, uint16_t tag, int64_t result);

#endif
