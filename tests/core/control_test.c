/* SPDX-License-Identifier: MIT
 * The helper, asked for commands on files that are no control node. The argument is its program.
 */
#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "forked.h"
#include "spawn.h"

#define LIMIT_MS 20000

static const char *program;
static int node;
static char folder[] = "/tmp/control_test.XXXXXX", fifo[64];

static struct pu_helper *helper(void)
{
	struct pu_helper *found;

	CHECK_EQUAL(pu_helper_get(&found, program, node), 0);
	return found;
}

static struct pu_ask get_info(void)
{
	return (struct pu_ask){ .kind = PU_ASK_COMMAND, .cmd_op = PU_CMD_GET_DEV_INFO,
				.cmd = { .dev_id = 1, .queue_id = UINT16_MAX } };
}

/* A write into a pipe that nobody reads from: it waits in its open. */
static void begin_waiting(struct pu_control *control, struct pu_helper *h)
{
	struct pu_ask ask = { .kind = PU_ASK_WRITE };
	char words[80];
	int bytes = snprintf(words, sizeof(words), "%s%cnone", fifo, 0) + 1;

	CHECK_EQUAL(pu_control_begin(control, h, &ask, words, (size_t)bytes, -1), 0);
}

static bool gone(int pid)
{
	for (int turn = 0; turn < LIMIT_MS / 10; turn++) {
		char path[32], state = 'Z';
		snprintf(path, sizeof(path), "/proc/%d/stat", pid);
		FILE *stat = fopen(path, "r");

		if (stat) {
			if (fscanf(stat, "%*d (%*[^)]) %c", &state) != 1)
				state = 'Z';
			fclose(stat);
		}
		if (state == 'Z' || state == 'X') /* its parent's to reap, which is init */
			return true;
		usleep(10000);
	}
	return false;
}

static int next_descriptor(void)
{
	int fd = dup(0);

	close(fd);
	return fd;
}

static void check_refusal(struct pu_helper *h)
{
	struct pu_control control;
	struct pu_ask ask = get_info();
	char payload[64] = "kept";

	CHECK_EQUAL(pu_control_begin(&control, h, &ask, payload, 64, -1), 0);
	CHECK_EQUAL(pu_control_wait(&control, LIMIT_MS), 1);
	CHECK_EQUAL(control.stage, PU_CONTROL_DONE);
	CHECK_EQUAL(control.result, -EOPNOTSUPP); /* no such command on a regular file */
	CHECK(!strcmp((char *)control.buffer, "kept"));
	CHECK(pu_control_end(&control));
}

static void a_refusal_comes_back(void)
{
	struct pu_helper *h = helper();

	check_refusal(h);
	CHECK_EQUAL(waitpid(-1, NULL, 0), -1); /* never a child that a program could meet */
	CHECK_EQUAL(errno, ECHILD);
	pu_helper_put(h);
}

static void commands_and_helpers_leave_nothing(void)
{
	int before = next_descriptor();

	for (int i = 0; i < 5; i++) {
		struct pu_helper *first = helper(), *second = helper();
		int pid = pu_helper_pid(first);

		CHECK(first == second);
		check_refusal(first);
		pu_helper_put(first);
		check_refusal(second);
		CHECK_EQUAL(kill(pid, 0), 0);
		pu_helper_put(second);
		CHECK(gone(pid));
	}
	CHECK_EQUAL(next_descriptor(), before);
}

static void what_hangs_holds_nothing_up_and_is_called_off(void)
{
	struct pu_helper *h = helper();
	struct pu_control hanging[40];

	for (int i = 0; i < 40; i++)
		begin_waiting(&hanging[i], h);
	check_refusal(h);
	CHECK_EQUAL(pu_control_wait(&hanging[0], 20), 0);
	for (int i = 0; i < 40; i++)
		CHECK(pu_control_end(&hanging[i]));
	check_refusal(h);
	pu_helper_put(h);
}

static int told, told_pid;

static void tell(int pid)
{
	told_pid = pid;
	__atomic_store_n(&told, 1, __ATOMIC_RELEASE);
}

static int told_within_limit(void)
{
	for (int turn = 0; !__atomic_load_n(&told, __ATOMIC_ACQUIRE) && turn < LIMIT_MS / 10; turn++)
		usleep(10000);
	CHECK(told);
	told = 0;
	return told_pid;
}

