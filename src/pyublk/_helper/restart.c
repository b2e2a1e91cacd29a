/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "restart.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hang.h"

#define TRIES 6
#ifndef FIRST_PAUSE_MS
#define FIRST_PAUSE_MS 1000 /* each is twice the one before: half a minute in all */
#endif

#define WORD 64 /* bytes of ID:COOKIE:DESCRIPTOR */

static char *text; /* the file's */
static size_t text_bytes;
static char **words; /* the command's, NULL, the environment's, NULL */
static size_t nr_words;

static int pid = -1, pidfd = -1;
static unsigned failures;
static int64_t again_at;
static bool after_hang;
static char oom_score[16];

/* ---- what it is ---- */

int restart_take_program(int file)
{
	struct stat found;
	char *map = MAP_FAILED, **made = NULL;
	size_t parts = 0, at = 0;

	if (fstat(file, &found) == 0 && found.st_size > 0)
		map = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_PRIVATE, file, 0);
	close(file);
	if (map == MAP_FAILED)
		return -EINVAL;
	for (off_t i = 0; i < found.st_size; i++)
		parts += map[i] == 0;
	if (map[found.st_size - 1] == 0)
		made = calloc(parts + 2, sizeof(*made));
	if (!made) {
		munmap(map, (size_t)found.st_size);
		return -ENOMEM;
	}
	/* The empty word between the two is their NULL as well. */
	for (char *word = map; word < map + found.st_size; word += strlen(word) + 1)
		made[at++] = *word ? word : NULL;
	if (text) {
		munmap(text, text_bytes);
		free(words);
	}
	text = map;
	text_bytes = (size_t)found.st_size;
	words = made;
	for (nr_words = 0; words[nr_words]; nr_words++)
		;
	return 0;
}

bool restart_has_program(void)
{
	return nr_words > 0;
}

void restart_with_oom_score(const char *score)
{
	snprintf(oom_score, sizeof(oom_score), "%s", score);
}

/* ---- its process ---- */

/* In our memory, which is suspended: system calls only. */
static void become(char **arguments)
{
	sigset_t none;
	int fd;

	setsid();
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && *oom_score && write(fd, oom_score, strlen(oom_score)) < 0)
		(void)0; /* it lives a little more safely than it has to */
	fd = open("/dev/null", O_RDWR);
	for (int standard = 0; standard < 3; standard++)
		if (fd != standard)
			dup2(fd, standard);
	if (fd > 2)
		close(fd);
	for (struct guarded *one = guarded; one; one = one->next)
		if (one->restarted && one->memory >= 0)
			fcntl(one->memory, F_SETFD, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execve(arguments[0], arguments, words + nr_words + 1);
	_exit(127);
}

static int spawn(char **arguments)
{
	pid = vfork();
	if (pid == 0)
		become(arguments);
	if (pid < 0)
		return -errno;
	pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (pidfd >= 0)
		return 0;
	kill(pid, SIGKILL); /* nothing would tell of its end */
	waitpid(pid, NULL, 0);
	return -EMFILE;
}

static int start(void)
{
	size_t disks = 0, at = 0;
	char **arguments, (*named)[WORD];
	int error = -ENOMEM;

	for (struct guarded *one = guarded; one; one = one->next)
		disks += one->restarted;
	arguments = calloc(nr_words + disks + 2, sizeof(*arguments));
	named = calloc(disks, sizeof(*named));
	if (arguments && named) {
		memcpy(arguments, words, nr_words * sizeof(*arguments));
		arguments[nr_words] = after_hang ? "hung" : "ended";
		for (struct guarded *one = guarded; one; one = one->next) {
			int length;

			if (!one->restarted)
				continue;
			length = snprintf(named[at], WORD, "%u:%" PRIu64, one->id, one->cookie);
			if (one->memory >= 0)
				snprintf(named[at] + length, WORD - (size_t)length, ":%d", one->memory);
			arguments[nr_words + 1 + at] = named[at];
			at++;
		}
		error = spawn(arguments);
	}
	free(arguments);
	free(named);
	return error;
}

static enum restart_state failed(void)
{
	if (++failures >= TRIES)
		return RESTART_GIVEN_UP;
	again_at = now_ms() + (FIRST_PAUSE_MS << (failures - 1));
	return RESTART_GOES_ON;
}

enum restart_state restart_begin(bool hung)
{
	after_hang = hung;
	return start() < 0 ? failed() : RESTART_GOES_ON;
}

int restart_pidfd(void)
{
	return pidfd;
}

int restart_next_start(void)
{
	int64_t left = again_at - now_ms();

	if (!again_at)
		return -1;
	return left > 0 ? (int)left : 0;
}

enum restart_state restart_go_on(void)
{
	int status;

	if (pidfd >= 0) {
		if (waitpid(pid, &status, WNOHANG) != pid)
			return RESTART_GOES_ON;
		close(pidfd);
		pidfd = -1;
		return status == 0 ? RESTART_DONE : failed();
	}
	if (restart_next_start() != 0)
		return RESTART_GOES_ON;
	again_at = 0;
	return start() < 0 ? failed() : RESTART_GOES_ON;
}
