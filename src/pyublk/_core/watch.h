/* SPDX-License-Identifier: MIT
 * Whether somebody keeps Python's GIL. Whoever has it and waits for one of this process's own disks,
 * such as by a page fault in a mapping of it, waits for a thread that needs it to serve the disk, and
 * all of Python stands still. So one thread takes the GIL now and then, and another one, which never
 * needs it, says on standard error when that takes too long.
 */
#ifndef PU_WATCH_H
#define PU_WATCH_H

#include <stdbool.h>
#include <stdint.h>

#define PU_WATCH_LOOKS 2 /* after the first, at which a wait is told of */
extern unsigned int pu_watch_seconds; /* between two looks */

struct pu_queue;

struct pu_watch {
	const struct pu_queue *queue;
	unsigned int disk;
	int thread;
	int process; /* 0: not watched */
	struct pu_watch *next, *previous;
};

/* From now on the queue is one that the calling thread serves in Python, until pu_watch_end.
 * take_gil takes the GIL and lets go of it. Where no thread can be had, nobody looks. */
void pu_watch_begin(struct pu_watch *watch, const struct pu_queue *q, void (*take_gil)(void));
void pu_watch_end(struct pu_watch *watch);
/* Python ends, and its GIL with it. */
void pu_watch_stop(void);

/* What the two threads do each time. */
void pu_watch_probe(void);
bool pu_watch_look(int fd); /* whether it told of a wait, on fd */

#endif