static void a_helper_that_is_killed_is_replaced(void)
{
	struct pu_helper *h = helper();
	struct pu_control control;
	int pid = pu_helper_pid(h);

	pu_helper_tell(tell);
	begin_waiting(&control, h);
	CHECK_EQUAL(kill(pid, SIGKILL), 0);
	CHECK_EQUAL(pu_control_wait(&control, LIMIT_MS), 1);
	CHECK_EQUAL(control.result, PU_CONTROL_KILLED);
	CHECK(pu_control_end(&control));
	check_refusal(h);
	CHECK(told_within_limit() > 0);
	CHECK(told_pid != pid);
	CHECK_EQUAL(pu_helper_pid(h), told_pid);
	pu_helper_tell(NULL);

	/* At whatever stage: the command's own answer, or none. */
	for (int i = 0; i < 10; i++) {
		struct pu_ask ask = get_info();

		CHECK_EQUAL(pu_control_begin(&control, h, &ask, NULL, 0, -1), 0);
		usleep((useconds_t)i * 20);
		kill(pu_helper_pid(h), SIGKILL);
		CHECK_EQUAL(pu_control_wait(&control, LIMIT_MS), 1);
		if (control.result != PU_CONTROL_KILLED)
			CHECK_EQUAL(control.result, -EOPNOTSUPP);
		CHECK(pu_control_end(&control));
	}
	pu_helper_put(h);
}

static void *ask_again_and_again(void *of)
{
	for (int i = 0; i < 50; i++)
		check_refusal(of);
	return NULL;
}

static void threads_share_a_helper(void)
{
	struct pu_helper *h = helper();
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, ask_again_and_again, h), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	pu_helper_put(h);
}

static void a_program_that_cannot_be_executed(void)
{
	struct pu_helper *none;
	int before = next_descriptor();

	CHECK_EQUAL(pu_helper_get(&none, "/nonexistent/pyublk-helper", -1), -ENOENT);
	CHECK_EQUAL(pu_helper_get(&none, "/etc/passwd", -1), -EACCES);
	CHECK_EQUAL(next_descriptor(), before);
}

static void descriptors_that_run_out(void)
{
	struct rlimit all, few;
	struct pu_helper *h;
	int before = next_descriptor(), error = -EMFILE, spare;

	CHECK_EQUAL(getrlimit(RLIMIT_NOFILE, &all), 0);
	for (spare = 0; error == -EMFILE && spare < 10; spare++) {
		few = (struct rlimit){ (rlim_t)(before + spare), all.rlim_max };
		CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &few), 0);
		error = pu_helper_get(&h, program, node);
	}
	CHECK_EQUAL(error, 0);
	CHECK_EQUAL(spare, 5); /* with four: the socket, its other end, two processes */
	few.rlim_cur = (rlim_t)before;
	CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &few), 0);
	check_refusal(h); /* none is left, and none needed */
	CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &all), 0);
	pu_helper_put(h);
	CHECK_EQUAL(next_descriptor(), before);
}

#ifndef __SANITIZE_THREAD__
/* A forked child has no part in it, and may have its own. */
static void a_fork(void)
{
	struct pu_helper *h = helper();
	int pid = pu_helper_pid(h), status, child;

	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		CHECK_EQUAL(pu_process(), getpid());
		CHECK(!pu_helper_is_ours(h));
		pu_helper_put(h);
		struct pu_helper *own = helper();

		CHECK(pu_helper_pid(own) != pid);
		check_refusal(own);
		pu_helper_put(own);
		_exit(0);
	}
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK_EQUAL(status, 0);
	CHECK(pu_helper_is_ours(h));
	CHECK_EQUAL(pu_helper_pid(h), pid);
	check_refusal(h);
	pu_helper_put(h);
}

