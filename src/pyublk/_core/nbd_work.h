/* SPDX-License-Identifier: MIT
 * Requests on their way to an NBD server and back: what the files of nbd.h share
 */
#ifndef PU_NBD_WORK_H
#define PU_NBD_WORK_H

#include "nbd.h"

enum pu_nbd_command {
	PU_NBD_READ = 0,
	PU_NBD_WRITE = 1,
	PU_NBD_DISCONNECT = 2,
	PU_NBD_FLUSH = 3,
	PU_NBD_TRIM = 4,
	PU_NBD_WRITE_ZEROES = 6,
};

enum pu_nbd_request_state {
	PU_NBD_IDLE,
	PU_NBD_WAITING, /* for a link */
	PU_NBD_QUEUED,	/* to be sent */
	PU_NBD_SENDING,
	PU_NBD_SENT,
	PU_NBD_HELD, /* of a link that is down, until it is released */
};

/* Whether it has been given to a link, which has not gone down since. */
static inline bool pu_nbd_is_under_way(const struct pu_nbd_request *r)
{
	return r->state >= PU_NBD_QUEUED && r->state <= PU_NBD_SENT;
}

/* Whether the request is still there: others may have failed it. */
static inline bool pu_nbd_is_held(const struct pu_nbd *n, uint16_t tag)
{
	return pu_queue_holds(n->q, tag, n->requests[tag].generation);
}

static inline void pu_nbd_set_pending(struct pu_nbd_link *link, uint32_t pending)
{
	__atomic_store_n(&link->pending, pending, __ATOMIC_RELAXED);
}

/* ---- nbd_request.c ---- */

void pu_nbd_append(struct pu_nbd *n, struct pu_nbd_list *list, uint16_t tag);
uint16_t pu_nbd_take_first(const struct pu_nbd *n, struct pu_nbd_list *list);
/* What the descriptor asks for, in the server's words. 0 or -errno. */
int pu_nbd_translate(struct pu_nbd *n, uint16_t tag);
/* Its header, with a cookie of its own. */
void pu_nbd_put_header(struct pu_nbd *n, uint8_t *to, uint16_t tag);
/* Of the request that ends a connection. */
void pu_nbd_put_leave(uint8_t *to);
/* To a link, if one is up. */
void pu_nbd_dispatch(struct pu_nbd *n, uint16_t tag);
void pu_nbd_dispatch_waiting(struct pu_nbd *n);
/* Tells the client. */
void pu_nbd_finish(struct pu_nbd *n, uint16_t tag, int64_t result);

/* ---- nbd_stream.c ---- */

void pu_nbd_begin_send(struct pu_nbd *n, struct pu_nbd_link *link);
void pu_nbd_begin_receive(struct pu_nbd *n, struct pu_nbd_link *link);
/* One of either has ended. */
void pu_nbd_ended(struct pu_nbd *n, uint64_t user_data, int32_t result);
/* No byte of it is believed any more; it is down when its operations have ended. Not closed: whoever
 * is told of it may still see the server's end. */
void pu_nbd_break(struct pu_nbd *n, struct pu_nbd_link *link, int reason);

#endif
