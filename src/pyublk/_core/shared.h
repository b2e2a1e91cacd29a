/* SPDX-License-Identifier: MIT
 * Memory that the server shares with clients: where the kernel's numbers for it lead
 *
 * A request that lies in such memory (PU_FLAG_SHMEM_ZC) carries a buffer's index and a byte in it,
 * and the kernel copies nothing. The kernel knows a new buffer before its registration returns, so a
 * request may name one that is not in the table yet: while `changing` is set, it will be.
 */
#ifndef PU_SHARED_H
#define PU_SHARED_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define PU_SHARED_BUFFERS 65536u

struct pu_shared_buffer {
	uint8_t *address; /* NULL: no such buffer */
	uint64_t length;
};

struct pu_shared {
	uint32_t changing; /* a buffer is being registered, or unregistered */
	struct pu_shared_buffer buffers[PU_SHARED_BUFFERS];
};

/* Where the `length` bytes are that a request's `addr` names, or NULL. [any thread] */
static inline void *pu_shared_find(const struct pu_shared *shared, uint64_t addr, uint64_t length)
{
	const struct pu_shared_buffer *buffer = &shared->buffers[addr >> 32 & (PU_SHARED_BUFFERS - 1)];
	uint64_t at = addr & UINT32_MAX;

	for (;;) {
		/* In this order: once a change is over, what it put there is seen. */
		uint32_t changing = __atomic_load_n(&shared->changing, __ATOMIC_ACQUIRE);
		uint8_t *address = __atomic_load_n(&buffer->address, __ATOMIC_ACQUIRE);

		if (address)
			return at <= buffer->length && length <= buffer->length - at ? address + at : NULL;
		if (!changing)
			return NULL;
		nanosleep(&(struct timespec){ 0, 100000 }, NULL);
	}
}

static inline void pu_shared_put(struct pu_shared *shared, uint16_t index, uint8_t *address,
				 uint64_t length)
{
	shared->buffers[index].length = length;
	__atomic_store_n(&shared->buffers[index].address, address, __ATOMIC_RELEASE);
}

static inline void pu_shared_change(struct pu_shared *shared, uint32_t changing)
{
	__atomic_store_n(&shared->changing, changing, __ATOMIC_RELEASE);
}

#endif
