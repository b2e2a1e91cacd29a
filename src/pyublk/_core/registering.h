/* SPDX-License-Identifier: MIT
 * A request's memory, registered by hand with the ring of a mapped queue, under the tag's number
 */
#ifndef PU_REGISTERING_H
#define PU_REGISTERING_H

#include "work.h"

/* user_data of these: the tag. */
enum { PU_KIND_REGISTER = PU_KIND_PART + 1, PU_KIND_UNREGISTER };

/* Counts as an operation of the request. 0 or -EAGAIN. */
int pu_register_buffer(struct pu_mapped *m, uint16_t tag);
void pu_unregister_buffer(struct pu_mapped *m, uint16_t tag);

#endif
