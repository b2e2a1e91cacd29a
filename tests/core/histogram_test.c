/* SPDX-License-Identifier: MIT
 * The arithmetic of the histogram's buckets.
 */
#define _GNU_SOURCE
#include "histogram.h"

#include <string.h>

#include "check.h"
#include "ublk.h"

static void the_first_nanoseconds_have_a_bucket_each(void)
{
	for (int64_t ns = 0; ns < 8; ns++) {
		CHECK_EQUAL(pu_histogram_bucket(ns), ns);
		CHECK_EQUAL(pu_histogram_bound((uint32_t)ns), ns + 1);
	}
}

static void buckets_follow_on_each_other(void)
{
	uint64_t first = 0;

	for (uint32_t bucket = 0; bucket < 244; bucket++) { /* up to where signed numbers end */
		uint64_t beyond = pu_histogram_bound(bucket);

		CHECK(beyond > first);
		CHECK_EQUAL(pu_histogram_bucket((int64_t)first), bucket);
		CHECK_EQUAL(pu_histogram_bucket((int64_t)(beyond - 1)), bucket);
		CHECK((beyond - first - 1) * 4 <= first || first < 4);
		first = beyond;
	}
}

static void no_time_is_beyond_the_table(void)
{
	CHECK(pu_histogram_bucket(INT64_MAX) < PU_BUCKETS);
	CHECK_EQUAL(pu_histogram_bucket(-1), 0);
	CHECK_EQUAL(pu_histogram_bucket(INT64_MIN), 0);
	CHECK(pu_histogram_bound(251) == UINT64_MAX);
	CHECK(pu_histogram_bound(255) == UINT64_MAX);
	CHECK_EQUAL(pu_histogram_bound(243), UINT64_C(1) << 62);
}

static void operations_have_their_own(void)
{
	static const uint8_t own[] = { PU_OP_READ, PU_OP_WRITE, PU_OP_FLUSH, PU_OP_DISCARD,
				       PU_OP_WRITE_ZEROES };

	for (uint32_t i = 0; i < sizeof(own); i++) {
		CHECK(pu_operations[own[i]] != PU_OTHERS);
		for (uint32_t j = 0; j < i; j++)
			CHECK(pu_operations[own[i]] != pu_operations[own[j]]);
	}
	CHECK_EQUAL(pu_operations[PU_OP_ZONE_APPEND], PU_OTHERS);
	CHECK_EQUAL(pu_operations[PU_OP_COUNT - 1], PU_OTHERS);
}

static void what_is_read_is_added_up(void)
{
	static struct pu_histogram one, sum;

	pu_histogram_add(&one, PU_WRITES, pu_histogram_bucket(1000), 1000, 3);
	pu_histogram_add(&one, PU_WRITES, pu_histogram_bucket(2000), 2000, 1);
	pu_histogram_read(&one, &sum);
	pu_histogram_read(&one, &sum);
	CHECK_EQUAL(sum.total_ns[PU_WRITES], 10000);
	CHECK_EQUAL(sum.counts[PU_WRITES][pu_histogram_bucket(1000)], 6);
	CHECK_EQUAL(sum.counts[PU_WRITES][pu_histogram_bucket(2000)], 2);
	CHECK_EQUAL(sum.counts[PU_READS][pu_histogram_bucket(1000)], 0);
}

int main(void)
{
	the_first_nanoseconds_have_a_bucket_each();
	buckets_follow_on_each_other();
	no_time_is_beyond_the_table();
	operations_have_their_own();
	what_is_read_is_added_up();
	return 0;
}
