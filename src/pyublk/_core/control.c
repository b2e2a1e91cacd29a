/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "forked.h"
#include "spawn.h"

#ifndef P_PIDFD
#define P_PIDFD 3
#endif
#ifndef __WALL
#define __WALL 0x40000000
#endif

#define CALLED_OFF_MS 200 /* for the kernel to let go of what can be interrupted */
#define ENDED_MS 1000	  /* for a helper that nobody needs any more to end */

struct guarded {
	struct guarded *next;
	uint32_t id, flags, hang_ms;
	uint64_t cookie;
	int memory; /* -1: none */
};

struct pu_helper {
	int process;
	uint32_t users;
	pthread_t watcher;
	pthread_mutex_t lock; /* guards all below */
	pthread_cond_t changed;
	bool over;
	char *program;
	int sock, pidfd, pid; /* -1: none now */
	int node;	      /* the control node, our own; -1: not yet */
	int restarter;	      /* the file of PU_ASK_PROGRAM; -1: none */
	uint64_t last_id;
	struct pu_control *calls;
	struct guarded *guarded;
};

static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static struct pu_helper *shared;
static void (*tell)(int pid);

/* ---- the other end ---- */

static void let_go(struct pu_helper *h)
{
	siginfo_t info;

	if (h->sock < 0)
		return;
	pu_fork_drop(h->sock);
	pu_fork_drop(h->pidfd);
	close(h->sock);
	/* Ours only where orphans are: in the first process of a container. */
	syscall(SYS_waitid, P_PIDFD, h->pidfd, &info, WEXITED | WNOHANG | __WALL, NULL);
	close(h->pidfd);
	h->sock = h->pidfd = -1;
	h->pid = 0;
}

/* Nobody waits for room: the caller comes again. */
static int post(struct pu_helper *h, const struct pu_ask *ask, const void *payload, size_t bytes, int fd)
{
	union {
		struct cmsghdr head;
		uint8_t room[CMSG_SPACE(sizeof(int))];
	} along = { .head = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
			      .cmsg_type = SCM_RIGHTS } };
	struct iovec parts[] = { { (void *)(uintptr_t)ask, sizeof(*ask) },
				 { (void *)(uintptr_t)payload, bytes } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = bytes ? 2 : 1 };

	if (fd >= 0) {
		memcpy(CMSG_DATA(&along.head), &fd, sizeof(fd));
		message.msg_control = &along;
		message.msg_controllen = sizeof(along);
	}
	if (h->sock < 0)
		return -EPIPE;
	return sendmsg(h->sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

static int post_patiently(struct pu_helper *h, const struct pu_ask *ask, const void *payload,
			  size_t bytes, int fd)
{
	int error;

	/* Whoever answers it needs the lock meanwhile, to make room. */
	for (int turn = 0; (error = post(h, ask, payload, bytes, fd)) == -EAGAIN && turn < 100; turn++) {
		struct pollfd room = { .fd = h->sock, .events = POLLOUT };

		pthread_mutex_unlock(&h->lock);
		poll(&room, 1, 100);
		pthread_mutex_lock(&h->lock);
	}
	return error;
}

static int show_node(struct pu_helper *h)
{
	struct pu_ask ask = { .kind = PU_ASK_NODE };

	return post_patiently(h, &ask, NULL, 0, h->node);
}

static int start(struct pu_helper *h)
{
	int error = pu_spawn_helper(h->program, &h->sock, &h->pidfd, &h->pid);

	if (error) {
		h->sock = h->pidfd = -1;
		return error;
	}
	if (h->node >= 0)
		show_node(h);
	if (h->restarter >= 0) {
		struct pu_ask ask = { .kind = PU_ASK_PROGRAM };

		post_patiently(h, &ask, NULL, 0, h->restarter);
	}
	for (struct guarded *one = h->guarded; one; one = one->next) {
		struct pu_ask ask = { .kind = PU_ASK_GUARD, .flags = one->flags,
				      .hang_ms = one->hang_ms, .cookie = one->cookie,
				      .cmd = { .dev_id = one->id } };

		post_patiently(h, &ask, NULL, 0, one->memory);
	}
	return 0;
}

/* ---- guarded devices, for a helper that has to begin anew ---- */

/* A descriptor of our own for a caller's file; a forked child has it not. */
static int keep_file(int fd)
{
	int kept;

	pu_fork_hold();
	kept = pu_fork_add(fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0));
	pu_fork_release();
	return kept;
}

