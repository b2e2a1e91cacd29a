/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "lock.h"

#include <errno.h>
#include <stdlib.h>

int pu_lock_init(struct pu_lock *lock, unsigned shards, uint64_t granule)
{
	if (!shards || !granule)
		return -EINVAL;
	lock->shards = aligned_alloc(sizeof(*lock->shards), shards * sizeof(*lock->shards));
	if (!lock->shards)
		return -ENOMEM;
	lock->count = shards;
	lock->granule = granule;
	for (unsigned i = 0; i < shards; i++)
		pthread_rwlock_init(&lock->shards[i].lock, NULL);
	return 0;
}

void pu_lock_destroy(struct pu_lock *lock)
{
	for (unsigned i = 0; i < lock->count; i++)
		pthread_rwlock_destroy(&lock->shards[i].lock);
	free(lock->shards);
	lock->shards = NULL;
	lock->count = 0;
}

/* A range touches the shards first..last, going round past the end when last < first. */
struct touched {
	unsigned first, last;
};

static struct touched shards_of(const struct pu_lock *lock, uint64_t offset, uint64_t length)
{
	uint64_t first = offset / lock->granule, last = (offset + length - 1) / lock->granule;

	if (last - first >= lock->count - 1)
		return (struct touched){ 0, lock->count - 1 };
	return (struct touched){ (unsigned)(first % lock->count), (unsigned)(last % lock->count) };
}

typedef int (*rwlock_call)(pthread_rwlock_t *);

static void for_each(struct pu_lock *lock, uint64_t offset, uint64_t length, rwlock_call call)
{
	struct touched range;

	if (!length)
		return;
	range = shards_of(lock, offset, length);
	if (range.first <= range.last) {
		for (unsigned i = range.first; i <= range.last; i++)
			call(&lock->shards[i].lock);
		return;
	}
	for (unsigned i = 0; i <= range.last; i++)
		call(&lock->shards[i].lock);
	for (unsigned i = range.first; i < lock->count; i++)
		call(&lock->shards[i].lock);
}

void pu_lock_read(struct pu_lock *lock, uint64_t offset, uint64_t length)
{
	for_each(lock, offset, length, pthread_rwlock_rdlock);
}

void pu_lock_write(struct pu_lock *lock, uint64_t offset, uint64_t length)
{
	for_each(lock, offset, length, pthread_rwlock_wrlock);
}

void pu_lock_unlock(struct pu_lock *lock, uint64_t offset, uint64_t length)
{
	for_each(lock, offset, length, pthread_rwlock_unlock);
}
