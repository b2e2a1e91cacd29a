/* SPDX-License-Identifier: MIT
 * What sectors of a disk held when they were seen first: for reads that return it again
 */
#ifndef PU_PAST_H
#define PU_PAST_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define PU_PAST_SECTORS (UINT32_C(1) << 16) /* what is remembered at most: 32 MiB */

struct pu_past {
	pthread_mutex_t lock;
	uint64_t *numbers; /* 1 + that of a sector, at its place or one of the next; 0: free */
	uint8_t *bytes;	   /* of the places; memory that is not used yet takes none */
	uint32_t used;
};

/* NULL: no memory. */
struct pu_past *pu_past_new(void);
void pu_past_free(struct pu_past *past);

/* Remembers sectors that are not known yet, as long as there is room. */
void pu_past_see(struct pu_past *past, uint64_t sector, const uint8_t *data, uint32_t count);
/* Puts what is remembered in the place of `data`, and remembers what is not known yet. */
void pu_past_show(struct pu_past *past, uint64_t sector, uint8_t *data, uint32_t count);

#endif
