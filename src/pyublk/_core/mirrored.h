/* SPDX-License-Identifier: MIT
 * Serving a mirror: the policy of its queues
 *
 * Writes go to every leg that has not failed, a read to one in step, and to another when that one
 * fails. A request that noticed a failure is held until that is on record.
 */
#ifndef PU_MIRRORED_H
#define PU_MIRRORED_H

#include "mapped.h"
#include "mirror.h"

struct pu_leg_failure {
	uint32_t leg;
	uint32_t file_generation; /* of the leg, when it failed */
	int error; /* errno, positive; 0: a failure that is known is only to be put on record */
};

/* For pu_mapped_entries and pu_mapped_open. */
const struct pu_policy *pu_mirrored(struct pu_mirror *mirror);

/* The next leg that failed, to be given up (pu_mirror_fail_leg) and put on record; false: none.
 * While there is one, to_tell is set. */
bool pu_mirrored_next_failure(struct pu_mapped *m, struct pu_leg_failure *failure);
/* That was done, or tried, for all that were told: answers those who waited. While somebody does,
 * to_tell is set, too. */
void pu_mirrored_recorded(struct pu_mapped *m);

#endif