static void drop_file(int fd)
{
	if (fd < 0)
		return;
	pu_fork_drop(fd);
	close(fd);
}

static void unguard(struct pu_helper *h, uint32_t id)
{
	for (struct guarded **at = &h->guarded; *at; at = &(*at)->next)
		if ((*at)->id == id) {
			struct guarded *old = *at;

			*at = old->next;
			drop_file(old->memory);
			free(old);
			return;
		}
}

static void guard(struct pu_helper *h, struct guarded wanted)
{
	struct guarded *new = malloc(sizeof(*new));

	unguard(h, wanted.id);
	if (!new)
		return;
	*new = wanted;
	new->next = h->guarded;
	new->memory = keep_file(wanted.memory);
	h->guarded = new;
}

static void set_restarter(struct pu_helper *h, int file)
{
	drop_file(h->restarter);
	h->restarter = keep_file(file);
}

static void note_devices(struct pu_helper *h, const struct pu_control *call)
{
	if (call->stage != PU_CONTROL_DONE)
		return;
	if (call->kind == PU_ASK_GUARD && call->result >= 0) {
		guard(h, (struct guarded){ .id = call->device, .cookie = call->cookie,
					   .flags = call->flags, .hang_ms = call->hang_ms,
					   .memory = call->memory });
	} else if (call->kind == PU_ASK_PROGRAM && call->result >= 0) {
		set_restarter(h, call->memory);
	} else if (call->kind == PU_ASK_UNGUARD) {
		unguard(h, call->device);
	} else if (call->kind != PU_ASK_COMMAND) {
		return;
	} else if (call->cmd_op == PU_CMD_ADD_DEV && call->flags & PU_ASK_GUARDED && call->result >= 0) {
		struct pu_dev_info info;

		memcpy(&info, call->buffer, sizeof(info));
		guard(h, (struct guarded){ .id = info.dev_id, .cookie = info.server_flags, .memory = -1 });
	} else if ((call->cmd_op == PU_CMD_DEL_DEV || call->cmd_op == PU_CMD_DEL_DEV_ASYNC) &&
		   (call->result >= 0 || call->result == -ENODEV)) {
		unguard(h, call->device);
	}
}

/* ---- the thread that takes what the helper says ---- */

static void end_call(struct pu_helper *h, struct pu_control *call, int32_t stage, int32_t result)
{
	struct pu_control **at = &h->calls;

	while (*at != call)
		at = &(*at)->next;
	*at = call->next;
	call->stage = stage;
	call->result = result;
	call->done = true;
}

