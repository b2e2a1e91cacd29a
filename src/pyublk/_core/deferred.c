/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "deferred.h"

#include "work.h"

#define RESOLVED (UINT64_C(1) << 31)

void pu_defer(struct pu_mapped *m, uint16_t tag)
{
	m->works[tag].held = true;
	m->works[tag].told = false;
	m->nr_deferred++;
	m->to_tell = true;
}

bool pu_deferred_next(struct pu_mapped *m, uint16_t *tag)
{
	for (uint16_t i = 0; m->nr_deferred && i < m->q->depth; i++) {
		struct pu_work *w = &m->works[i];

		if (!w->held || w->told)
			continue;
		m->nr_deferred--;
		w->told = true;
		*tag = i;
		return true;
	}
	m->nr_deferred = 0;
	return false;
}

void pu_deferred_resolve(struct pu_mapped *m, uint16_t tag, uint32_t generation, int result)
{
	uint64_t outcome = (uint64_t)generation << 32 | RESOLVED | (uint32_t)-result;

	__atomic_store_n(&m->outcomes[tag], outcome, __ATOMIC_RELEASE);
	__atomic_store_n(&m->resolved, true, __ATOMIC_SEQ_CST);
}

bool pu_deferred_outcome(struct pu_mapped *m, uint16_t tag, int *result)
{
	uint64_t outcome = __atomic_load_n(&m->outcomes[tag], __ATOMIC_ACQUIRE);

	if (outcome >> 32 != m->works[tag].generation || !(outcome & RESOLVED))
		return false;
	*result = -(int)(outcome & (RESOLVED - 1));
	__atomic_store_n(&m->outcomes[tag], 0, __ATOMIC_RELAXED);
	return true;
}
