/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GROUP 0
#define NO_TAG UINT16_MAX /* of a commit that is refused on purpose */
#define ALONE 2u /* the number of a commit of one tag is the tag and this; else that of its array */

static size_t provided_bytes(const struct pu_batch *b)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = b->nr_provided * sizeof(*b->provided);

	return (bytes + page - 1) / page * page;
}

/* The ring's tail lies in a field of its first entry, which is why no entry may be written whole. */
static void provide(struct pu_batch *b, uint16_t id)
{
	struct pu_provided *entry = &b->provided[b->provided_tail & (b->nr_provided - 1)];

	entry->addr = (uint64_t)(uintptr_t)(b->arrivals + (size_t)id * PU_BATCH_MAX_TAGS);
	entry->len = b->arrival_tags * sizeof(*b->arrivals);
	entry->id = id;
	b->provided_tail++;
	__atomic_store_n(&b->provided[0].tail, b->provided_tail, __ATOMIC_RELEASE);
}

int pu_batch_open(struct pu_queue *q)
{
	struct pu_batch *b = calloc(1, sizeof(*b));
	int error;

	if (!b)
		return -ENOMEM;
	q->batch = b;
	b->element_bytes = sizeof(uint64_t);
	if (q->copies) {
		b->flags |= PU_BATCH_BUF_ADDR;
		b->element_bytes += sizeof(uint64_t);
	}
	if (q->zoned) {
		b->flags |= PU_BATCH_ZONE_LBA;
		b->element_bytes += sizeof(uint64_t);
	}
	if (q->auto_buffer)
		b->flags |= PU_BATCH_BUF_FALLBACK;
	b->plain = !q->zoned && !q->faults;
	/* Two requests at once are then one buffer too many, whatever the machine's speed. */
	b->nr_provided = q->faults & PU_FAULT_FEW_BUFFERS ? 1 : 8;
	b->arrival_tags = q->faults & PU_FAULT_FEW_BUFFERS ? 1 : PU_BATCH_MAX_TAGS;
	b->arrivals = calloc((size_t)b->nr_provided * PU_BATCH_MAX_TAGS, sizeof(*b->arrivals));
	for (int i = 0; i < 2; i++) /* one more for a fault's */
		b->elements[i] = calloc(q->depth + 1u, b->element_bytes);
	b->alone = calloc(q->depth, b->element_bytes);
	b->provided = mmap(NULL, provided_bytes(b), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b->provided == MAP_FAILED)
		b->provided = NULL;
	if (!b->provided || !b->arrivals || !b->elements[0] || !b->elements[1] || !b->alone)
		return -ENOMEM;
	if (madvise(b->provided, provided_bytes(b), MADV_DONTFORK))
		return -errno;
	error = pu_ring_register_provided(&q->ring, b->provided, b->nr_provided, GROUP);
	if (error < 0)
		return error;
	for (uint16_t id = 0; id < b->nr_provided; id++)
		provide(b, id);
	return 0;
}

void pu_batch_close(struct pu_queue *q)
{
	struct pu_batch *b = q->batch;

	if (!b)
		return;
	q->batch = NULL;
	if (b->provided && q->process == pu_process()) /* a fork left it out */
		munmap(b->provided, provided_bytes(b));
	free(b->arrivals);
	free(b->elements[0]);
	free(b->elements[1]);
	free(b->alone);
	free(b);
}

static void put_element(const struct pu_queue *q, uint8_t *place, uint16_t tag, int32_t value)
{
	const struct pu_batch *b = q->batch;
	uint64_t *words = (uint64_t *)(void *)place;

	/* ublk_elem_header: tag, buffer's index, result */
	*words++ = tag | (uint64_t)pu_queue_buffer_index(q, tag) << 16 |
		   (uint64_t)(uint32_t)value << 32;
	if (b->flags & PU_BATCH_BUF_ADDR)
		*words++ = tag == NO_TAG ? 1 : (uint64_t)(uintptr_t)pu_queue_next_buffer(q, tag);
	if (b->flags & PU_BATCH_ZONE_LBA)
		*words = tag == NO_TAG ? 0 : q->tags[tag].zone_lba;
}

