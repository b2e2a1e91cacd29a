/* SPDX-License-Identifier: MIT
 * System calls that an old C library has no functions for: wheels are linked with glibc 2.17, so
 * that they run wherever there is a newer one. Include it in place of the headers that it names.
 * Their names are macros, since some headers for an old library declare them all the same.
 */
#ifndef PU_LIBC_H
#define PU_LIBC_H

#include <fcntl.h>
#include <sys/mman.h> /* memfd_create */
#include <sys/syscall.h>
#include <sys/uio.h> /* pwritev2 */
#include <unistd.h>  /* gettid */

#ifdef __GLIBC__
#if !__GLIBC_PREREQ(2, 26)
#include <linux/fs.h> /* RWF_DSYNC */

static inline ssize_t pu_pwritev2(int fd, const struct iovec *from, int count, off_t at, int flags)
{
	/* The offset's upper half comes by itself, and is nothing where a long holds all of it. */
	return syscall(SYS_pwritev2, fd, from, count, (long)at, 0L, flags);
}
#define pwritev2 pu_pwritev2
#endif

#if !__GLIBC_PREREQ(2, 27)
#include <linux/memfd.h> /* MFD_CLOEXEC */

static inline int pu_memfd_create(const char *name, unsigned int flags)
{
	return (int)syscall(SYS_memfd_create, name, flags);
}
#define memfd_create pu_memfd_create
#endif

#if !__GLIBC_PREREQ(2, 30)
static inline pid_t pu_gettid(void)
{
	return (pid_t)syscall(SYS_gettid);
}
#define gettid pu_gettid
#endif
#endif

#endif
