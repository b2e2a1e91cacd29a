/* SPDX-License-Identifier: MIT */
#ifndef PU_NULL_H
#define PU_NULL_H

#include <stdint.h>

/* A pu_handler that takes every request and moves no byte. */
int64_t pu_null_handle(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
		       void *buffer);

#endif
