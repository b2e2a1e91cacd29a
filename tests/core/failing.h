/* SPDX-License-Identifier: MIT
 * System calls and allocations that fail when they are told to: the linker puts these before the C
 * library's (--wrap, see test_core.py). They also count what is given back.
 */
#ifndef PU_FAILING_H
#define PU_FAILING_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "check.h"

#define MOST_WAYS 5
#define SHORT 1 /* no errno: a transfer of less than was asked for */

/* The call that fails, counted from 1, and which of its ways to fail it takes. */
static int failing_call, failing_way;
static int calls; /* so far; < 0: none counts */
static const char *failed; /* the function that was told to fail */
static int failed_with;
static long allocations, mappings; /* not given back */

static inline void fail_call(int call, int way)
{
	failing_call = call;
	failing_way = way;
	calls = 0;
	failed = NULL;
	failed_with = 0;
}

static inline void fail_nothing(void)
{
	calls = -1;
}

static inline bool fails(const char *name, const int ways[MOST_WAYS])
{
	if (calls < 0 || ++calls != failing_call || !ways[failing_way])
		return false;
	failed = name;
	failed_with = errno = ways[failing_way];
	return true;
}

#define FAILS(...) fails(__func__ + sizeof("__wrap"), (const int[MOST_WAYS]){ __VA_ARGS__ })

/* A call that only fails. */
#define WRAP(type, failure, name, parameters, arguments, ...)                   \
	type __real_##name parameters;                                          \
	type __wrap_##name parameters;                                          \
	type __wrap_##name parameters                                           \
	{                                                                       \
		return FAILS(__VA_ARGS__) ? (failure) : __real_##name arguments; \
	}

/* One whose results are counted. */
#define WRAP_ALLOCATION(name, parameters, arguments)                            \
	void *__real_##name parameters;                                         \
	void *__wrap_##name parameters;                                         \
	void *__wrap_##name parameters                                          \
	{                                                                       \
		void *memory = FAILS(ENOMEM) ? NULL : __real_##name arguments;  \
                                                                                \
		allocations += memory != NULL;                                  \
		return memory;                                                  \
	}

WRAP_ALLOCATION(malloc, (size_t bytes), (bytes))
WRAP_ALLOCATION(calloc, (size_t count, size_t bytes), (count, bytes))
WRAP_ALLOCATION(aligned_alloc, (size_t alignment, size_t bytes), (alignment, bytes))

void *__real_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes)
{
	void *more = FAILS(ENOMEM) ? NULL : __real_realloc(memory, bytes);

	allocations += more && !memory;
	return more;
}

void __real_free(void *memory);
void __wrap_free(void *memory);
void __wrap_free(void *memory)
{
	allocations -= memory != NULL;
	__real_free(memory);
}

void *__real_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset)
{
	void *map = FAILS(ENOMEM, EAGAIN) ? MAP_FAILED :
					    __real_mmap(at, bytes, access, flags, fd, offset);

	mappings += map != MAP_FAILED && !(flags & MAP_FIXED);
	return map;
}

int __real_munmap(void *at, size_t bytes);
int __wrap_munmap(void *at, size_t bytes);
int __wrap_munmap(void *at, size_t bytes)
{
	mappings--;
	return __real_munmap(at, bytes);
}

/* Also one that fails closes. */
int __real_close(int fd);
int __wrap_close(int fd);
int __wrap_close(int fd)
{
	int result = __real_close(fd);

	return FAILS(EIO, EINTR) ? -1 : result;
}

int __real_prctl(int option, ...);
int __wrap_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
int __wrap_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
{
	return FAILS(EPERM) ? -1 : __real_prctl(option, a, b, c, d);
}

WRAP(int, -1, madvise, (void *at, size_t bytes, int advice), (at, bytes, advice), ENOMEM)
WRAP(int, -1, mprotect, (void *at, size_t bytes, int access), (at, bytes, access), ENOMEM)
WRAP(int, -1, mincore, (void *at, size_t bytes, unsigned char *there), (at, bytes, there), ENOMEM)
WRAP(int, -1, fstat, (int fd, struct stat *about), (fd, about), EIO)
WRAP(int, -1, dup3, (int from, int to, int flags), (from, to, flags), EBUSY)
WRAP(int, -1, eventfd, (unsigned value, int flags), (value, flags), EMFILE, ENOMEM)
WRAP(int, -1, ppoll, (void *fds, unsigned long count, void *limit, void *mask),
     (fds, count, limit, mask), EINTR, ENOMEM)
WRAP(int, -1, fallocate, (int fd, int mode, off_t at, off_t length), (fd, mode, at, length),
     EOPNOTSUPP, ENOSPC, EINTR)
WRAP(int, -1, fdatasync, (int fd), (fd), EIO)
WRAP(ssize_t, -1, preadv, (int fd, const struct iovec *to, int count, off_t at),
     (fd, to, count, at), EIO, EINTR)
WRAP(ssize_t, -1, pwritev2, (int fd, const struct iovec *from, int count, off_t at, int flags),
     (fd, from, count, at, flags), EIO, EINTR, ENOSPC)

ssize_t __real_pread(int fd, void *to, size_t length, off_t at);
ssize_t __wrap_pread(int fd, void *to, size_t length, off_t at);
ssize_t __wrap_pread(int fd, void *to, size_t length, off_t at)
{
	if (FAILS(EIO, EINTR, SHORT)) {
		if (failed_with != SHORT)
			return -1;
		length = length / 1024 * 512;
	}
	return __real_pread(fd, to, length, at);
}

ssize_t __real_pwrite(int fd, const void *from, size_t length, off_t at);
ssize_t __wrap_pwrite(int fd, const void *from, size_t length, off_t at);
ssize_t __wrap_pwrite(int fd, const void *from, size_t length, off_t at)
{
	if (FAILS(EIO, EINTR, SHORT)) {
		if (failed_with != SHORT)
			return -1;
		length = length / 1024 * 512;
	}
	return __real_pwrite(fd, from, length, at);
}

/* What looks at the entries that the kernel is about to take. */
static void (*before_enter)(int fd, uint32_t count);

static inline bool fails_as(long number)
{
	switch (number) {
	case SYS_io_uring_setup:
		return FAILS(ENOMEM, EMFILE, EPERM, EINVAL);
	case SYS_io_uring_register:
		return FAILS(ENOMEM, EINTR, EBUSY);
	case SYS_io_uring_enter:
		return FAILS(EAGAIN, EINTR, EBUSY, EPERM, SHORT);
	default:
		return false;
	}
}

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
/* Takes more arguments than some callers pass. */
__attribute__((no_sanitize("address"))) long __wrap_syscall(long number, ...)
{
	long argument[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		argument[i] = va_arg(list, long);
	va_end(list);
	if (fails_as(number)) {
		failed = number == SYS_io_uring_enter ? "io_uring_enter" : "io_uring";
		if (failed_with != SHORT)
			return -1;
		argument[1] /= 2; /* entries, of which the kernel takes some, and then does not wait */
		argument[2] = 0;
	}
	if (number == SYS_io_uring_enter && before_enter)
		before_enter((int)argument[0], (uint32_t)argument[1]);
	return __real_syscall(number, argument[0], argument[1], argument[2], argument[3],
			      argument[4], argument[5]);
}

#endif
