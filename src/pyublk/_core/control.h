/* SPDX-License-Identifier: MIT
 * Control commands, and what else may wait for a disk's requests, by a helper process.
 *
 * STOP_DEV and DEL_DEV wait, beyond the reach of signals, for requests that a server holds. The
 * kernel runs them in a worker of the submitting process, and a process cannot end before its
 * workers: a server that waits for its own device this way can never be killed. So another process
 * submits them: a small program (../_helper/), one for each process that has a disk or commands one. It
 * also deletes the disks of a server that ends without having done so.
 *
 * It is executed, not forked, so it has none of our memory. It is nobody's child but init's, so no
 * program meets it in a wait for its own children. The one who starts it is suspended until it runs,
 * as by vfork: nothing is copied, whatever memory we have.
 */
#ifndef PU_CONTROL_H
#define PU_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "protocol.h"

#define PU_CONTROL_KILLED INT32_MIN /* no errno: the helper ended, and what it was asked is not known */

struct pu_helper;

/* This process's helper, started by `program` if there is none; several users share it. `node` is the
 * control node, -1 for who has no commands. One that is killed is replaced, and the new one guards what
 * the old one did. 0 or -errno. */
int pu_helper_get(struct pu_helper **helper, const char *program, int node);
/* The last user's lets it end, once it has no device to guard; it does so at the latest after us. */
void pu_helper_put(struct pu_helper *helper);
/* Its pid; 0 while it could not be replaced. */
int pu_helper_pid(struct pu_helper *helper);
/* Whether it is of this process, not of one that forked it. */
bool pu_helper_is_ours(const struct pu_helper *helper);
/* Called by a thread of the core's own when the helper was killed, with the pid of the new one, or the
 * -errno that there is none; NULL: nobody. */
void pu_helper_tell(void (*killed)(int pid));

struct pu_control { /* one command */
	struct pu_helper *helper;
	struct pu_control *next;
	uint64_t id;
	uint32_t kind, cmd_op, flags, device, hang_ms;
	int memory; /* the caller's */
	uint64_t cookie;
	bool done;
	int32_t stage;
	int32_t result; /* or KILLED */
	uint8_t *buffer;
	size_t bytes;
};

/* Starts a command; ask->id is set here. `payload` (may be NULL) is copied to where the kernel reads it
 * and, afterwards, control->buffer has its answer. `memory` is a file that comes along, or -1.
 * 0 or -errno: without a helper, or a message to it. */
int pu_control_begin(struct pu_control *control, struct pu_helper *helper, struct pu_ask *ask,
		     const void *payload, size_t bytes, int memory);
/* 1: it has ended; 0: not within timeout_ms. */
int pu_control_wait(struct pu_control *control, int timeout_ms);
/* Calls off what has not ended. False: it is beyond signals, and the kernel goes on with it. */
bool pu_control_end(struct pu_control *control);

#endif
