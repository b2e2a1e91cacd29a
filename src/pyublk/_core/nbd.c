/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "nbd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "nbd_work.h"

uint32_t pu_nbd_entries(uint32_t nr_links)
{
	return 4 * nr_links; /* a send, a receive, and the ends of both */
}

/* ---- links ---- */

/* The kernel is done with the memory of the link's requests. */
static void end_link(struct pu_nbd *n, struct pu_nbd_link *link)
{
	uint16_t number = (uint16_t)(link - n->links);

	for (uint32_t tag = 0; tag < n->q->depth; tag++) {
		struct pu_nbd_request *r = &n->requests[tag];

		if (r->link == number && pu_nbd_is_under_way(r))
			r->state = PU_NBD_HELD;
	}
	pu_ring_update_file(&n->q->ring, number + 1u, -1);
	pu_nbd_set_pending(link, 0);
	link->to_send.count = link->nr_sent = 0;
	link->filled = link->parsed = 0;
	link->rest = 0;
	link->state = PU_NBD_DOWN;
	link->to_tell = n->to_tell = true;
}

static void end_links(struct pu_nbd *n)
{
	n->ending = false;
	for (uint32_t i = 0; i < n->nr_links; i++) {
		struct pu_nbd_link *link = &n->links[i];

		if (link->state != PU_NBD_BREAKING)
			continue;
		if (link->sending || link->receiving)
			n->ending = true;
		else
			end_link(n, link);
	}
}

static void release_held(struct pu_nbd *n, uint16_t number)
{
	for (uint32_t tag = 0; tag < n->q->depth; tag++) {
		struct pu_nbd_request *r = &n->requests[tag];

		if (r->link != number || r->state != PU_NBD_HELD)
			continue;
		r->state = PU_NBD_IDLE;
		if (!pu_nbd_is_held(n, (uint16_t)tag))
			continue;
		r->state = PU_NBD_WAITING;
		pu_nbd_append(n, &n->waiting, (uint16_t)tag);
		__atomic_store_n(&n->resent, n->resent + 1, __ATOMIC_RELAXED);
	}
}

static void take_up(struct pu_nbd *n, struct pu_nbd_link *link, int fd)
{
	uint32_t place = (uint32_t)(link - n->links) + 1;
	int error = pu_ring_update_file(&n->q->ring, place, fd);

	link->fd = fd;
	link->state = PU_NBD_UP;
	link->large = link->drained = false;
	if (error < 0)
		pu_nbd_break(n, link, -error);
	else
		pu_nbd_begin_receive(n, link);
	if (link->state == PU_NBD_UP)
		__atomic_store_n(&n->fail, false, __ATOMIC_RELEASE);
}

static void take_orders(struct pu_nbd *n)
{
	(void)__atomic_exchange_n(&n->ordered, false, __ATOMIC_ACQ_REL); /* before what was ordered */
	for (uint32_t i = 0; i < n->nr_links; i++) {
		struct pu_nbd_link *link = &n->links[i];
		int drop = __atomic_exchange_n(&link->drop, 0, __ATOMIC_ACQ_REL);
		int fd;

		if (drop)
			pu_nbd_break(n, link, drop);
		if (__atomic_exchange_n(&link->release, false, __ATOMIC_ACQ_REL))
			release_held(n, (uint16_t)i);
		fd = __atomic_exchange_n(&link->offered, -1, __ATOMIC_ACQ_REL);
		if (fd >= 0)
			take_up(n, link, fd);
	}
	pu_nbd_dispatch_waiting(n);
}

static void give_order(struct pu_nbd *n)
{
	__atomic_store_n(&n->ordered, true, __ATOMIC_SEQ_CST);
	pu_queue_wake(n->q);
}

void pu_nbd_attach(struct pu_nbd *n, uint32_t link, int fd)
{
	__atomic_store_n(&n->links[link].offered, fd, __ATOMIC_RELEASE);
	give_order(n);
}

void pu_nbd_drop(struct pu_nbd *n, uint32_t link, int reason)
{
	__atomic_store_n(&n->links[link].drop, reason, __ATOMIC_RELEASE);
	give_order(n);
}

