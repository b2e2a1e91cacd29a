/* SPDX-License-Identifier: MIT
 * Waking the owner of a ring that sleeps in it, from other threads
 *
 * By a futex, which the ring waits for (Linux 6.7): a descriptor for each queue would be a third of
 * what a disk has. By an eventfd, which the ring reads, where that is not to be had.
 */
#ifndef PU_WAKE_H
#define PU_WAKE_H

#include <stdbool.h>
#include <stdint.h>

#include "ring.h"

struct pu_wake {
	uint32_t calls; /* the futex */
	int fd;		/* -1: by the futex */
	uint64_t value; /* read from fd */
	bool closed;
};

/* `ring`: whose owner is woken; NULL: it polls wake->fd. 0 or -errno. */
int pu_wake_open(struct pu_wake *wake, const struct pu_ring *ring);
void pu_wake_close(struct pu_wake *wake);
/* The next call ends an entry of that user_data. Owner thread only. 0 or -EAGAIN: no entry. */
int pu_wake_arm(struct pu_wake *wake, struct pu_ring *ring, uint64_t user_data);
/* [any thread], none of which may be about to close it. */
void pu_wake_call(struct pu_wake *wake);

#endif
