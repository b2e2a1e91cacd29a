/* SPDX-License-Identifier: MIT
 * The child that runs a command, against files that are no control node.
 */
#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static void a_refusal_comes_back(void)
{
	struct pu_control control;
	struct pu_ctrl_cmd cmd = { .dev_id = 1, .queue_id = UINT16_MAX };
	char payload[64] = "kept";
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQUAL(pu_control_begin(&control, fd, PU_CMD_GET_DEV_INFO, &cmd, payload, 64), 0);
	CHECK_EQUAL(pu_control_wait(&control, 10000), 1);
	CHECK_EQUAL(control.reply->stage, PU_CONTROL_DONE);
	CHECK_EQUAL(control.reply->result, -EOPNOTSUPP); /* no such command on a regular file */
	CHECK(!strcmp((char *)control.reply->buffer, "kept"));
	CHECK(pu_control_end(&control));
	CHECK_EQUAL(waitpid(-1, NULL, 0), -1); /* never a child that a program could meet */
	close(fd);
}

static void many_commands_leave_nothing(void)
{
	struct pu_ctrl_cmd cmd = { .dev_id = 1 };
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	int first, last;

	for (int i = 0; i < 20; i++) {
		struct pu_control control;

		CHECK_EQUAL(pu_control_begin(&control, fd, PU_CMD_DEL_DEV, &cmd, NULL, 0), 0);
		CHECK_EQUAL(pu_control_wait(&control, 10000), 1);
		CHECK(pu_control_end(&control));
	}
	first = dup(fd);
	CHECK_EQUAL(first, fd + 1);
	last = first;
	close(last);
	close(fd);
}

/* A pipe that nobody reads from: the child waits in its open. */
static void a_child_that_is_killed_has_no_result(void)
{
	struct pu_control control;
	struct pu_ctrl_cmd cmd = { .dev_id = 1 };
	char folder[] = "/tmp/control_test.XXXXXX", path[64];
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	CHECK(mkdtemp(folder) != NULL);
	snprintf(path, sizeof(path), "%s/pipe", folder);
	CHECK_EQUAL(mkfifo(path, 0600), 0);
	CHECK_EQUAL(pu_control_begin_write(&control, path, "none"), 0);
	CHECK_EQUAL(pu_control_wait(&control, 50), 0);
	CHECK_EQUAL(kill(control.pid, SIGKILL), 0);
	CHECK_EQUAL(pu_control_wait(&control, 10000), 1);
	CHECK_EQUAL(control.reply->result, PU_CONTROL_KILLED);
	CHECK(pu_control_end(&control));
	unlink(path);
	rmdir(folder);

	/* At whatever stage: the command's own answer, or none. */
	for (int i = 0; i < 50; i++) {
		CHECK_EQUAL(pu_control_begin(&control, fd, PU_CMD_GET_DEV_INFO, &cmd, NULL, 0), 0);
		usleep((useconds_t)i * 20);
		kill(control.pid, SIGKILL);
		CHECK_EQUAL(pu_control_wait(&control, 10000), 1);
		if (control.reply->result != PU_CONTROL_KILLED)
			CHECK_EQUAL(control.reply->result, -EOPNOTSUPP);
		CHECK(pu_control_end(&control));
	}
	close(fd);
}

static void a_guard_ends_when_told(void)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), pid = 0;
	int pidfd = pu_guard_start(fd, 7, 42, &pid);

	CHECK(pidfd >= 0);
	CHECK(pid > 0);
	CHECK_EQUAL(kill(pid, 0), 0);
	pu_guard_stop(pidfd, pid);
	CHECK_EQUAL(kill(pid, 0), -1);
	close(fd);
}

int main(void)
{
	a_refusal_comes_back();
	many_commands_leave_nothing();
	a_child_that_is_killed_has_no_result();
	a_guard_ends_when_told();
	return 0;
}
