/* SPDX-License-Identifier: MIT
 * The time since some moment, in nanoseconds: CLOCK_MONOTONIC, as the kernel's own times are
 */
#ifndef PU_CLOCK_H
#define PU_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t pu_clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static inline int64_t pu_now_ns(void)
{
	return pu_clock_ns(CLOCK_MONOTONIC);
}

/* As of the last tick of the kernel's clock: a cheap look at the time. */
static inline int64_t pu_tick_ns(void)
{
	return pu_clock_ns(CLOCK_MONOTONIC_COARSE);
}

#endif
