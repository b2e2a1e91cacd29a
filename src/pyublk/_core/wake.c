/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "wake.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

/* FUTEX2_SIZE_U32 (Linux 6.7). Not a private one: a process's private futexes get a table of their own
 * with its second thread (6.16), where what a ring has waited for since before is not found. */
#define FUTEX_FLAGS 2

static bool futexes_are_known(const struct pu_ring *ring)
{
	static int known; /* < 0: no; 0: nobody has asked */
	int found = __atomic_load_n(&known, __ATOMIC_RELAXED);

	if (!found) {
		found = pu_ring_knows(ring, PU_OPCODE_FUTEX_WAIT) ? 1 : -1;
		__atomic_store_n(&known, found, __ATOMIC_RELAXED);
	}
	return found > 0;
}

int pu_wake_open(struct pu_wake *wake, const struct pu_ring *ring)
{
	*wake = (struct pu_wake){ .fd = -1 };
	if (ring && futexes_are_known(ring))
		return 0;
	wake->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	wake->closed = wake->fd < 0;
	return wake->fd < 0 ? -errno : 0;
}

void pu_wake_close(struct pu_wake *wake)
{
	wake->closed = true;
	if (wake->fd >= 0)
		close(wake->fd);
	wake->fd = -1;
}

int pu_wake_arm(struct pu_wake *wake, struct pu_ring *ring, uint64_t user_data)
{
	struct pu_sqe *sqe = pu_ring_next_sqe(ring);

	if (!sqe)
		return -EAGAIN;
	sqe->user_data = user_data;
	if (wake->fd >= 0) {
		sqe->opcode = PU_OPCODE_READ;
		sqe->fd = wake->fd;
		sqe->addr = (uint64_t)(uintptr_t)&wake->value;
		sqe->len = sizeof(wake->value);
	} else { /* a call that comes before the kernel takes it ends it at once */
		sqe->opcode = PU_OPCODE_FUTEX_WAIT;
		sqe->fd = FUTEX_FLAGS;
		sqe->addr = (uint64_t)(uintptr_t)&wake->calls;
		sqe->off = __atomic_load_n(&wake->calls, __ATOMIC_ACQUIRE);
		sqe->cmd[0] = FUTEX_BITSET_MATCH_ANY;
	}
	return 0;
}

void pu_wake_call(struct pu_wake *wake)
{
	if (wake->closed)
		return;
	if (wake->fd >= 0) {
		eventfd_write(wake->fd, 1);
		return;
	}
	__atomic_fetch_add(&wake->calls, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &wake->calls, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