/* It ends with the process that it is of, also while a fork of that one lives. */
static void the_death_of_its_process(void)
{
	int ends[2], pid = 0, child;

	CHECK_EQUAL(pipe(ends), 0);
	child = fork();
	if (child == 0) {
		struct pu_helper *h = helper();

		pid = pu_helper_pid(h);
		if (fork() == 0) {
			poll(NULL, 0, LIMIT_MS);
			_exit(0);
		}
		CHECK_EQUAL(write(ends[1], &pid, sizeof(pid)), sizeof(pid));
		kill(getpid(), SIGKILL);
	}
	CHECK_EQUAL(read(ends[0], &pid, sizeof(pid)), sizeof(pid));
	CHECK_EQUAL(waitpid(child, NULL, 0), child);
	CHECK(gone(pid));
	close(ends[0]);
	close(ends[1]);
}

/* ---- by another process ---- */

/* Starts helpers for who is at the other end; `wrong` of them cannot be started. */
static void keep(int asker, int wrong)
{
	union {
		struct cmsghdr head;
		uint8_t room[CMSG_SPACE(2 * sizeof(int))];
	} along;
	int32_t pid;
	struct iovec part = { &pid, sizeof(pid) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &along };

	for (;;) {
		int given[2], pidfd = -1, error;

		message.msg_controllen = sizeof(along);
		if (recvmsg(asker, &message, MSG_CMSG_CLOEXEC) <= 0)
			return;
		memcpy(given, CMSG_DATA(&along.head), sizeof(given));
		error = pu_spawn_helper_for(wrong-- > 0 ? "/nonexistent" : program, given[0], given[1],
					    &pidfd, &pid);
		if (error)
			pid = error;
		along.head.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&along.head), &pidfd, sizeof(int));
		message.msg_controllen = error ? 0 : CMSG_SPACE(sizeof(int));
		CHECK_EQUAL(sendmsg(asker, &message, MSG_NOSIGNAL), sizeof(pid));
		close(pidfd);
		close(given[0]);
		close(given[1]);
	}
}

static void ask_a_keeper(int keeper_end, int keeper)
{
	struct pu_helper *h = helper();
	int first = pu_helper_pid(h);

	check_refusal(h);
	pu_spawn_by(keeper_end);
	pu_helper_tell(tell);
	told = 0;
	CHECK_EQUAL(kill(first, SIGKILL), 0);
	CHECK_EQUAL(told_within_limit(), -ENOENT); /* the one that cannot be started */
	CHECK_EQUAL(pu_helper_pid(h), 0);
	check_refusal(h);
	CHECK(pu_helper_pid(h) != first);
	/* Nobody starts one without the rights that the keeper has. */
	CHECK_EQUAL(kill(keeper, SIGKILL), 0);
	CHECK_EQUAL(waitpid(keeper, NULL, 0), keeper);
	CHECK_EQUAL(kill(pu_helper_pid(h), SIGKILL), 0);
	CHECK_EQUAL(told_within_limit(), -EPIPE);
	pu_helper_tell(NULL);
	pu_helper_put(h);
}

static void helpers_by_another_process(void)
{
	int ends[2], status, child;

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
	child = fork();
	if (child == 0) {
		int keeper = fork();

		close(ends[keeper == 0 ? 0 : 1]);
		if (keeper == 0)
			keep(ends[1], 1);
		else
			ask_a_keeper(ends[0], keeper);
		_exit(0);
	}
	close(ends[0]);
	close(ends[1]);
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK_EQUAL(status, 0);
}

/* ---- what is executed when a process has ended ---- */

static void tell_helper(struct pu_helper *h, struct pu_ask ask, int file)
{
	struct pu_control control;

	CHECK_EQUAL(pu_control_begin(&control, h, &ask, NULL, 0, file), 0);
	CHECK_EQUAL(pu_control_wait(&control, LIMIT_MS), 1);
	CHECK_EQUAL(control.result, 0);
	CHECK(pu_control_end(&control));
}

static int file_of(const char *bytes, size_t length)
{
	int file = memfd_create("control_test", MFD_CLOEXEC);

	CHECK_EQUAL(write(file, bytes, length), length);
	return file;
}

/* A process that has a shell execute `script` when it is killed, for the disks 1, whose memory holds
 * "kept", and 2; `replaced`: its first helper is killed before it. The helper's pid. */
