/* SPDX-License-Identifier: MIT
 * Many queues of one thread, which sleeps until one of them has something
 *
 * Each queue keeps its ring. Its ring tells an eventfd of completions, which this one's ring reads:
 * one entry for each time that a queue has slept, none while it is busy. The eventfds have no numbers:
 * they are in the ring's table of files.
 *
 * One thread owns a set, and all of its queues.
 */
#ifndef PU_SET_H
#define PU_SET_H

#include "queue.h"

struct pu_member {
	struct pu_queue *queue; /* NULL: the place is free */
	uint64_t events;
	bool armed; /* the ring reads its eventfd */
	bool due;   /* it is in `ready` */
};

struct pu_set {
	struct pu_ring ring;
	struct pu_wake wake; /* pu_set_wake */
	struct pu_member *members;
	uint32_t room; /* of `members`, and of the ring's table */
	uint32_t used; /* the first place after all that have been taken so far */
	uint32_t *ready; /* the places that the last wait brought */
	uint32_t nr_ready;
};

/* For at most `room` queues, or as many as the process may have files. 0 or -errno. */
int pu_set_open(struct pu_set *set, uint32_t room);
/* The queues are the caller's, to be closed before or after. */
void pu_set_close(struct pu_set *set);

/* Watches a queue of this thread, which may be fetched before or after, and brings it with the next
 * wait. Its place, or -ENOSPC, or another -errno. */
int pu_set_add(struct pu_set *set, struct pu_queue *q);
void pu_set_remove(struct pu_set *set, uint32_t place);

/* Waits until some queue has something, or somebody calls, at most timeout_ns. Returns how many are in
 * `ready`; 0 after a time-out, a signal, or a call; -errno. What a queue has is to be taken by its own
 * wait; where something is left, the next wait of the set brings it again, at once. */
int pu_set_wait(struct pu_set *set, int64_t timeout_ns);
/* Makes a wait return. [any thread] */
void pu_set_wake(struct pu_set *set);

#endif
