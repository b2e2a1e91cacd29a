/* SPDX-License-Identifier: MIT
 * Requests of a mapped queue that another thread finishes, or allows to begin
 *
 * One whose parts have all ended is deferred, and the queue's thread tells somebody of it, who says how
 * it ends, whenever and on whatever thread. Meanwhile the queue serves others. A flush is deferred by
 * a target that has metadata of its own to make durable.
 */
#ifndef PU_DEFERRED_H
#define PU_DEFERRED_H

#include "mapped.h"

/* By the policy, or for it: all parts of the request have ended. */
void pu_defer(struct pu_mapped *m, uint16_t tag);
/* The next one that nobody has been told of; false: there is none. While there is one, to_tell is
 * set. */
bool pu_deferred_next(struct pu_mapped *m, uint16_t *tag);

/* Says of a request of which somebody was told: 0 or -errno. The queue is to be woken then.
 * [any thread] */
void pu_deferred_resolve(struct pu_mapped *m, uint16_t tag, uint32_t generation, int result);
/* What was said of the tag's request, once. False: nothing yet. */
bool pu_deferred_outcome(struct pu_mapped *m, uint16_t tag, int *result);

#endif
