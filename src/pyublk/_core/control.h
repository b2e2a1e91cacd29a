/* SPDX-License-Identifier: MIT
 * Control commands, and what else may wait for a disk's requests, each by a child process that holds
 * nothing else.
 *
 * STOP_DEV and DEL_DEV wait, beyond the reach of signals, for requests that a server holds. The
 * kernel runs them in a worker of the submitting process, and a process cannot end before its
 * workers: a server that waits for its own device this way can never be killed. A child can be left
 * behind; when the server dies, the child's command ends and so does the child.
 */
#ifndef PU_CONTROL_H
#define PU_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ublk.h"

enum pu_control_stage { /* how far the child came: tells whose error `result` is */
	PU_CONTROL_STARTING,
	PU_CONTROL_RING,   /* io_uring_setup refused */
	PU_CONTROL_SUBMIT, /* io_uring_enter refused */
	PU_CONTROL_DONE,   /* the command's own result */
};

#define PU_CONTROL_KILLED INT32_MIN /* no errno: the child ended, but not by itself */

struct pu_control_reply { /* shared with the child; the command's buffer follows */
	int32_t stage;
	int32_t result; /* KILLED until it is known */
	uint8_t buffer[];
};

struct pu_control {
	struct pu_control_reply *reply;
	size_t map_bytes;
	int pid;
	int pidfd;
};

/* Starts a command. cmd->addr and cmd->len are set here: `payload` (may be NULL) is copied to where
 * the kernel reads it and, afterwards, has written its answer (control->reply->buffer).
 * 0 or -errno. */
int pu_control_begin(struct pu_control *control, int ctl_fd, uint32_t cmd_op,
		     const struct pu_ctrl_cmd *cmd, const void *payload, size_t payload_bytes);
/* Starts writing `text` to a file of sysfs, such as the choice of a disk's I/O scheduler, which waits
 * beyond the reach of signals too. control->reply->result will be 0, -errno or KILLED. 0 or -errno. */
int pu_control_begin_write(struct pu_control *control, const char *path, const char *text);
/* 1: the child has ended; 0: not within timeout_ms; -errno (-EINTR). */
int pu_control_wait(struct pu_control *control, int timeout_ms);
/* Ends a child that still waits. False: it is beyond signals and was left behind. */
bool pu_control_end(struct pu_control *control);

/* A child that outlives this process and then deletes device `id`, if its server_flags still are
 * `cookie`. Returns its pidfd (*pid is its pid) or -errno. */
int pu_guard_start(int ctl_fd, uint32_t id, uint64_t cookie, int *pid);
void pu_guard_stop(int pidfd, int pid);

#endif