static void fill_command(const struct pu_queue *q, struct pu_sqe *sqe, uint32_t cmd_op,
			 const uint8_t *elements, uint32_t count)
{
	const struct pu_batch *b = q->batch;

	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->off = cmd_op;
	sqe->addr = (uint64_t)(uintptr_t)elements;
	/* ublk_batch_io: queue, flags, elements, bytes of each */
	sqe->cmd[0] = q->id | (uint64_t)b->flags << 16 | (uint64_t)count << 32 |
		      (uint64_t)b->element_bytes << 48;
}

static uint16_t tag_of(const uint8_t *element)
{
	return (uint16_t)*(const uint64_t *)(const void *)element;
}

static int send(struct pu_queue *q, uint32_t cmd_op, enum pu_kind kind, uint8_t array,
		uint32_t count)
{
	struct pu_batch *b = q->batch;
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe)
		return -EAGAIN;
	fill_command(q, sqe, cmd_op, b->elements[array], count);
	sqe->flags = PU_SQE_FIXED_FILE;
	sqe->user_data = PU_USER_DATA(kind, array);
	b->sent[array] = count;
	return 0;
}

/* The one commit that there is. */
static int send_alone(struct pu_queue *q)
{
	struct pu_batch *b = q->batch;
	const uint8_t *element = b->elements[b->filling];
	uint8_t *place = b->alone + (size_t)tag_of(element) * b->element_bytes;
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe)
		return -EAGAIN;
	memcpy(place, element, b->element_bytes);
	fill_command(q, sqe, PU_IO_COMMIT_IO_CMDS, place, 1);
	sqe->flags = PU_SQE_FIXED_FILE | PU_SQE_CQE_SKIP_SUCCESS;
	sqe->user_data = PU_USER_DATA(PU_KIND_COMMIT, tag_of(element) + ALONE);
	b->filled = 0;
	return 0;
}

static int fetch(struct pu_queue *q)
{
	struct pu_batch *b = q->batch;
	struct pu_sqe *sqe = pu_ring_next_sqe(&q->ring);

	if (!sqe)
		return -EAGAIN;
	sqe->opcode = PU_OPCODE_URING_CMD;
	sqe->flags = PU_SQE_FIXED_FILE | PU_SQE_BUFFER_SELECT;
	sqe->off = PU_IO_FETCH_IO_CMDS;
	sqe->op_flags = PU_URING_CMD_MULTISHOT;
	sqe->buf_index = GROUP;
	sqe->cmd[0] = q->id | (uint64_t)sizeof(*b->arrivals) << 48;
	sqe->user_data = PU_USER_DATA(PU_KIND_FETCH, 0);
	b->fetching = true;
	return 0;
}

int pu_batch_fetch(struct pu_queue *q)
{
	struct pu_batch *b = q->batch;
	uint32_t count = 0;
	int error;

	for (uint32_t tag = q->first_tag; tag < q->depth; tag += q->tag_step)
		put_element(q, b->elements[0] + (size_t)count++ * b->element_bytes, (uint16_t)tag, 0);
	error = send(q, PU_IO_PREP_IO_CMDS, PU_KIND_PREPARE, 0, count);
	if (error)
		return error;
	b->preparing++;
	return fetch(q);
}

void pu_batch_commit(struct pu_queue *q, uint16_t tag, int32_t value)
{
	struct pu_batch *b = q->batch;
	uint8_t *array = b->elements[b->filling];

	if (q->faults & PU_FAULT_COMMIT && b->filled == 1)
		put_element(q, array + (size_t)b->filled++ * b->element_bytes, NO_TAG, 0);
	put_element(q, array + (size_t)b->filled++ * b->element_bytes, tag, value);
}

int pu_batch_submit(struct pu_queue *q)
{
	struct pu_batch *b = q->batch;
	int error = 0;

	if (!b->fetching && !b->ended && !b->preparing)
		error = fetch(q);
	if (!error && b->filled == 1)
		return send_alone(q);
	/* With the other array still in the kernel these wait for the next round. */
	if (error || !b->filled || b->sent[b->filling ^ 1])
		return error;
	error = send(q, PU_IO_COMMIT_IO_CMDS, PU_KIND_COMMIT, b->filling, b->filled);
	if (!error) {
		b->filling ^= 1;
		b->filled = 0;
	}
	return error;
}

