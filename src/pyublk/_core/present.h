/* SPDX-License-Identifier: MIT
 * Serving a disk by its presence map: the policy of its queues
 *
 * A read takes present blocks from the upper file and the others from the files below, run by run. A
 * write goes to the upper file. It holds the absent blocks that it touches (presence.h), copies what
 * it leaves out of the first and the last one up, and makes them present before it is answered. Discard
 * is write-zeroes: nobody sees again what is below.
 *
 * Where nobody has the bytes below in files, requests that need them wait, and the queue's thread
 * tells which blocks are to be fetched: those that it holds from then on, for who fetches them. Other
 * requests go on meanwhile.
 */
#ifndef PU_PRESENT_H
#define PU_PRESENT_H

#include "mapped.h"
#include "presence.h"

enum pu_wish_kind {
	PU_WISH_FETCH, /* of absent blocks, which are held: pu_presence_fail, let_go */
	PU_WISH_WRITE, /* to be allowed, or not: pu_presence_set_writable, pu_deferred_resolve */
};

struct pu_wish {
	enum pu_wish_kind kind;
	uint16_t tag;	     /* of the request, for a write */
	uint32_t generation;
	uint64_t first, end; /* blocks */
};

/* For pu_mapped_entries and pu_mapped_open. */
const struct pu_policy *pu_present(struct pu_presence *presence);

/* What the queue wants next; false: nothing. While there is something, to_tell is set. */
bool pu_present_next_wish(struct pu_mapped *m, struct pu_wish *wish);
/* Whether other queues are to be woken, since somebody there waits for blocks that were let go of
 * here; once. */
bool pu_present_take_wake(struct pu_mapped *m);

#endif
