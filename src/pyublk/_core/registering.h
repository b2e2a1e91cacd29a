/* SPDX-License-Identifier: MIT
 * What a mapped queue registers with its ring: its files, and a request's memory by hand, under the
 * tag's number
 */
#ifndef PU_REGISTERING_H
#define PU_REGISTERING_H

#include "work.h"

/* user_data of these: the tag. */
enum { PU_KIND_REGISTER = PU_KIND_PART + 1, PU_KIND_UNREGISTER };

/* Counts as an operation of the request. 0 or -EAGAIN. */
int pu_register_buffer(struct pu_mapped *m, uint16_t tag);
void pu_unregister_buffer(struct pu_mapped *m, uint16_t tag);
/* Registers the files anew when one was replaced. 0 or -errno. */
int pu_take_up_files(struct pu_mapped *m);

#endif
