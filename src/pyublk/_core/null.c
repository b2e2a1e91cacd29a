/* SPDX-License-Identifier: MIT */
#include "null.h"

int64_t pu_null_handle(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
		       void *buffer)
{
	(void)context, (void)op, (void)flags, (void)offset, (void)length, (void)buffer;
	return 0;
}
