/* SPDX-License-Identifier: MIT
 * How long requests took: for each kind of operation, counters of log-linear buckets
 *
 * Four steps for each power of two of nanoseconds, so a bucket's bounds are at most 25 % apart. The
 * buckets are fixed, and there is nothing to allocate: a page of them is the kernel's until the first
 * request that needs it. One thread writes, any reads.
 */
#ifndef PU_HISTOGRAM_H
#define PU_HISTOGRAM_H

#include <stdint.h>

enum pu_kind_of_operation {
	PU_OTHERS, /* of zones */
	PU_READS,
	PU_WRITES,
	PU_FLUSHES,
	PU_DISCARDS,
	PU_WRITES_OF_ZEROES,
	PU_OPERATIONS,
};

#define PU_STEPS_SHIFT 2 /* four linear steps */
#define PU_BUCKETS 256u	 /* of which the last four stay empty: there is no 65th bit */

struct pu_histogram {
	uint64_t total_ns[PU_OPERATIONS];
	uint64_t counts[PU_OPERATIONS][PU_BUCKETS];
};

/* By number of an operation, below PU_OP_COUNT. */
extern const uint8_t pu_operations[];

/* A clock that was set between two readings is none of ours, but no reason to write elsewhere. */
static inline uint32_t pu_histogram_bucket(int64_t ns)
{
	uint64_t value = ns > 0 ? (uint64_t)ns : 0;
	uint32_t exponent = 63u - PU_STEPS_SHIFT -
			    (uint32_t)__builtin_clzll(value | 1u << PU_STEPS_SHIFT);

	return (exponent << PU_STEPS_SHIFT) + (uint32_t)(value >> exponent);
}

/* The first nanosecond that is beyond a bucket. 2^64 - 1, when none is. */
uint64_t pu_histogram_bound(uint32_t bucket);

static inline void pu_histogram_add(struct pu_histogram *h, uint32_t operation, uint32_t bucket,
				    int64_t ns, uint64_t requests)
{
	uint64_t *count = &h->counts[operation][bucket], *total = &h->total_ns[operation];

	__atomic_store_n(count, *count + requests, __ATOMIC_RELAXED);
	__atomic_store_n(total, *total + requests * (uint64_t)ns, __ATOMIC_RELAXED);
}

/* Adds what `from` has so far. [any thread] */
void pu_histogram_read(const struct pu_histogram *from, struct pu_histogram *sum);

#endif
