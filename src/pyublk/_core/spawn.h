/* SPDX-License-Identifier: MIT
 * The start of the helper process.
 */
#ifndef PU_SPAWN_H
#define PU_SPAWN_H

/* Executes `program`: *sock is our end of what it listens to, *pidfd and *pid are its own. All are
 * closed by a forked child. 0 or -errno. */
int pu_spawn_helper(const char *program, int *sock, int *pidfd, int *pid);

#endif
