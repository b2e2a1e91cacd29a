/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "histogram.h"

#include "ublk.h"

const uint8_t pu_operations[PU_OP_COUNT] = {
	[PU_OP_READ] = PU_READS,
	[PU_OP_WRITE] = PU_WRITES,
	[PU_OP_FLUSH] = PU_FLUSHES,
	[PU_OP_DISCARD] = PU_DISCARDS,
	[PU_OP_WRITE_ZEROES] = PU_WRITES_OF_ZEROES,
};

uint64_t pu_histogram_bound(uint32_t bucket)
{
	uint32_t steps = 1u << PU_STEPS_SHIFT, exponent, step;

	if (bucket < steps)
		return bucket + 1u;
	exponent = (bucket >> PU_STEPS_SHIFT) - 1;
	step = bucket % steps + steps + 1; /* beyond it */
	if (exponent > 61 || (exponent == 61 && step == 2 * steps))
		return UINT64_MAX;
	return (uint64_t)step << exponent;
}

void pu_histogram_read(const struct pu_histogram *from, struct pu_histogram *sum)
{
	const uint64_t *counters = (const uint64_t *)from;
	uint64_t *to = (uint64_t *)sum;

	for (uint32_t i = 0; i < sizeof(*from) / sizeof(*counters); i++)
		to[i] += __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
}
