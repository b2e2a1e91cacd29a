/* SPDX-License-Identifier: MIT
 * Reader-writer locks over byte ranges. A range locks every shard it touches, always in ascending
 * order, so overlapping ranges exclude each other and nobody waits in a circle.
 */
#ifndef PU_LOCK_H
#define PU_LOCK_H

#include <pthread.h>
#include <stdint.h>

/* Of the lock of a disk's bytes. */
#define PU_LOCK_SHARDS 64u
#define PU_LOCK_GRANULE (UINT64_C(1) << 20)

struct pu_shard {
	pthread_rwlock_t lock;
} __attribute__((aligned(64))); /* a cache line each: neighbours must not slow each other down */

struct pu_lock {
	struct pu_shard *shards;
	unsigned count;
	uint64_t granule; /* bytes that share a shard */
};

int pu_lock_init(struct pu_lock *lock, unsigned shards, uint64_t granule);
void pu_lock_destroy(struct pu_lock *lock);
void pu_lock_read(struct pu_lock *lock, uint64_t offset, uint64_t length);
void pu_lock_write(struct pu_lock *lock, uint64_t offset, uint64_t length);
/* The range must be that of the lock call. */
void pu_lock_unlock(struct pu_lock *lock, uint64_t offset, uint64_t length);

#endif
