/* SPDX-License-Identifier: MIT
 * The start of the helper process.
 */
#ifndef PU_SPAWN_H
#define PU_SPAWN_H

/* Executes `program`: *sock is our end of what it listens to, *pidfd and *pid are its own. All are
 * closed by a forked child. 0 or -errno. */
int pu_spawn_helper(const char *program, int *sock, int *pidfd, int *pid);

/* From now on another process, at the other end of `sock`, starts the helpers: this one is about to give
 * up the rights that they need. It is sent two descriptors, those that a helper is executed with, and
 * answers by an int32_t, the pid or -errno, and the pidfd. */
void pu_spawn_by(int sock);
/* What that process does: executes `program` as the helper of who has the pidfd `server`. 0 or -errno. */
int pu_spawn_helper_for(const char *program, int sock, int server, int *pidfd, int *pid);

#endif
