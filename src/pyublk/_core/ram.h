/* SPDX-License-Identifier: MIT
 * A disk in memory: sparse until written; discard and write-zeroes give pages back.
 *
 * The memory is of this process alone, or a file in memory (memfd), which whoever has a descriptor of it
 * keeps. Both are mapped. But whoever reads a hole of a mapped file fills it, so it is known which pages
 * there are, and of the others nothing is read.
 */
#ifndef PU_RAM_H
#define PU_RAM_H

#include "lock.h"

struct pu_ram {
	uint8_t *bytes;
	uint64_t size;
	int file;	/* our own descriptor; -1: none */
	uint8_t *there; /* a bit for each page of the file that is no hole, under the lock of its granule */
	struct pu_lock lock; /* keeps overlapping requests of different queues whole */
};

/* `file`: a file of that size, which stays the caller's; -1: none. 0 or -errno. */
int pu_ram_init(struct pu_ram *ram, uint64_t size, int file);
void pu_ram_destroy(struct pu_ram *ram);

/* A pu_handler; context is a struct pu_ram. */
int64_t pu_ram_handle(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
		      void *buffer);

/* Bytes that occupy memory now. */
uint64_t pu_ram_resident(struct pu_ram *ram);

#endif
