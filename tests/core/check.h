/* SPDX-License-Identifier: MIT
 * CHECK prints what was wrong and ends the program: one failing line is enough to know.
 */
#ifndef PU_CHECK_H
#define PU_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                     \
	do {                                                                                 \
		if (!(condition)) {                                                          \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
			exit(1);                                                             \
		}                                                                            \
	} while (0)

#define CHECK_EQUAL(got, wanted)                                                             \
	do {                                                                                 \
		long long got_ = (long long)(got), wanted_ = (long long)(wanted);            \
		if (got_ != wanted_) {                                                       \
			fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, \
				#got, got_, wanted_);                                        \
			exit(1);                                                             \
		}                                                                            \
	} while (0)

#endif