/* The kernel stops at the first element that it refuses: that one is lost, the others go again. */
static void commit_again(struct pu_queue *q, uint8_t array, uint32_t done, int32_t result)
{
	struct pu_batch *b = q->batch;
	uint32_t sent = b->sent[array], bytes = b->element_bytes;
	const uint8_t *refused = b->elements[array] + (size_t)done * bytes;
	uint16_t tag = tag_of(refused);

	if (tag == NO_TAG)
		q->counters.fallbacks++;
	else
		pu_queue_lose(q, tag, result < 0 ? result : -EIO);
	memcpy(b->elements[b->filling] + (size_t)b->filled * bytes, refused + bytes,
	       (size_t)(sent - done - 1) * bytes);
	b->filled += sent - done - 1;
}

static void complete_commit(struct pu_queue *q, uint64_t number, int32_t result)
{
	struct pu_batch *b = q->batch;
	uint32_t done = result < 0 ? 0 : (uint32_t)result / b->element_bytes;

	if (number >= ALONE) {
		if (!done)
			pu_queue_lose(q, (uint16_t)(number - ALONE), result < 0 ? result : -EIO);
		return;
	}
	if (done < b->sent[number])
		commit_again(q, (uint8_t)number, done, result);
	b->sent[number] = 0;
}

void pu_batch_complete(struct pu_queue *q, const struct pu_cqe *cqe)
{
	struct pu_batch *b = q->batch;

	switch (cqe->user_data >> PU_KIND_SHIFT) {
	case PU_KIND_PREPARE:
		b->preparing--;
		b->sent[0] = 0;
		if (cqe->res < 0 && cqe->res != -ENODEV && !q->error)
			q->error = cqe->res;
		break;
	case PU_KIND_COMMIT:
		complete_commit(q, cqe->user_data & UINT32_MAX, cqe->res);
		break;
	case PU_KIND_FETCH:
		if (cqe->res >= 0 && cqe->flags & PU_CQE_BUFFER)
			provide(b, (uint16_t)(cqe->flags >> PU_CQE_BUFFER_SHIFT));
		if (cqe->flags & PU_CQE_MORE)
			break;
		b->fetching = false;
		if (cqe->res == -ENOBUFS) {
			q->counters.fallbacks++;
		} else if (cqe->res < 0) {
			b->ended = true;
			pu_queue_set_ending(q, true);
			if (cqe->res != -ENODEV && cqe->res != -ECANCELED && !q->error)
				q->error = cqe->res;
		}
		break;
	}
}

bool pu_batch_sent(const struct pu_batch *b)
{
	return !b->filled && !b->sent[0] && !b->sent[1];
}

bool pu_batch_ended(const struct pu_batch *b)
{
	return b->ended && !b->fetching && !b->preparing && !b->sent[0] && !b->sent[1];
}

int pu_batch_commit_now(struct pu_queue *q, struct pu_ring *ring, uint16_t tag, int32_t value)
{
	uint8_t *element = (uint8_t *)q->batch->posted;
	struct pu_sqe *sqe = pu_ring_get_sqe(ring);
	int result;

	if (!sqe)
		return -EAGAIN;
	put_element(q, element, tag, value);
	fill_command(q, sqe, PU_IO_COMMIT_IO_CMDS, element, 1);
	sqe->fd = q->cdev;
	do
		result = pu_ring_submit(ring, 1, PU_FOREVER, 0);
	while (!pu_ring_ready(ring) && (result >= 0 || result == -EINTR));
	if (!pu_ring_ready(ring)) {
		bool taken = !pu_ring_unsubmitted(ring);

		/* What the kernel took it carries out, and a second commit would be the next request's.
		 * With the ring goes the completion, which would be taken for the next commit's. */
		pu_ring_retract(ring);
		if (taken)
			pu_ring_close(ring);
		return taken ? 0 : result;
	}
	result = pu_ring_cqe(ring, 0)->res;
	pu_ring_advance(ring, 1);
	return result < 0 ? result : 0;
}
