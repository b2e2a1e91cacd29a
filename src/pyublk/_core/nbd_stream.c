/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "nbd_work.h"

#define REPLY_MAGIC 0x67446698u
/* The protocol's own numbers, whatever this machine's are. */
#define NBD_ENOTSUP 95u
#define NBD_ESHUTDOWN 108u

enum { KIND_SEND = PU_KIND_OTHER, KIND_RECEIVE };

/* From here on, an answer's data is not worth another receive of its own. */
#define LARGE (PU_NBD_STAGING / 2)

/* ---- the end ---- */

static void cancel(struct pu_nbd *n, const struct pu_nbd_link *link, uint64_t kind)
{
	struct pu_sqe *sqe = pu_ring_next_sqe(&n->q->ring);

	if (!sqe)
		return; /* the other side's end comes some time */
	sqe->opcode = PU_OPCODE_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = PU_USER_DATA(kind, link - n->links);
	sqe->user_data = PU_USER_DATA(PU_KIND_NOTHING, 0);
}

void pu_nbd_shut(int fd)
{
	shutdown(fd, SHUT_WR);
}

void pu_nbd_break(struct pu_nbd *n, struct pu_nbd_link *link, int reason)
{
	if (link->state != PU_NBD_UP)
		return;
	link->state = PU_NBD_BREAKING;
	link->reason = reason;
	n->ending = true;
	pu_nbd_shut(link->fd);
	if (link->receiving)
		cancel(n, link, KIND_RECEIVE);
	if (link->sending)
		cancel(n, link, KIND_SEND);
}

/* ---- sending ---- */

/* What waits, as pieces of memory. */
static void gather(struct pu_nbd *n, struct pu_nbd_link *link)
{
	size_t pieces = 0;

	while (link->to_send.count && link->nr_sent < PU_NBD_SENDS) {
		uint16_t tag = pu_nbd_take_first(n, &link->to_send);
		struct pu_nbd_request *r = &n->requests[tag];
		uint8_t *header = link->headers[link->nr_sent];

		pu_nbd_put_header(n, header, tag);
		link->out[pieces++] = (struct iovec){ header, PU_NBD_HEADER };
		if (r->type == PU_NBD_WRITE)
			link->out[pieces++] = (struct iovec){ r->memory, r->length };
		r->state = PU_NBD_SENDING;
		r->early = false;
		link->sent[link->nr_sent++] = tag;
	}
	link->out_message.msg_iov = link->out;
	link->out_message.msg_iovlen = pieces;
}

/* Of the pieces of a message, `done` bytes are over. */
static void skip(struct msghdr *message, size_t done)
{
	while (done) {
		struct iovec *piece = message->msg_iov;

		if (done < piece->iov_len) {
			piece->iov_base = (uint8_t *)piece->iov_base + done;
			piece->iov_len -= done;
			return;
		}
		done -= piece->iov_len;
		message->msg_iov++;
		message->msg_iovlen--;
	}
}

static bool transfer(struct pu_nbd *n, struct pu_nbd_link *link, struct msghdr *message, bool receive)
{
	struct pu_sqe *sqe = pu_ring_next_sqe(&n->q->ring);
	uint64_t number = (uint64_t)(link - n->links);

	if (!sqe)
		return false;
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->fd = (int32_t)number + 1;
	if (message->msg_iovlen == 1) {
		sqe->opcode = receive ? PU_OPCODE_RECV : PU_OPCODE_SEND;
		sqe->addr = (uint64_t)(uintptr_t)message->msg_iov->iov_base;
		sqe->len = (uint32_t)message->msg_iov->iov_len;
	} else {
		sqe->opcode = receive ? PU_OPCODE_RECVMSG : PU_OPCODE_SENDMSG;
		sqe->addr = (uint64_t)(uintptr_t)message;
		sqe->len = 1;
	}
	if (receive) {
		sqe->ioprio = link->drained ? PU_POLL_FIRST : 0;
		sqe->user_data = PU_USER_DATA(KIND_RECEIVE, number);
	} else { /* what goes out in pieces is the kernel's business */
		sqe->op_flags = MSG_NOSIGNAL | MSG_WAITALL;
		sqe->user_data = PU_USER_DATA(KIND_SEND, number);
	}
	/* The queue ends without waiting for these: its requests are what it waits for. */
	n->q->foreign_inflight++;
	n->q->orphans++;
	return true;
}

void pu_nbd_begin_send(struct pu_nbd *n, struct pu_nbd_link *link)
{
	if (link->state != PU_NBD_UP || link->sending)
		return;
	if (!link->nr_sent && link->to_send.count)
		gather(n, link);
	if (!link->nr_sent)
		return;
	link->sending = transfer(n, link, &link->out_message, false);
	if (!link->sending)
		pu_nbd_break(n, link, EAGAIN);
}

static void all_is_sent(struct pu_nbd *n, struct pu_nbd_link *link)
{
	for (uint32_t i = 0; i < link->nr_sent; i++) {
		uint16_t tag = link->sent[i];
		struct pu_nbd_request *r = &n->requests[tag];

		r->state = PU_NBD_SENT;
		if (r->early) {
			pu_nbd_set_pending(link, link->pending - 1);
			pu_nbd_finish(n, tag, r->early_result);
		}
	}
	link->nr_sent = 0;
}

static void send_ended(struct pu_nbd *n, struct pu_nbd_link *link, int32_t result)
{
	link->sending = false;
	if (link->state != PU_NBD_UP)
		return;
	if (result <= 0 && result != -EAGAIN && result != -EINTR) {
		pu_nbd_break(n, link, result ? -result : EPIPE);
		return;
	}
	if (result > 0)
		skip(&link->out_message, (size_t)result);
	if (!link->out_message.msg_iovlen)
		all_is_sent(n, link);
	pu_nbd_begin_send(n, link);
}

