/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "lock.h"

#include <errno.h>
#include <string.h>

#include "check.h"

#define SHARDS 4
#define GRANULE 10
#define BYTES 200

static struct pu_lock lock;
static unsigned char field[BYTES];

struct range {
	uint64_t offset, length;
};

/* Ranges that overlap, go round the shards, and cover all of them. */
static const struct range ranges[] = { { 0, 10 }, { 5, 10 }, { 35, 10 }, { 25, 30 }, { 0, 200 } };

static void *increment(void *argument)
{
	unsigned seed = (unsigned)(uintptr_t)argument;

	for (int i = 0; i < 2000; i++) {
		const struct range *r = &ranges[rand_r(&seed) % 5];

		if (i % 4) {
			pu_lock_write(&lock, r->offset, r->length);
			for (uint64_t at = 0; at < r->length; at++)
				field[r->offset + at]++;
		} else {
			unsigned char copy[BYTES];

			pu_lock_read(&lock, r->offset, r->length);
			memcpy(copy, field + r->offset, r->length);
			CHECK(!memcmp(copy, field + r->offset, r->length));
		}
		pu_lock_unlock(&lock, r->offset, r->length);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[4];
	unsigned total = 0;

	CHECK_EQUAL(pu_lock_init(&lock, 0, 1), -EINVAL);
	CHECK_EQUAL(pu_lock_init(&lock, SHARDS, 0), -EINVAL);
	CHECK_EQUAL(pu_lock_init(&lock, SHARDS, GRANULE), 0);
	/* nothing, and the whole address space */
	pu_lock_write(&lock, 3, 0);
	pu_lock_unlock(&lock, 3, 0);
	pu_lock_write(&lock, 0, UINT64_MAX);
	pu_lock_unlock(&lock, 0, UINT64_MAX);
	/* readers share, distant writers do not meet */
	pu_lock_read(&lock, 0, 10);
	pu_lock_read(&lock, 5, 4);
	pu_lock_write(&lock, 10, 10);
	pu_lock_unlock(&lock, 10, 10);
	pu_lock_unlock(&lock, 5, 4);
	pu_lock_unlock(&lock, 0, 10);
	for (uintptr_t i = 0; i < 4; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, increment, (void *)(i + 1)), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	/* a lost increment would show against a replay on one thread */
	unsigned char raced[BYTES];

	memcpy(raced, field, BYTES);
	memset(field, 0, BYTES);
	for (uintptr_t i = 0; i < 4; i++)
		increment((void *)(i + 1));
	CHECK(!memcmp(raced, field, BYTES));
	for (int i = 0; i < BYTES; i++)
		total += raced[i];
	CHECK(total);
	pu_lock_destroy(&lock);
	return 0;
}