void pu_nbd_release(struct pu_nbd *n, uint32_t link)
{
	__atomic_store_n(&n->links[link].release, true, __ATOMIC_RELEASE);
	give_order(n);
}

void pu_nbd_set_fail(struct pu_nbd *n, bool fail)
{
	__atomic_store_n(&n->fail, fail, __ATOMIC_RELEASE);
	give_order(n);
}

int pu_nbd_tell(struct pu_nbd *n, int *reason)
{
	for (uint32_t i = 0; i < n->nr_links; i++) {
		if (!n->links[i].to_tell)
			continue;
		n->links[i].to_tell = false;
		*reason = n->links[i].reason;
		return (int)i;
	}
	n->to_tell = false;
	return -1;
}

/* ---- serving ---- */

static void complete(void *context, uint64_t user_data, int32_t result)
{
	struct pu_nbd *n = context;

	n->q->foreign_inflight--;
	n->q->orphans--;
	if (!n->stopped)
		pu_nbd_ended(n, user_data, result);
}

int pu_nbd_open(struct pu_nbd *n, struct pu_queue *q, uint32_t nr_links)
{
	memset(n, 0, sizeof(*n));
	n->q = q;
	n->requests = calloc(q->depth, sizeof(*n->requests));
	n->links = calloc(nr_links, sizeof(*n->links));
	if (!n->requests || !n->links) {
		pu_nbd_close(n);
		return -ENOMEM;
	}
	for (; n->nr_links < nr_links; n->nr_links++) {
		struct pu_nbd_link *link = &n->links[n->nr_links];

		link->offered = link->fd = -1;
		link->staging = malloc(PU_NBD_STAGING);
		if (!link->staging) {
			pu_nbd_close(n);
			return -ENOMEM;
		}
	}
	q->complete = complete;
	q->completer = n;
	return 0;
}

void pu_nbd_close(struct pu_nbd *n)
{
	for (uint32_t i = 0; i < n->nr_links; i++)
		free(n->links[i].staging);
	free(n->links);
	free(n->requests);
	n->links = NULL;
	n->requests = NULL;
	n->nr_links = 0;
}

static void start(struct pu_nbd *n, uint16_t tag)
{
	struct pu_nbd_request *r = &n->requests[tag];
	int error;

	/* Its last request was failed from outside, and is still under way: what the server may do to
	 * that must not meet this one, which takes its place and waits for the link's end. */
	if (pu_nbd_is_under_way(r))
		pu_nbd_break(n, &n->links[r->link], ETIMEDOUT);
	error = pu_nbd_translate(n, tag);
	if (error)
		pu_queue_answer(n->q, tag, error);
	else if (r->state == PU_NBD_IDLE)
		pu_nbd_dispatch(n, tag);
}

/* A link on which all is answered is taken leave of; on another, a request that is half sent would be
 * ended by that. */
void pu_nbd_stop(struct pu_nbd *n)
{
	uint8_t header[PU_NBD_HEADER];

	n->stopped = true;
	if (n->q->process != pu_process())
		return;
	pu_nbd_put_leave(header);
	for (uint32_t i = 0; i < n->nr_links; i++) {
		struct pu_nbd_link *link = &n->links[i];

		if (link->state == PU_NBD_UP && !link->pending && !link->sending)
			send(link->fd, header, sizeof(header), MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

static void begin_sends(struct pu_nbd *n)
{
	for (uint32_t i = 0; i < n->nr_links; i++)
		pu_nbd_begin_send(n, &n->links[i]);
	if (n->ending)
		end_links(n);
}

int pu_nbd_turn(struct pu_nbd *n, int64_t timeout_ns)
{
	int there;

	if (__atomic_load_n(&n->ordered, __ATOMIC_RELAXED)) {
		take_orders(n);
		begin_sends(n);
		timeout_ns = 0; /* the caller may wait for what has been answered by that */
	}
	there = pu_queue_wait(n->q, n->to_tell ? 0 : timeout_ns);
	if (there < 0)
		return there;
	for (uint32_t i = 0; i < n->q->nr_ready; i++)
		start(n, n->q->ready[i]);
	begin_sends(n);
	return 0;
}