/* ---- receiving ---- */

static int errno_of(uint32_t error)
{
	switch (error) {
	case EPERM:
	case EIO:
	case ENOMEM:
	case EINVAL:
	case ENOSPC:
	case EOVERFLOW:
		return -(int)error;
	case NBD_ENOTSUP:
		return -EOPNOTSUPP;
	default:
		return -EIO;
	}
}

static void answered(struct pu_nbd *n, struct pu_nbd_link *link, uint16_t tag, int result)
{
	struct pu_nbd_request *r = &n->requests[tag];

	__atomic_store_n(&link->replies, link->replies + 1, __ATOMIC_RELAXED);
	if (r->state == PU_NBD_SENDING) { /* the kernel may still read its data */
		r->early = true;
		r->early_result = result;
		return;
	}
	pu_nbd_set_pending(link, link->pending - 1);
	pu_nbd_finish(n, tag, result);
}

/* 0, or a reason to break the link. */
static int parse_reply(struct pu_nbd *n, struct pu_nbd_link *link, const uint8_t *reply)
{
	uint32_t magic, error;
	uint64_t cookie;
	struct pu_nbd_request *r;
	uint16_t tag;

	memcpy(&magic, reply, 4);
	memcpy(&error, reply + 4, 4);
	memcpy(&cookie, reply + 8, 8);
	if (be32toh(magic) != REPLY_MAGIC)
		return PU_NBD_BAD_MAGIC;
	cookie = be64toh(cookie);
	error = be32toh(error);
	tag = (uint16_t)cookie;
	r = &n->requests[tag < n->q->depth ? tag : 0];
	if (tag >= n->q->depth || r->cookie != cookie || r->early ||
	    (r->state != PU_NBD_SENT && r->state != PU_NBD_SENDING) || r->link != link - n->links)
		return PU_NBD_UNKNOWN_COOKIE;
	if (error == NBD_ESHUTDOWN)
		return PU_NBD_SHUTTING_DOWN;
	if (r->type == PU_NBD_READ && !error) {
		link->tag = tag;
		link->rest = r->length;
		link->into = r->memory;
		link->large = r->length >= LARGE;
		return 0;
	}
	link->large = false;
	answered(n, link, tag, error ? errno_of(error) : 0);
	return 0;
}

static void take_data(struct pu_nbd *n, struct pu_nbd_link *link, uint64_t length)
{
	link->into += length;
	link->rest -= length;
	if (!link->rest)
		answered(n, link, link->tag, 0);
}

/* What is in staging. 0, or a reason to break the link. */
static int parse(struct pu_nbd *n, struct pu_nbd_link *link)
{
	int reason = 0;

	for (;;) {
		uint32_t there = link->filled - link->parsed;
		const uint8_t *from = link->staging + link->parsed;

		if (link->rest && there) {
			uint32_t take = link->rest < there ? (uint32_t)link->rest : there;

			memcpy(link->into, from, take);
			link->parsed += take;
			take_data(n, link, take);
		} else if (!link->rest && there >= PU_NBD_REPLY) {
			link->parsed += PU_NBD_REPLY;
			reason = parse_reply(n, link, from);
			if (reason)
				return reason;
		} else {
			break;
		}
	}
	link->filled -= link->parsed;
	memmove(link->staging, link->staging + link->parsed, link->filled);
	link->parsed = 0;
	return 0;
}

void pu_nbd_begin_receive(struct pu_nbd *n, struct pu_nbd_link *link)
{
	uint32_t room = (link->large ? PU_NBD_REPLY : PU_NBD_STAGING) - link->filled;
	size_t pieces = 0;

	if (link->rest)
		link->in[pieces++] = (struct iovec){ link->into, link->rest };
	link->in[pieces++] = (struct iovec){ link->staging + link->filled, room };
	link->in_message.msg_iov = link->in;
	link->in_message.msg_iovlen = pieces;
	link->asked = link->rest + room;
	link->receiving = transfer(n, link, &link->in_message, true);
	if (!link->receiving) {
		pu_nbd_break(n, link, EAGAIN);
		return;
	}
	link->standing = !link->rest;
	n->q->standing += link->standing;
}

static void receive_ended(struct pu_nbd *n, struct pu_nbd_link *link, int32_t result)
{
	uint64_t direct;
	int reason = 0;

	link->receiving = false;
	n->q->standing -= link->standing;
	link->standing = false;
	if (link->state != PU_NBD_UP)
		return;
	if (result > 0) {
		link->drained = (uint64_t)result < link->asked;
		direct = (uint64_t)result < link->rest ? (uint64_t)result : link->rest;
		link->filled += (uint32_t)((uint64_t)result - direct);
		if (direct)
			take_data(n, link, direct);
		reason = parse(n, link);
	} else if (result != -EAGAIN && result != -EINTR) {
		reason = result ? -result : PU_NBD_CLOSED;
	}
	if (reason)
		pu_nbd_break(n, link, reason);
	else
		pu_nbd_begin_receive(n, link);
}

void pu_nbd_ended(struct pu_nbd *n, uint64_t user_data, int32_t result)
{
	struct pu_nbd_link *link = &n->links[(uint32_t)user_data];

	if (user_data >> PU_KIND_SHIFT == KIND_SEND)
		send_ended(n, link, result);
	else
		receive_ended(n, link, result);
}