/* False: there is no other end any more. */
static bool take_answers(struct pu_helper *h)
{
	static uint8_t payload[PU_MESSAGE_BYTES]; /* this thread's alone */
	struct pu_answer answer;
	struct iovec parts[] = { { &answer, sizeof(answer) }, { payload, sizeof(payload) } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

	for (;;) {
		ssize_t got = recvmsg(h->sock, &message, MSG_DONTWAIT);

		if (got < (ssize_t)sizeof(answer))
			return got < 0 && (errno == EAGAIN || errno == EINTR);
		for (struct pu_control *call = h->calls; call; call = call->next) {
			size_t bytes = (size_t)got - sizeof(answer);

			if (call->id != answer.id)
				continue;
			memcpy(call->buffer, payload, bytes < call->bytes ? bytes : call->bytes);
			end_call(h, call, answer.stage, answer.result);
			note_devices(h, call);
			break;
		}
	}
}

static void pause_ms(int ms)
{
	poll(NULL, 0, ms);
}

static void *watch(void *of)
{
	struct pu_helper *h = of;

	pthread_mutex_lock(&h->lock);
	while (!h->over) {
		struct pollfd ready[] = { { .fd = h->sock, .events = POLLIN },
					  { .fd = h->pidfd, .events = POLLIN } };

		pthread_mutex_unlock(&h->lock);
		poll(ready, 2, h->sock < 0 ? ENDED_MS / 2 : -1);
		pthread_mutex_lock(&h->lock);
		if (h->over)
			break;
		if (h->sock < 0) {
			if (h->guarded)
				start(h);
			continue;
		}
		if (take_answers(h) && !ready[1].revents) {
			pthread_cond_broadcast(&h->changed);
			continue;
		}
		while (h->calls)
			end_call(h, h->calls, PU_CONTROL_DONE, PU_CONTROL_KILLED);
		let_go(h);

		int error = start(h), pid = h->pid;

		pthread_cond_broadcast(&h->changed);
		pthread_mutex_unlock(&h->lock);
		if (tell)
			tell(error ? error : pid);
		pause_ms(100); /* one that always ends at once must not keep us busy */
		pthread_mutex_lock(&h->lock);
	}
	/* Told by the closed socket to end, and gone when this process looks for what it left. */
	shutdown(h->sock, SHUT_RDWR);
	poll(&(struct pollfd){ .fd = h->pidfd, .events = POLLIN }, h->sock < 0 ? 0 : 1, ENDED_MS);
	let_go(h);
	pthread_mutex_unlock(&h->lock);
	return NULL;
}

static int start_watching(struct pu_helper *h)
{
	sigset_t all, before;
	int error;

	sigfillset(&all); /* signals are for threads that Python knows */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&h->watcher, NULL, watch, h);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -error;
}

/* ---- users ---- */

static void dispose(struct pu_helper *h)
{
	while (h->guarded)
		unguard(h, h->guarded->id);
	if (h->node >= 0)
		close(h->node);
	drop_file(h->restarter);
	pthread_cond_destroy(&h->changed);
	pthread_mutex_destroy(&h->lock);
	free(h->program);
	free(h);
}

static int make(struct pu_helper **helper, const char *program)
{
	struct pu_helper *h = calloc(1, sizeof(*h));
	pthread_condattr_t monotonic;
	int error;

	if (!h)
		return -ENOMEM;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&h->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_mutex_init(&h->lock, NULL);
	h->process = pu_process();
	h->sock = h->pidfd = h->node = h->restarter = -1;
	h->program = strdup(program);
	error = h->program ? start(h) : -ENOMEM;
	if (!error)
		error = start_watching(h);
	if (error) {
		let_go(h);
		dispose(h);
		return error;
	}
	*helper = h;
	return 0;
}

static int give_node(struct pu_helper *h, int node)
{
	int error = 0;

	pthread_mutex_lock(&h->lock);
	if (h->node < 0) {
		h->node = fcntl(node, F_DUPFD_CLOEXEC, 0);
		error = h->node < 0 ? -errno : show_node(h);
		if (error == -EPIPE || error == -ECONNRESET)
			error = 0; /* killed: the next one is shown it at its start */
	}
	pthread_mutex_unlock(&h->lock);
	return error;
}

static void put(struct pu_helper *h)
{
	if (--h->users)
		return;
	shared = NULL;
	pthread_mutex_lock(&h->lock);
	h->over = true;
	/* While there are devices to guard, a closed socket does not end it: we may. */
	shutdown(h->sock, SHUT_RDWR);
	pthread_mutex_unlock(&h->lock);
	pthread_join(h->watcher, NULL);
	dispose(h);
}

int pu_helper_get(struct pu_helper **helper, const char *program, int node)
{
	int error = 0;

	pthread_mutex_lock(&shared_lock);
	if (!shared)
		error = make(&shared, program);
	if (!error) {
		shared->users++;
		*helper = shared;
		if (node >= 0)
			error = give_node(shared, node);
		if (error)
			put(shared);
	}
	pthread_mutex_unlock(&shared_lock);
	return error;
}

