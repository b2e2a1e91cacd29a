/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "tag.h"

#include <time.h>

bool pu_tag_claim_unpinned(struct pu_tag *tag, uint32_t generation, uint32_t retries)
{
	while (pu_tag_holds(tag, generation)) {
		if (pu_tag_try_to_claim(tag, generation))
			return true;
		if (!retries--)
			return false;
		nanosleep(&(struct timespec){ 0, 50000 }, NULL);
	}
	return false;
}

bool pu_tag_pin(struct pu_tag *tag, uint32_t generation)
{
	uint64_t *life = &tag->life, seen = __atomic_load_n(life, __ATOMIC_RELAXED);

	do
		if ((seen & ~PU_PINS) != pu_life(PU_TAG_OWNED, generation))
			return false;
	while (!__atomic_compare_exchange_n(life, &seen, seen + PU_PIN, true, __ATOMIC_ACQ_REL,
					    __ATOMIC_RELAXED));
	return true;
}

void pu_tag_unpin(struct pu_tag *tag, uint32_t generation)
{
	uint64_t *life = &tag->life, seen = __atomic_load_n(life, __ATOMIC_RELAXED);

	do
		if ((seen & ~PU_PINS) != pu_life(PU_TAG_OWNED, generation))
			return; /* the queue was closed meanwhile */
	while (!__atomic_compare_exchange_n(life, &seen, seen - PU_PIN, true, __ATOMIC_ACQ_REL,
					    __ATOMIC_RELAXED));
}
