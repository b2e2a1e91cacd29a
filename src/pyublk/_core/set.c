/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "set.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define ENTRIES 64u
#define WAKE PU_USER_DATA(PU_KIND_WAKE, 0)
#define CANCEL PU_USER_DATA(PU_KIND_IDLE, 0)

static void bring(struct pu_set *set, uint32_t place)
{
	if (!set->members[place].due)
		set->ready[set->nr_ready++] = place;
	set->members[place].due = true;
}

static int open_table(struct pu_set *set, uint32_t room)
{
	int error;

	/* The table may have as many places as the process may have files. */
	while ((error = pu_ring_register_sparse_files(&set->ring, room)) == -EMFILE && room > 16)
		room /= 2;
	set->room = room;
	if (error < 0)
		return error;
	set->members = calloc(room, sizeof(*set->members));
	set->ready = calloc(room, sizeof(*set->ready));
	return set->members && set->ready ? 0 : -ENOMEM;
}

int pu_set_open(struct pu_set *set, uint32_t room)
{
	int error;

	*set = (struct pu_set){ .wake = { .fd = -1, .closed = true } };
	/* Each place has one completion at most, beside the wake and cancelled reads. */
	error = pu_ring_open(&set->ring, ENTRIES, ENTRIES + room, PU_SETUP_CLAMP,
			     PU_SETUP_OF_A_THREAD);
	if (error < 0) {
		set->ring.fd = -1;
		return error;
	}
	error = open_table(set, room);
	if (!error)
		error = pu_wake_open(&set->wake, &set->ring);
	if (!error)
		error = pu_wake_arm(&set->wake, &set->ring, WAKE);
	if (error)
		pu_set_close(set);
	return error;
}

void pu_set_close(struct pu_set *set)
{
	pu_ring_close(&set->ring);
	pu_wake_close(&set->wake);
	free(set->members);
	free(set->ready);
	set->members = NULL;
	set->ready = NULL;
}

/* Not one whose last read may still end. */
static int find_place(struct pu_set *set)
{
	for (uint32_t place = 0; place < set->used; place++)
		if (!set->members[place].queue && !set->members[place].armed)
			return (int)place;
	return set->used < set->room ? (int)set->used++ : -ENOSPC;
}

/* What tells of a queue, under a number of the table instead of one of the process. */
static int watch(struct pu_set *set, struct pu_queue *q, uint32_t place)
{
	int fd, error;

	if (q->ring.fd < 0) {
		pu_wake_call(&q->wake);
		return pu_ring_update_file(&set->ring, place, q->wake.fd);
	}
	fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fd < 0)
		return -errno;
	error = pu_ring_register(&q->ring, PU_REGISTER_EVENTFD, &fd, 1);
	if (error >= 0)
		error = pu_ring_update_file(&set->ring, place, fd);
	eventfd_write(fd, 1); /* of what came before */
	close(fd);
	return error < 0 ? error : 0;
}

/* False: the ring takes nothing now. What came before the read counts. */
static bool arm(struct pu_set *set, uint32_t place)
{
	struct pu_member *member = &set->members[place];
	struct pu_sqe *sqe = pu_ring_next_sqe(&set->ring);

	if (!sqe)
		return false;
	sqe->opcode = PU_OPCODE_READ;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->fd = (int32_t)place;
	sqe->addr = (uint64_t)(uintptr_t)&member->events;
	sqe->len = sizeof(member->events);
	sqe->user_data = place;
	member->armed = true;
	return true;
}

int pu_set_add(struct pu_set *set, struct pu_queue *q)
{
	int place = find_place(set), error;

	if (place < 0)
		return place;
	error = watch(set, q, (uint32_t)place);
	if (error < 0)
		return error;
	set->members[place].queue = q;
	bring(set, (uint32_t)place);
	return place;
}

void pu_set_remove(struct pu_set *set, uint32_t place)
{
	struct pu_member *member = &set->members[place];
	struct pu_sqe *sqe;

	member->queue = NULL;
	pu_ring_update_file(&set->ring, place, -1);
	if (!member->armed || !(sqe = pu_ring_next_sqe(&set->ring)))
		return;
	sqe->opcode = PU_OPCODE_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = place;
	sqe->user_data = CANCEL;
}

static void take(struct pu_set *set, const struct pu_cqe *cqe)
{
	struct pu_member *member;

	if (cqe->user_data == WAKE) {
		pu_wake_arm(&set->wake, &set->ring, WAKE);
	} else if (cqe->user_data < set->room) {
		member = &set->members[cqe->user_data];
		member->armed = false;
		if (member->queue)
			bring(set, (uint32_t)cqe->user_data);
	}
}

/* What the last wait brought is watched again, but for what has something left. */
static void watch_again(struct pu_set *set)
{
	uint32_t count = set->nr_ready;

	set->nr_ready = 0;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t place = set->ready[i];
		struct pu_member *member = &set->members[place];

		member->due = false;
		if (member->queue && (pu_queue_pending(member->queue) || !arm(set, place)))
			bring(set, place);
	}
}

int pu_set_wait(struct pu_set *set, int64_t timeout_ns)
{
	uint32_t there;
	int done;

	watch_again(set);
	if (set->nr_ready)
		timeout_ns = 0;
	done = pu_ring_submit(&set->ring, timeout_ns != 0, timeout_ns, 0);
	if (done < 0 && done != -ETIME && done != -EINTR && done != -EAGAIN && done != -EBUSY)
		return done;
	there = pu_ring_ready(&set->ring);
	for (uint32_t i = 0; i < there; i++)
		take(set, pu_ring_cqe(&set->ring, i));
	pu_ring_advance(&set->ring, there);
	return (int)set->nr_ready;
}

void pu_set_wake(struct pu_set *set)
{
	pu_wake_call(&set->wake);
}
