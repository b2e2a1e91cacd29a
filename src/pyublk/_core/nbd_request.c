/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "answer.h"
#include "copy.h"
#include "nbd_work.h"

#define REQUEST_MAGIC 0x25609513u

enum { FLAG_FUA = 1u << 0, FLAG_NO_HOLE = 1u << 1 };

void pu_nbd_append(struct pu_nbd *n, struct pu_nbd_list *list, uint16_t tag)
{
	if (list->count++)
		n->requests[list->last].next = tag;
	else
		list->first = tag;
	list->last = tag;
}

uint16_t pu_nbd_take_first(const struct pu_nbd *n, struct pu_nbd_list *list)
{
	uint16_t tag = list->first;

	list->first = n->requests[tag].next;
	list->count--;
	return tag;
}

void pu_nbd_finish(struct pu_nbd *n, uint16_t tag, int64_t result)
{
	struct pu_nbd_request *r = &n->requests[tag];

	r->state = PU_NBD_IDLE;
	if (!pu_nbd_is_held(n, tag)) /* failed from outside */
		return;
	if (result >= 0 && n->q->user_copy && r->type == PU_NBD_READ)
		result = pu_queue_copy(n->q, tag, r->generation, r->memory, 0, r->length, 0);
	pu_queue_answer(n->q, tag, result);
}

static struct pu_nbd_link *least_loaded(const struct pu_nbd *n)
{
	struct pu_nbd_link *best = NULL;

	for (uint32_t i = 0; i < n->nr_links; i++) {
		struct pu_nbd_link *link = &n->links[i];

		if (link->state == PU_NBD_UP && (!best || link->pending < best->pending))
			best = link;
	}
	return best;
}

static bool fails(const struct pu_nbd *n)
{
	return __atomic_load_n(&n->fail, __ATOMIC_ACQUIRE);
}

/* To a link, if one is up. */
void pu_nbd_dispatch(struct pu_nbd *n, uint16_t tag)
{
	struct pu_nbd_link *link = least_loaded(n);
	struct pu_nbd_request *r = &n->requests[tag];

	if (link) {
		r->state = PU_NBD_QUEUED;
		r->link = (uint16_t)(link - n->links);
		pu_nbd_append(n, &link->to_send, tag);
		pu_nbd_set_pending(link, link->pending + 1);
	} else if (fails(n)) {
		pu_nbd_finish(n, tag, -EIO);
	} else {
		r->state = PU_NBD_WAITING;
		pu_nbd_append(n, &n->waiting, tag);
	}
}

void pu_nbd_dispatch_waiting(struct pu_nbd *n)
{
	uint32_t count = n->waiting.count;

	for (uint32_t i = 0; i < count; i++) {
		uint16_t tag = pu_nbd_take_first(n, &n->waiting);

		if (pu_nbd_is_held(n, tag))
			pu_nbd_dispatch(n, tag);
		else
			n->requests[tag].state = PU_NBD_IDLE;
	}
}

/* False: the server knows nothing of the kind. */
static bool translate(struct pu_nbd_request *r, uint32_t op_flags)
{
	r->flags = op_flags & PU_FLAG_FUA ? FLAG_FUA : 0;
	switch (op_flags & 0xff) {
	case PU_OP_READ:
		r->type = PU_NBD_READ;
		r->flags = 0;
		return true;
	case PU_OP_WRITE:
		r->type = PU_NBD_WRITE;
		return true;
	case PU_OP_FLUSH:
		r->type = PU_NBD_FLUSH;
		r->flags = 0;
		r->offset = r->length = 0;
		return true;
	case PU_OP_DISCARD:
		r->type = PU_NBD_TRIM;
		return true;
	case PU_OP_WRITE_ZEROES:
		r->type = PU_NBD_WRITE_ZEROES;
		if (op_flags & PU_FLAG_NOUNMAP)
			r->flags |= FLAG_NO_HOLE;
		return true;
	default:
		return false;
	}
}

int pu_nbd_translate(struct pu_nbd *n, uint16_t tag)
{
	const struct pu_desc *desc = &n->q->desc[tag];
	struct pu_nbd_request *r = &n->requests[tag];
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;

	r->generation = pu_tag_generation(&n->q->tags[tag]);
	r->offset = pu_desc_offset(desc);
	r->length = (uint32_t)length;
	r->memory = pu_queue_buffer(n->q, tag);
	if (length > UINT32_MAX || !translate(r, desc->op_flags))
		return -EOPNOTSUPP;
	if (r->type == PU_NBD_WRITE && n->q->user_copy)
		return pu_queue_fill_buffer(n->q, tag, r->generation);
	return 0;
}

static void put_header(uint8_t *to, const struct pu_nbd_request *r)
{
	uint32_t magic = htobe32(REQUEST_MAGIC), length = htobe32(r->length);
	uint16_t flags = htobe16(r->flags), type = htobe16(r->type);
	uint64_t offset = htobe64(r->offset), cookie = htobe64(r->cookie);

	memcpy(to, &magic, 4);
	memcpy(to + 4, &flags, 2);
	memcpy(to + 6, &type, 2);
	memcpy(to + 8, &cookie, 8);
	memcpy(to + 16, &offset, 8);
	memcpy(to + 24, &length, 4);
}

void pu_nbd_put_header(struct pu_nbd *n, uint8_t *to, uint16_t tag)
{
	n->requests[tag].cookie = ++n->cookies << 16 | tag;
	put_header(to, &n->requests[tag]);
}

void pu_nbd_put_leave(uint8_t *to)
{
	put_header(to, &(struct pu_nbd_request){ .type = PU_NBD_DISCONNECT });
}
