/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef __WALL
#define __WALL 0x40000000
#endif

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif

/* ---- in the child: system calls only, no lock of the C library may be taken ---- */

static void keep_only(int a, int b)
{
	unsigned low = (unsigned)(a < b ? a : b), high = (unsigned)(a < b ? b : a);

	if (low > 0)
		syscall(SYS_close_range, 0u, low - 1, 0u);
	if (high > low + 1)
		syscall(SYS_close_range, low + 1, high - 1, 0u);
	syscall(SYS_close_range, high + 1, ~0u, 0u);
}

static int run_command(int ctl_fd, uint32_t cmd_op, const struct pu_ctrl_cmd *cmd,
		       volatile int32_t *stage)
{
	struct pu_ring ring;
	struct pu_sqe *sqe;
	int result;

	*stage = PU_CONTROL_RING;
	/* With an index array, newer kernels would patch their own code, under the feet of every ring
	 * of the machine, each time such a ring comes or goes. */
	result = pu_ring_open(&ring, 4, 0, PU_SETUP_SQE128, PU_SETUP_NO_SQARRAY);
	if (result < 0)
		return result;
	*stage = PU_CONTROL_SUBMIT;
	sqe = pu_ring_get_sqe(&ring);
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->fd = ctl_fd;
	sqe->off = cmd_op;
	memcpy(sqe->cmd, cmd, sizeof(*cmd));
	while (!pu_ring_ready(&ring)) {
		result = pu_ring_submit(&ring, 1, PU_FOREVER, 0);
		if (result < 0 && result != -EINTR)
			break;
	}
	if (pu_ring_ready(&ring)) {
		*stage = PU_CONTROL_DONE;
		result = pu_ring_cqe(&ring, 0)->res;
	}
	pu_ring_close(&ring);
	return result;
}

static void guard(int ctl_fd, int server_pidfd, uint32_t id, uint64_t cookie)
{
	struct pollfd server = { .fd = server_pidfd, .events = POLLIN };
	struct pu_dev_info info;
	struct pu_ctrl_cmd cmd = {
		.dev_id = id, .queue_id = UINT16_MAX, .len = sizeof(info), .addr = (uintptr_t)&info
	};
	int32_t stage;

	while (syscall(SYS_ppoll, &server, 1, NULL, NULL, 0) != 1)
		;
	memset(&info, 0, sizeof(info));
	if (run_command(ctl_fd, PU_CMD_GET_DEV_INFO, &cmd, &stage) < 0 || info.server_flags != cookie)
		return;
	cmd.len = 0;
	cmd.addr = 0;
	run_command(ctl_fd, PU_CMD_DEL_DEV, &cmd, &stage);
}

/* ---- in the parent ---- */

/* A fork that shares nothing, signals nobody when it ends, and runs no handler of the C library.
 * Signals stay blocked in the child: Python's handlers must not run there. */
static int spawn(int *pidfd)
{
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Not clone3, which containers' filters refuse. No stack and no signal at the end: a fork
	 * that no wait for children meets. */
	long pid = syscall(SYS_clone, (long)CLONE_PIDFD, NULL, pidfd, NULL, NULL);
	int error = errno;

	if (pid != 0)
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	return pid < 0 ? -error : (int)pid;
}

static bool reap(int pidfd, int pid, int timeout_ms)
{
	struct pollfd child = { .fd = pidfd, .events = POLLIN };

	if (poll(&child, 1, timeout_ms) != 1)
		return false;
	waitpid(pid, NULL, __WALL);
	return true;
}

static void kill_child(int pidfd)
{
	syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0u);
}

/* Returns 0 in the child, whose signals are blocked and files closed but for `keep` (-1: none), and who
 * dies with its parent; its pid, or -errno, in the parent. */
static int begin(struct pu_control *control, size_t payload_bytes, int keep)
{
	pid_t parent = getpid();

	control->map_bytes = sizeof(*control->reply) + payload_bytes;
	control->reply = mmap(NULL, control->map_bytes, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (control->reply == MAP_FAILED)
		return -errno;
	control->reply->result = PU_CONTROL_KILLED;
	control->pid = spawn(&control->pidfd);
	if (control->pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(0);
		keep_only(keep, keep);
	} else if (control->pid < 0) {
		munmap(control->reply, control->map_bytes);
	}
	return control->pid;
}

int pu_control_begin(struct pu_control *control, int ctl_fd, uint32_t cmd_op,
		     const struct pu_ctrl_cmd *cmd, const void *payload, size_t payload_bytes)
{
	struct pu_ctrl_cmd command = *cmd;
	int pid = begin(control, payload_bytes, ctl_fd);

	if (pid)
		return pid < 0 ? pid : 0;
	if (payload_bytes) {
		memcpy(control->reply->buffer, payload, payload_bytes);
		command.addr = (uint64_t)(uintptr_t)control->reply->buffer;
		command.len = (uint16_t)payload_bytes;
	}
	control->reply->result = run_command(ctl_fd, cmd_op, &command, &control->reply->stage);
	_exit(0);
}

int pu_control_begin_write(struct pu_control *control, const char *path, const char *text)
{
	int pid = begin(control, 0, -1);

	if (pid)
		return pid < 0 ? pid : 0;

	int fd = open(path, O_WRONLY | O_CLOEXEC);

	control->reply->result = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;
	control->reply->stage = PU_CONTROL_DONE;
	_exit(0);
}

int pu_control_wait(struct pu_control *control, int timeout_ms)
{
	struct pollfd child = { .fd = control->pidfd, .events = POLLIN };
	int ready = poll(&child, 1, timeout_ms);

	return ready < 0 ? -errno : ready;
}

bool pu_control_end(struct pu_control *control)
{
	bool gone;

	kill_child(control->pidfd);
	gone = reap(control->pidfd, control->pid, 200);
	close(control->pidfd);
	munmap(control->reply, control->map_bytes);
	return gone;
}

int pu_guard_start(int ctl_fd, uint32_t id, uint64_t cookie, int *pid)
{
	int server = (int)syscall(SYS_pidfd_open, getpid(), 0);
	int pidfd = -1;

	if (server < 0)
		return -errno;
	*pid = spawn(&pidfd);
	if (*pid == 0) {
		setsid();
		prctl(PR_SET_NAME, "pyublk-guard");
		keep_only(ctl_fd, server);
		guard(ctl_fd, server, id, cookie);
		_exit(0);
	}
	close(server);
	return *pid < 0 ? *pid : pidfd;
}

void pu_guard_stop(int pidfd, int pid)
{
	kill_child(pidfd);
	reap(pidfd, pid, 1000);
	close(pidfd);
}
