/* SPDX-License-Identifier: MIT
 * pyublk-helper SOCKET PIDFD: issues the control commands of one process, and deletes its disks when it
 * ends without having done so, or has them served again. ../_core/control.h says why, and talks to it.
 *
 * One thread that never waits for a disk: commands wait in the kernel's workers. It has no descriptor of
 * its server but the socket, the server's pidfd and the control node.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../_core/protocol.h"
#include "../_core/ring.h"
#include "guarded.h"
#include "hang.h"
#include "restart.h"

enum {
	OPCODE_ASYNC_CANCEL = 14,
	OPCODE_OPENAT = 18,
	REGISTER_IOWQ_MAX_WORKERS = 19,
	SQE_ASYNC = 1u << 4,
};

enum { NAME_BYTES = 32 }; /* the path of a char device, and zeros */

enum step { COMMAND, OPEN, WRITE, LOOK, CHECK, STOP, DELETE };

struct job { /* a request on its way, a look at a disk, or its end */
	struct job *next;
	struct pu_ask ask;
	enum step step;
	bool abandoned; /* nobody waits for the answer */
	bool unserved;	/* its end: only if nobody else serves it */
	bool named;	/* CHECK and what follows: the device is an unprivileged user's */
	int fd;		/* OPEN: none yet */
	void *map;
	size_t bytes;
	uint8_t payload[];
};

static int sock, server, node = -1;
static int server_pid;
static bool server_gone, server_hung;
static struct pu_ring ring = { .fd = -1 };
static struct job *jobs;

/* ---- jobs ---- */

static struct job *new_job(const struct pu_ask *ask, enum step step, size_t bytes)
{
	struct job *job = calloc(1, sizeof(*job) + bytes);

	if (!job)
		return NULL;
	job->ask = *ask;
	job->step = step;
	job->fd = -1;
	job->bytes = bytes;
	job->next = jobs;
	jobs = job;
	return job;
}

static void end(struct job *job)
{
	struct job **at = &jobs;

	while (*at != job)
		at = &(*at)->next;
	*at = job->next;
	if (job->map)
		munmap(job->map, job->ask.file_bytes);
	if (job->fd >= 0)
		close(job->fd);
	free(job);
}