void pu_helper_put(struct pu_helper *h)
{
	if (!pu_helper_is_ours(h))
		return;
	pthread_mutex_lock(&shared_lock);
	put(h);
	pthread_mutex_unlock(&shared_lock);
}

int pu_helper_pid(struct pu_helper *h)
{
	pthread_mutex_lock(&h->lock);
	int pid = h->pid;
	pthread_mutex_unlock(&h->lock);
	return pid;
}

bool pu_helper_is_ours(const struct pu_helper *h)
{
	return h->process == pu_process();
}

void pu_helper_tell(void (*killed)(int pid))
{
	tell = killed;
}

/* A child has no thread that watches, and its copies of the descriptors are closed. */
static void in_child(void)
{
	pthread_mutex_init(&shared_lock, NULL);
	shared = NULL;
}

__attribute__((constructor)) static void look_out(void)
{
	pthread_atfork(NULL, NULL, in_child);
}

/* ---- commands ---- */

static int send_command(struct pu_helper *h, struct pu_ask *ask, const void *payload, size_t bytes,
			int memory)
{
	int error = h->sock < 0 ? start(h) : 0;

	return error ? error : post_patiently(h, ask, payload, bytes, memory);
}

int pu_control_begin(struct pu_control *control, struct pu_helper *h, struct pu_ask *ask,
		     const void *payload, size_t bytes, int memory)
{
	int error;

	if (bytes > PU_MESSAGE_BYTES - sizeof(*ask))
		return -EMSGSIZE;
	*control = (struct pu_control){ .helper = h, .bytes = bytes, .kind = ask->kind,
					.cmd_op = ask->cmd_op, .flags = ask->flags,
					.device = ask->cmd.dev_id, .hang_ms = ask->hang_ms,
					.memory = memory, .cookie = ask->cookie };
	control->buffer = malloc(bytes ? bytes : 1);
	if (!control->buffer)
		return -ENOMEM;
	pthread_mutex_lock(&h->lock);
	control->id = ask->id = ++h->last_id;
	control->next = h->calls;
	h->calls = control;
	error = send_command(h, ask, payload, bytes, memory);
	/* The helper may have ended between two commands, and a new one knows of none before. */
	if (error == -EPIPE || error == -ECONNRESET) {
		struct timespec soon;

		clock_gettime(CLOCK_MONOTONIC, &soon);
		soon.tv_sec += 10;
		while (!control->done && pthread_cond_timedwait(&h->changed, &h->lock, &soon) == 0)
			;
		if (control->done) {
			control->done = false;
			control->next = h->calls;
			h->calls = control;
			error = send_command(h, ask, payload, bytes, memory);
		}
	}
	if (error && !control->done)
		end_call(h, control, PU_CONTROL_STARTING, error);
	pthread_mutex_unlock(&h->lock);
	if (error)
		free(control->buffer);
	return error;
}

int pu_control_wait(struct pu_control *control, int timeout_ms)
{
	struct pu_helper *h = control->helper;
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += timeout_ms % 1000 * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&h->lock);
	while (!control->done && pthread_cond_timedwait(&h->changed, &h->lock, &until) == 0)
		;
	bool done = control->done;
	pthread_mutex_unlock(&h->lock);
	return done;
}

bool pu_control_end(struct pu_control *control)
{
	struct pu_helper *h = control->helper;
	struct pu_ask off = { .kind = PU_ASK_CANCEL, .id = control->id };
	bool ended;

	pthread_mutex_lock(&h->lock);
	if (!control->done && h->sock >= 0)
		post_patiently(h, &off, NULL, 0, -1);
	pthread_mutex_unlock(&h->lock);
	pu_control_wait(control, CALLED_OFF_MS);
	pthread_mutex_lock(&h->lock);
	ended = control->done;
	if (!ended)
		end_call(h, control, PU_CONTROL_STARTING, 0);
	pthread_mutex_unlock(&h->lock);
	free(control->buffer);
	return ended;
}
