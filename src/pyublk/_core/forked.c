/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "forked.h"

#include <pthread.h>
#include <stdlib.h>

#include "libc.h"

static int process;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int *fds; /* to be closed in a child, in no order */
static uint32_t nr_fds, room;

void pu_fork_hold(void)
{
	pthread_mutex_lock(&lock);
}

void pu_fork_release(void)
{
	pthread_mutex_unlock(&lock);
}

int pu_fork_add(int fd)
{
	if (fd < 0)
		return fd;
	if (nr_fds == room) {
		uint32_t more = room ? room * 2 : 16;
		int *grown = realloc(fds, more * sizeof(*fds));

		/* Without memory a child keeps one: the disk's end is noticed when it ends too. */
		if (!grown)
			return fd;
		fds = grown;
		room = more;
	}
	fds[nr_fds++] = fd;
	return fd;
}

void pu_fork_drop(int fd)
{
	pu_fork_hold();
	for (uint32_t i = 0; i < nr_fds; i++)
		if (fds[i] == fd) {
			fds[i] = fds[--nr_fds];
			break;
		}
	if (!nr_fds) {
		free(fds);
		fds = NULL;
		room = 0;
	}
	pu_fork_release();
}

/* Their numbers stay taken, by a file of nothing: whoever has one may still use or close it. */
static void in_child(void)
{
	int inert = -1;

	process = getpid();
	for (uint32_t i = 0; i < nr_fds; i++) {
		if (inert < 0) {
			close(fds[i]); /* so that there is a number, whatever the limit */
			inert = memfd_create("inert", MFD_CLOEXEC);
		}
		if (inert >= 0 && inert != fds[i])
			dup3(inert, fds[i], O_CLOEXEC);
	}
	for (uint32_t i = 0; i < nr_fds; i++)
		if (fds[i] == inert)
			inert = -1; /* the one that was closed for it */
	if (inert >= 0)
		close(inert);
	nr_fds = 0;
	pu_fork_release();
}

int pu_process(void)
{
	return process;
}

__attribute__((constructor)) static void look_out(void)
{
	process = getpid();
	pthread_atfork(pu_fork_hold, pu_fork_release, in_child);
}