static int leave_behind(const char *script, bool replaced)
{
	int ends[2], pid = 0, child;
	char words[512];
	int length = snprintf(words, sizeof(words), "/bin/sh%c-c%c%s%csh%c%cFOLDER=%s%cA=b%c", 0, 0,
			      script, 0, 0, 0, folder, 0, 0);

	CHECK_EQUAL(pipe(ends), 0);
	child = fork();
	if (child == 0) {
		struct pu_helper *h = helper();
		struct pu_ask guarded = { .kind = PU_ASK_GUARD, .flags = PU_ASK_RESTARTED, .cookie = 42 };
		int program_file = file_of(words, (size_t)length), memory = file_of("kept", 4);

		tell_helper(h, (struct pu_ask){ .kind = PU_ASK_PROGRAM }, program_file);
		guarded.cmd.dev_id = 2;
		tell_helper(h, guarded, -1);
		guarded.cmd.dev_id = 1;
		tell_helper(h, guarded, memory);
		guarded.cmd.dev_id = 3; /* one that is not served again */
		guarded.flags = 0;
		tell_helper(h, guarded, -1);
		close(program_file);
		close(memory);
		pid = pu_helper_pid(h);
		if (replaced) {
			kill(pid, SIGKILL);
			CHECK(gone(pid));
			while (pu_helper_pid(h) == pid)
				usleep(10000);
			pid = pu_helper_pid(h);
			check_refusal(h);
		}
		CHECK_EQUAL(write(ends[1], &pid, sizeof(pid)), sizeof(pid));
		kill(getpid(), SIGKILL);
	}
	CHECK_EQUAL(read(ends[0], &pid, sizeof(pid)), sizeof(pid));
	CHECK_EQUAL(waitpid(child, NULL, 0), child);
	close(ends[0]);
	close(ends[1]);
	return pid;
}

static void check_left(const char *wanted)
{
	char path[64], found[512] = "";
	FILE *file;

	snprintf(path, sizeof(path), "%s/left", folder);
	file = fopen(path, "r");
	CHECK(file != NULL);
	CHECK(fread(found, 1, sizeof(found) - 1, file) > 0);
	fclose(file);
	unlink(path);
	if (strcmp(found, wanted))
		fprintf(stderr, "%s is not %s", found, wanted);
	CHECK(!strcmp(found, wanted));
}

/* Which of the disks comes first is nobody's business. */
#define LEAVE                                                                          \
	"for d; do case $d in 1:42:*) file=${d##*:};; 2:42) other=2;; esac; done; " \
	"echo $# $1 $other $A $PWD `cat /proc/self/fd/$file` >> $FOLDER/left; "
#define LEFT "3 ended 2 b / kept\n"

static void what_it_is_told_to_is_executed(void)
{
	CHECK(gone(leave_behind(LEAVE, false)));
	check_left(LEFT);
	CHECK(gone(leave_behind(LEAVE, true)));
	check_left(LEFT);
}

static void what_fails_is_executed_again_but_not_for_ever(void)
{
	CHECK(gone(leave_behind(LEAVE "test -e $FOLDER/again || { >$FOLDER/again; kill -9 $$; }; "
				"rm $FOLDER/again", false)));
	check_left(LEFT LEFT);
	CHECK(gone(leave_behind(LEAVE "exit 1", false)));
	check_left(LEFT LEFT LEFT LEFT LEFT LEFT);
}

#endif

int main(int argc, char **argv)
{
	CHECK_EQUAL(argc, 2);
	program = argv[1];
	node = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	CHECK(node >= 0);
	CHECK(mkdtemp(folder) != NULL);
	snprintf(fifo, sizeof(fifo), "%s/pipe", folder);
	CHECK_EQUAL(mkfifo(fifo, 0600), 0);
	a_refusal_comes_back();
	commands_and_helpers_leave_nothing();
	what_hangs_holds_nothing_up_and_is_called_off();
	a_helper_that_is_killed_is_replaced();
	threads_share_a_helper();
	a_program_that_cannot_be_executed();
	descriptors_that_run_out();
#ifndef __SANITIZE_THREAD__ /* which knows no threads after a fork */
	a_fork();
	the_death_of_its_process();
	helpers_by_another_process();
	what_it_is_told_to_is_executed();
	what_fails_is_executed_again_but_not_for_ever();
#endif
	unlink(fifo);
	rmdir(folder);
	return 0;
}