/* Waits for room, which a thread of the server's makes, but not for a server that has ended. */
static void tell(const struct msghdr *message)
{
	struct pollfd ready[] = { { .fd = sock, .events = POLLOUT }, { .fd = server, .events = POLLIN } };

	while (sendmsg(sock, message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EAGAIN) {
		poll(ready, 2, -1);
		if (ready[1].revents)
			return;
	}
}

static void answer(struct job *job, int32_t stage, int32_t result)
{
	struct pu_answer head = { .id = job->ask.id, .stage = stage, .result = result };
	struct iovec parts[] = { { &head, sizeof(head) }, { job->payload, job->bytes } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = job->step == COMMAND ? 2 : 1 };

	tell(&message);
	end(job);
}

static int open_ring(void)
{
	uint32_t workers[2] = { 4096, 0 }; /* each hanging command has one */
	int error;

	if (ring.fd >= 0)
		return 0;
	/* With an index array, newer kernels would patch their own code, under the feet of every ring
	 * of the machine, each time such a ring comes or goes. */
	error = pu_ring_open(&ring, 64, 0, PU_SETUP_SQE128, PU_SETUP_NO_SQARRAY);
	if (error < 0) {
		ring.fd = -1;
		return error;
	}
	pu_ring_register(&ring, REGISTER_IOWQ_MAX_WORKERS, workers, 2);
	return 0;
}

static int submit(void)
{
	for (;;) {
		int done = pu_ring_submit(&ring, 0, 0, 0);

		if (done != -EINTR)
			return done;
	}
}

/* An empty entry, or NULL: the kernel takes none. */
static struct pu_sqe *entry(void)
{
	struct pu_sqe *sqe = pu_ring_get_sqe(&ring);

	if (!sqe && submit() >= 0)
		sqe = pu_ring_get_sqe(&ring);
	return sqe;
}

/* A command of a disk's end: its payload is the device's name, for a device that wants it in every
 * command, and then, for CHECK, what is told of it. */
static void fill_end(struct job *job, struct pu_ctrl_cmd *cmd)
{
	uint16_t name = job->named ? NAME_BYTES : 0;

	cmd->addr = (uint64_t)(uintptr_t)(job->payload + NAME_BYTES - name);
	cmd->len = (uint16_t)(name + (job->step == CHECK ? sizeof(struct pu_dev_info) : 0));
	cmd->dev_path_len = name;
}

static void fill_command(struct job *job, struct pu_sqe *sqe)
{
	struct pu_ctrl_cmd cmd = job->ask.cmd;
	uint32_t cmd_op = job->ask.cmd_op;

	if (job->step != COMMAND)
		cmd = (struct pu_ctrl_cmd){ .dev_id = cmd.dev_id, .queue_id = UINT16_MAX };
	if (job->step == CHECK || job->step == LOOK)
		cmd_op = PU_CMD_GET_DEV_INFO;
	else if (job->step == STOP)
		cmd_op = PU_CMD_STOP_DEV;
	else if (job->step == DELETE)
		cmd_op = PU_CMD_DEL_DEV;
	if (job->step >= CHECK) {
		fill_end(job, &cmd);
	} else if (job->bytes) {
		cmd.addr = (uint64_t)(uintptr_t)job->payload;
		cmd.len = (uint16_t)job->bytes;
	}
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->fd = node;
	sqe->off = cmd_op;
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
}

/* Into the kernel with the job's next step. */
static void go(struct job *job)
{
	int error = open_ring();
	struct pu_sqe *sqe;

	if (error < 0) {
		answer(job, PU_CONTROL_RING, error);
		return;
	}
	sqe = entry();
	if (!sqe) {
		answer(job, PU_CONTROL_SUBMIT, -EBUSY);
		return;
	}
	sqe->user_data = (uint64_t)(uintptr_t)job;
	if (job->step == OPEN) {
		sqe->opcode = OPCODE_OPENAT;
		sqe->flags = SQE_ASYNC; /* it may wait as long as it likes */
		sqe->fd = AT_FDCWD;
		sqe->addr = (uint64_t)(uintptr_t)job->payload;
		sqe->op_flags = O_WRONLY | O_CLOEXEC;
	} else if (job->step == WRITE) {
		const char *text = (char *)job->payload + strlen((char *)job->payload) + 1;

		sqe->opcode = PU_OPCODE_WRITE;
		sqe->flags = SQE_ASYNC;
		sqe->fd = job->fd;
		sqe->addr = (uint64_t)(uintptr_t)text;
		sqe->len = (uint32_t)strlen(text);
	} else {
		fill_command(job, sqe);
	}
	error = submit();
	/* What is busy takes it later, from the loop; what refuses must not find it there next time. */
	if (error < 0 && error != -EAGAIN && error != -EBUSY) {
		ring.sq_tail--;
		answer(job, PU_CONTROL_SUBMIT, error);
	}
}

static void call_off(struct job *job)
{
	struct pu_sqe *sqe;

	job->abandoned = true;
	if (ring.fd < 0 || !(sqe = entry()))
		return;
	sqe->opcode = OPCODE_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = (uint64_t)(uintptr_t)job;
	sqe->user_data = 0;
	submit();
}

/* ---- the end of a disk ---- */

/* Step by step: STOP_DEV first, since a DEL_DEV that hangs in it would lock up every other disk of the
 * machine; and nothing before the cookie tells that the device is still the one meant. */
static void delete_device(uint32_t id, uint64_t cookie, bool unserved)
{
	struct pu_ask ask = { .cookie = cookie, .cmd = { .dev_id = id } };
	struct job *job = new_job(&ask, CHECK, NAME_BYTES + sizeof(struct pu_dev_info));

	if (job) {
		job->unserved = unserved;
		snprintf((char *)job->payload, NAME_BYTES, "/dev/ublkc%u", id);
		go(job);
	}
}

static bool to_be_deleted(const struct job *job)
{
	struct pu_dev_info info;

	memcpy(&info, job->payload + NAME_BYTES, sizeof(info));
	if (info.server_flags != job->ask.cookie)
		return false;
	/* Some kernels go on naming the server that has ended. */
	return !job->unserved || info.server_pid <= 0 || info.server_pid == server_pid;
}

static void deletion_goes_on(struct job *job, int result)
{
	if (job->step == CHECK && !job->named && (result == -EINVAL || result == -EPERM)) {
		job->named = true;
		go(job);
	} else if (job->step == CHECK && (result < 0 || !to_be_deleted(job))) {
		end(job);
	} else if (job->step == DELETE) {
		end(job);
	} else {
		job->step++;
		go(job);
	}
}

/* The guarded that are not to be served again, or cannot be. */
static void delete_guarded(bool all)
{
	for (struct guarded *one = guarded, *next; one; one = next) {
		next = one->next;
		if (all || !one->restarted) {
			delete_device(one->id, one->cookie, one->restarted);
			unguard(one->id);
		}
	}
}

static void restart_is(enum restart_state state)
{
	if (state == RESTART_GIVEN_UP)
		delete_guarded(true);
	while (state == RESTART_DONE && guarded)
		unguard(guarded->id);
}

static void server_ended(void)
{
	server_gone = true;
	for (struct job *job = jobs; job; job = job->next)
		if (job->step == COMMAND || job->step == OPEN || job->step == WRITE)
			call_off(job);
	delete_guarded(!restart_has_program());
	if (guarded)
		restart_is(restart_begin(server_hung));
}

/* ---- a server that hangs ---- */

/* Only one that serves the disk hangs: it is the kernel that says so, before anybody is killed. */
static void look_for_hangs(void)
{
	for (struct guarded *one = guarded; one; one = one->next)
		if (hang_seen(one)) {
			struct pu_ask ask = { .cookie = one->cookie, .cmd = { .dev_id = one->id } };
			struct job *job = new_job(&ask, LOOK, sizeof(struct pu_dev_info));

			if (job)
				go(job);
		}
}

static void end_hang(struct job *job, int result)
{
	struct pu_dev_info info;

	memcpy(&info, job->payload, sizeof(info));
	if (result >= 0 && info.server_flags == job->ask.cookie && info.state == PU_STATE_LIVE &&
	    info.server_pid == server_pid && !server_gone) {
		server_hung = true;
		syscall(SYS_pidfd_send_signal, server, SIGKILL, NULL, 0);
	}
	end(job);
}

/* ---- completions ---- */

static void command_ended(struct job *job, int result)
{
	uint32_t op = job->ask.cmd_op;

	if (op == PU_CMD_ADD_DEV && result >= 0) {
		struct pu_dev_info info;

		memcpy(&info, job->payload, sizeof(info));
		if (job->abandoned) /* nobody else will ever know of it */
			delete_device(info.dev_id, info.server_flags, false);
		else if (job->ask.flags & PU_ASK_GUARDED)
			guard(&(struct pu_ask){ .cookie = info.server_flags,
						.cmd = { .dev_id = info.dev_id } }, -1);
	}
	if ((op == PU_CMD_DEL_DEV || op == PU_CMD_DEL_DEV_ASYNC) && (result >= 0 || result == -ENODEV))
		unguard(job->ask.cmd.dev_id);
	answer(job, PU_CONTROL_DONE, result);
}

static void ended(struct job *job, int result)
{
	if (job->step == COMMAND) {
		command_ended(job, result);
	} else if (job->step == OPEN && result >= 0) {
		job->fd = result;
		job->step = WRITE;
		if (job->abandoned)
			answer(job, PU_CONTROL_DONE, -ECANCELED);
		else
			go(job);
	} else if (job->step == OPEN || job->step == WRITE) {
		answer(job, PU_CONTROL_DONE, result < 0 ? result : 0);
	} else if (job->step == LOOK) {
		end_hang(job, result);
	} else {
		deletion_goes_on(job, result);
	}
}

static void reap(void)
{
	while (ring.fd >= 0 && pu_ring_ready(&ring)) {
		const struct pu_cqe *cqe = pu_ring_cqe(&ring, 0);
		struct job *job = (struct job *)(uintptr_t)cqe->user_data;
		int result = cqe->res;

		pu_ring_advance(&ring, 1);
		if (job) /* else: the end of a cancellation */
			ended(job, result);
	}
}

/* ---- messages ---- */

static bool map_memory(struct job *job, int fd)
{
	int protection = PROT_READ | (job->ask.flags & PU_ASK_READ_ONLY ? 0 : PROT_WRITE);
	void *map = mmap(NULL, job->ask.file_bytes, protection, MAP_SHARED, fd,
			 (off_t)job->ask.file_offset);
	uint64_t address = (uint64_t)(uintptr_t)map;

	if (map == MAP_FAILED)
		return false;
	job->map = map;
	memcpy(job->payload, &address, sizeof(address)); /* ublk_shmem_buf_reg.addr */
	return true;
}

/* For what is done at once, and has no job. */
static void acknowledge(const struct pu_ask *ask, int result)
{
	struct pu_answer done = { ask->id, PU_CONTROL_DONE, result };
	struct iovec part = { &done, sizeof(done) };

	if (ask->id)
		tell(&(struct msghdr){ .msg_iov = &part, .msg_iovlen = 1 });
}

static void obey(const struct pu_ask *ask, const void *payload, size_t bytes, int fd)
{
	struct job *job;

	switch (ask->kind) {
	case PU_ASK_NODE:
		if (node >= 0)
			close(node);
		node = fd;
		return;
	case PU_ASK_GUARD:
		acknowledge(ask, guard(ask, fd));
		return;
	case PU_ASK_PROGRAM:
		acknowledge(ask, fd < 0 ? -EBADF : restart_take_program(fd));
		return;
	case PU_ASK_UNGUARD:
		unguard(ask->cmd.dev_id);
		acknowledge(ask, 0);
		return;
	case PU_ASK_CANCEL:
		for (job = jobs; job; job = job->next)
			if (job->ask.id == ask->id && job->step <= WRITE)
				call_off(job);
		return;
	}
	/* calloc ends a path and a text that were sent without their ends. */
	job = new_job(ask, ask->kind == PU_ASK_WRITE ? OPEN : COMMAND, bytes);
	if (!job) {
		struct pu_answer none = { ask->id, PU_CONTROL_SUBMIT, -ENOMEM };
		struct iovec part = { &none, sizeof(none) };

		tell(&(struct msghdr){ .msg_iov = &part, .msg_iovlen = 1 });
	} else {
		memcpy(job->payload, payload, bytes);
		if (ask->flags & PU_ASK_MEMORY && !map_memory(job, fd))
			answer(job, PU_CONTROL_DONE, -errno);
		else
			go(job);
	}
	if (fd >= 0)
		close(fd);
}

/* The program that we may execute gets such a file by its number, which must not be that of its output. */
static int above_standard(int fd)
{
	int higher;

	if (fd < 0 || fd > 2)
		return fd;
	higher = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (higher < 0)
		return fd;
	close(fd);
	return higher;
}

/* False: the other end is closed. */
static bool listen_to_server(void)
{
	static uint8_t buffer[PU_MESSAGE_BYTES];
	union {
		struct cmsghdr head;
		uint8_t room[CMSG_SPACE(sizeof(int))];
	} along;
	struct iovec part = { buffer, sizeof(buffer) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &along,
				  .msg_controllen = sizeof(along) };
	ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct pu_ask ask;
	int fd = -1;

	if (got < 0)
		return errno == EAGAIN || errno == EINTR;
	if (got < (ssize_t)sizeof(ask))
		return false;
	if (message.msg_controllen >= CMSG_LEN(sizeof(int)) && along.head.cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(&along.head), sizeof(fd));
	fd = above_standard(fd);
	memcpy(&ask, buffer, sizeof(ask));
	obey(&ask, buffer + sizeof(ask), (size_t)got - sizeof(ask), fd);
	return true;
}

/* ---- the whole ---- */

/* What may be had, may: neither is a reason to fail. */
static void be_small_and_last(void)
{
	int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
	char before[16] = "";

	if (fd >= 0) {
		if (read(fd, before, sizeof(before) - 1) > 0)
			restart_with_oom_score(before);
		if (pwrite(fd, "-1000", 5, 0) < 0)
			(void)0; /* without CAP_SYS_RESOURCE; it is small, and so not the first */
		close(fd);
	}
	mlockall(MCL_CURRENT | MCL_ONFAULT); /* not all of the C library for its few pages */
}

static bool needed(void)
{
	for (struct job *job = jobs; job; job = job->next)
		if (job->step >= CHECK || job->ask.cmd_op == PU_CMD_ADD_DEV)
			return true;
	return guarded != NULL;
}

static void know_server(void)
{
	struct ucred peer = { 0 };
	socklen_t size = sizeof(peer);

	getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	server_pid = peer.pid;
	fcntl(sock, F_SETFD, FD_CLOEXEC);
	fcntl(server, F_SETFD, FD_CLOEXEC);
}

/* Milliseconds until something is due that no descriptor tells of. */
static int wait_at_most(bool pending)
{
	int due[] = { pending ? 10 : -1, server_gone ? -1 : hang_next_look(), restart_next_start() };
	int least = -1;

	for (int i = 0; i < 3; i++)
		if (due[i] >= 0 && (least < 0 || due[i] < least))
			least = due[i];
	return least;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	sock = atoi(argv[1]);
	server = atoi(argv[2]);
	know_server();
	/* All of them lie one after the other. */
	guarded_shown(argv[0], (size_t)(argv[2] + strlen(argv[2]) - argv[0]), server_pid);
	if (chdir("/") < 0)
		return 1;
	open_ring();
	be_small_and_last();
	for (bool closed = false; !(server_gone || closed) || needed();) {
		/* One that is not to be asked any more is not looked at. */
		struct pollfd ready[] = { { .fd = server_gone ? -1 : server, .events = POLLIN },
					  { .fd = closed ? -1 : sock, .events = POLLIN },
					  { .fd = ring.fd, .events = POLLIN },
					  { .fd = restart_pidfd(), .events = POLLIN } };
		bool pending = ring.fd >= 0 && pu_ring_unsubmitted(&ring);

		poll(ready, 4, wait_at_most(pending));
		if (pending)
			submit();
		reap();
		if (ready[1].revents)
			closed = !listen_to_server();
		if (ready[0].revents)
			server_ended();
		else if (server_gone)
			restart_is(restart_go_on());
		else
			look_for_hangs();
	}
	_exit(0);
}
