/* SPDX-License-Identifier: MIT
 * Which file a part of a request goes to, and what its end means for the request
 *
 * mapped.c serves requests, and leaves these decisions to a policy, of which it knows nothing else.
 * The simplest one (direct.c) takes each byte where the layout has it. Functions may be NULL where
 * nothing is to be decided. All are called by the thread that serves the queue.
 */
#ifndef PU_POLICY_H
#define PU_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

struct pu_mapped;
struct pu_slot;

struct pu_policy_functions {
	/* Makes and frees what the policy keeps for a queue (m->own). 0 or -errno. */
	int (*open)(struct pu_mapped *m);
	void (*close)(struct pu_mapped *m);

	/* A request is there. False: not yet; it is asked for again with every turn. */
	bool (*admit)(struct pu_mapped *m, uint16_t tag);
	/* It begins once more, since its first way turned out not to go. */
	void (*begin_again)(struct pu_mapped *m, uint16_t tag);
	/* The next part to operate on, after w->cut. */
	enum pu_cut (*next_part)(struct pu_mapped *m, uint16_t tag, struct pu_part *part);
	/* An operation of a part begins. */
	void (*operate)(struct pu_mapped *m, struct pu_slot *slot);
	/* A part has ended: 0 or -errno. It may ask for others (pu_work_proceed). The slot is free
	 * already: what is wanted of it is to be read first. */
	void (*part_ended)(struct pu_mapped *m, struct pu_slot *slot, int64_t result);
	/* An operation has ended that was abandoned (pu_slot_abandon). */
	void (*orphan_ended)(struct pu_mapped *m, struct pu_slot *slot);
	/* All parts have ended. To be answered (pu_work_finish) now or, with w->held, later. */
	void (*answer)(struct pu_mapped *m, uint16_t tag);
	/* It is about to be answered. */
	void (*finished)(struct pu_mapped *m, uint16_t tag);

	/* Every m->look_every_ns, if it has set that: for operations that take too long. */
	void (*look)(struct pu_mapped *m, int64_t now_ns);
};

struct pu_policy {
	const struct pu_policy_functions *functions;
	uint32_t slots_per_tag; /* what the operations of a request need at the same time */
};

#endif
