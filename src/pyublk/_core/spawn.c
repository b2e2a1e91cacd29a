/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "forked.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef __WALL
#define __WALL 0x40000000
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif

#ifdef __SANITIZE_THREAD__ /* whose own clone takes a child for a fork, which shares no memory */
int __clone(int (*fn)(void *), void *stack, int flags, void *arg, ...);
#define clone __clone
#endif

/* Its frames end without returning, in a process that shares our memory. */
#define IN_CHILD __attribute__((no_sanitize("thread", "address"), noinline))

#define STACK_BYTES (64u * 1024) /* for each of two */
#define KEEPER_MS 10000		 /* for another process to start a helper */

/* Both children run in our memory, on stacks of their own, while we are suspended: system calls only,
 * and what they write is ours to read. */
struct birth {
	const char *program;
	int sock, server; /* what the helper gets */
	char sock_word[12], server_word[12];
	uint8_t *stacks;
	int pid, pidfd;
	int error;
};

IN_CHILD static void keep_only(int a, int b)
{
	unsigned low = (unsigned)(a < b ? a : b), high = (unsigned)(a < b ? b : a);

	if (low > 0)
		syscall(SYS_close_range, 0u, low - 1, 0u);
	if (high > low + 1)
		syscall(SYS_close_range, low + 1, high - 1, 0u);
	syscall(SYS_close_range, high + 1, ~0u, 0u);
}

/* Rights that are not root's by its name are lost by an exec, unless they are ambient. */
IN_CHILD static void keep_capabilities(void)
{
	struct { uint32_t version; int pid; } head = { 0x20080522, 0 };
	struct { uint32_t effective, permitted, inheritable; } sets[2];

	if (syscall(SYS_capget, &head, sets) < 0)
		return;
	for (int word = 0; word < 2; word++)
		sets[word].inheritable |= sets[word].permitted;
	if (syscall(SYS_capset, &head, sets) < 0)
		return;
	for (int bit = 0; bit < 64; bit++)
		if (sets[bit / 32].permitted >> bit % 32 & 1)
			prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit, 0, 0);
}

IN_CHILD static int become_helper(void *of)
{
	struct birth *birth = of;
	/* Nothing of our environment: LD_PRELOAD and its like are not meant for it. */
	char *arguments[] = { (char *)(uintptr_t)birth->program, birth->sock_word, birth->server_word,
			      NULL };
	char *environment[] = { NULL };

	setsid(); /* a terminal's signals are not for it; all others stay blocked */
	keep_capabilities();
	keep_only(birth->sock, birth->server);
	fcntl(birth->sock, F_SETFD, 0);
	fcntl(birth->server, F_SETFD, 0);
	execve(birth->program, arguments, environment);
	birth->error = -errno;
	_exit(1);
}

/* Its parent, for a moment: an orphan is init's, and signals no end to us. A program that is executed
 * signals its parent by SIGCHLD, whatever its start asked for. */
IN_CHILD static int bear_helper(void *of)
{
	struct birth *birth = of;

	birth->pid = clone(become_helper, birth->stacks + STACK_BYTES,
			   CLONE_VM | CLONE_VFORK | CLONE_PIDFD, birth, &birth->pidfd);
	if (birth->pid < 0)
		birth->error = -errno;
	_exit(0);
}

/* It shares the table of descriptors, so that the helper's pidfd is ours. */
static int clone_twice(struct birth *birth)
{
	sigset_t all, before;
	int pid, error;

	/* No handler of Python's may run in the children, and no signal reach the helper. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pid = clone(bear_helper, birth->stacks + 2 * STACK_BYTES, CLONE_VM | CLONE_VFORK | CLONE_FILES,
		    birth);
	error = -errno;
	if (pid >= 0)
		while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
			;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (pid < 0)
		return error;
	if (birth->error && birth->pidfd >= 0)
		close(birth->pidfd);
	return birth->error;
}

static int bear(struct birth *birth)
{
	int error;

	birth->stacks = mmap(NULL, 2 * STACK_BYTES, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (birth->stacks == MAP_FAILED)
		return -ENOMEM;
	snprintf(birth->sock_word, sizeof(birth->sock_word), "%d", birth->sock);
	snprintf(birth->server_word, sizeof(birth->server_word), "%d", birth->server);
	error = clone_twice(birth);
	munmap(birth->stacks, 2 * STACK_BYTES);
	return error;
}

/* ---- by another process ---- */

static int keeper = -1, keeper_of; /* who is asked, and by which process; -1: nobody */

static int exchange(struct birth *birth)
{
	union {
		struct cmsghdr head;
		uint8_t room[CMSG_SPACE(2 * sizeof(int))];
	} along = { .head = { .cmsg_len = CMSG_LEN(2 * sizeof(int)), .cmsg_level = SOL_SOCKET,
			      .cmsg_type = SCM_RIGHTS } };
	int given[] = { birth->sock, birth->server };
	int32_t pid = 0;
	struct iovec part = { &pid, sizeof(pid) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &along,
				  .msg_controllen = sizeof(along) };
	struct pollfd answer = { .fd = keeper, .events = POLLIN };
	ssize_t got;

	memcpy(CMSG_DATA(&along.head), given, sizeof(given));
	if (sendmsg(keeper, &message, MSG_NOSIGNAL) < 0)
		return -errno;
	if (poll(&answer, 1, KEEPER_MS) == 0)
		return -ETIMEDOUT;
	got = recvmsg(keeper, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (got != sizeof(pid))
		return got < 0 ? -errno : -EPIPE;
	if (pid < 0)
		return pid;
	if (message.msg_controllen < CMSG_LEN(sizeof(int)))
		return -EMFILE;
	memcpy(&birth->pidfd, CMSG_DATA(&along.head), sizeof(birth->pidfd));
	birth->pid = pid;
	return 0;
}

static int ask_keeper(struct birth *birth)
{
	int error = exchange(birth);

	if (error == -ETIMEDOUT) /* an answer that comes later would be taken for that of the next */
		shutdown(keeper, SHUT_RDWR);
	return error;
}

void pu_spawn_by(int sock)
{
	pu_fork_hold();
	keeper = pu_fork_add(sock);
	keeper_of = pu_process();
	pu_fork_release();
}

int pu_spawn_helper_for(const char *program, int sock, int server, int *pidfd, int *pid)
{
	struct birth birth = { .program = program, .sock = sock, .server = server, .pidfd = -1 };
	int error;

	pu_fork_hold();
	error = bear(&birth);
	pu_fork_release();
	if (!error) {
		*pidfd = birth.pidfd;
		*pid = birth.pid;
	}
	return error;
}

/* ---- the whole ---- */

static int spawn(struct birth *birth)
{
	int error;

	birth->server = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (birth->server < 0)
		return -errno;
	if (keeper >= 0 && keeper_of == pu_process())
		error = ask_keeper(birth);
	else
		error = bear(birth);
	close(birth->server);
	return error;
}

int pu_spawn_helper(const char *program, int *sock, int *pidfd, int *pid)
{
	struct birth birth = { .program = program, .pidfd = -1 };
	int ends[2], error;

	pu_fork_hold();
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
		error = -errno;
	} else {
		birth.sock = ends[1];
		error = spawn(&birth);
		close(ends[1]);
		if (error) {
			close(ends[0]);
		} else {
			*sock = pu_fork_add(ends[0]);
			*pidfd = pu_fork_add(birth.pidfd);
			*pid = birth.pid;
		}
	}
	pu_fork_release();
	return error;
}
