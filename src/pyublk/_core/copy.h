/* SPDX-License-Identifier: MIT
 * A request's data, copied by the server
 *
 * With user copy the char device is read and written for it; else it is in the tag's buffer, or in
 * memory that is shared with the client. From any thread.
 */
#ifndef PU_COPY_H
#define PU_COPY_H

#include "queue.h"

/* Copies `length` bytes at byte `at` of a request's data: a write's into `memory`, a read's out of
 * it. `where`: 0, or PU_USER_COPY_INTEGRITY for its metadata. 0 or -errno; -ESTALE when the request
 * of that generation is answered already. */
int pu_queue_copy(struct pu_queue *q, uint16_t tag, uint32_t generation, void *memory, uint64_t at,
		  uint64_t length, uint64_t where);
/* The bytes of a request in memory shared with the client (PU_FLAG_SHMEM_ZC), or NULL. */
void *pu_queue_shared(const struct pu_queue *q, uint16_t tag);
/* User copy: brings a write's data into the tag's buffer, once. 0 or -errno, as above. */
int pu_queue_fill_buffer(struct pu_queue *q, uint16_t tag, uint32_t generation);

#endif
