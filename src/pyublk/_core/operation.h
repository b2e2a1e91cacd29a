/* SPDX-License-Identifier: MIT
 * One part of a request on one file: the operations that it takes
 */
#ifndef PU_OPERATION_H
#define PU_OPERATION_H

#include "work.h"

#define PU_VECTOR 16u /* pieces of memory in one operation */
#define PU_UNDER_WAY INT64_MIN

/* Begins the slot's next operation. Its result, if it is over already: bytes or -errno. */
int64_t pu_operation_begin(struct pu_mapped *m, struct pu_slot *slot);
/* One has ended with that result. True: the part takes another; else *result is the part's, 0 or
 * -errno. */
bool pu_operation_goes_on(struct pu_mapped *m, struct pu_slot *slot, int64_t *result);

#endif
