/* SPDX-License-Identifier: MIT
 * What a forked child must not keep: descriptors that would keep a dead server's disk alive.
 *
 * Its rings and descriptors of disks are let go of in the child before fork returns there. Whoever has
 * such a thing remembers the process that made it: in any other it is the parent's, and nothing may be
 * done with it. What it has mapped is not mapped here: something else may be there.
 */
#ifndef PU_FORKED_H
#define PU_FORKED_H

#include <stdint.h>

/* The process that runs, also after a fork; no system call. */
int pu_process(void);

/* No fork comes between the two: for opening a descriptor and adding it. */
void pu_fork_hold(void);
void pu_fork_release(void);
/* A forked child lets go of it at once; while forks are held. -1 is allowed. */
int pu_fork_add(int fd);
/* No longer, for it is about to be closed. */
void pu_fork_drop(int fd);

#endif
