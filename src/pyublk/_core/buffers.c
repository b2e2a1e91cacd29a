/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "buffers.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ring.h"

struct pu_retired {
	struct pu_retired *next;
	uint8_t *buffer;
};

static uint8_t *map(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	if (madvise(memory, bytes, MADV_DONTFORK)) {
		munmap(memory, bytes);
		return NULL;
	}
	/* A huge page for the first small request would be most of an idle disk's memory. */
	madvise(memory, bytes, MADV_NOHUGEPAGE); /* refused where there are none: as well */
	return memory;
}

struct pu_buffers *pu_buffers_new(uint16_t depth, size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	struct pu_buffers *b = calloc(1, sizeof(*b));

	if (!b)
		return NULL;
	b->depth = depth;
	b->process = pu_process();
	b->bytes = (bytes + page - 1) / page * page;
	b->of_tag = calloc(depth, sizeof(*b->of_tag));
	b->first = b->of_tag ? map(depth * b->bytes) : NULL;
	if (!b->first) {
		free(b->of_tag);
		free(b);
		return NULL;
	}
	for (uint32_t tag = 0; tag < depth; tag++)
		b->of_tag[tag] = b->first + tag * b->bytes;
	pthread_mutex_init(&b->lock, NULL);
	return b;
}

/* In a child something else may be where its parent has the memory. */
static void unmap(const struct pu_buffers *b, uint8_t *memory, size_t bytes)
{
	if (b->process == pu_process())
		munmap(memory, bytes);
}

static bool among_first(const struct pu_buffers *b, const uint8_t *buffer)
{
	return buffer >= b->first && buffer < b->first + b->depth * b->bytes;
}

void pu_buffers_free(struct pu_buffers *b)
{
	for (struct pu_retired *next, *each = b->retired; each; each = next) {
		next = each->next;
		if (!among_first(b, each->buffer))
			unmap(b, each->buffer, b->bytes);
		free(each);
	}
	for (uint32_t tag = 0; tag < b->depth; tag++)
		if (!among_first(b, b->of_tag[tag]))
			unmap(b, b->of_tag[tag], b->bytes);
	unmap(b, b->first, b->depth * b->bytes);
	pthread_mutex_destroy(&b->lock);
	free(b->of_tag);
	free(b);
}

uint8_t *pu_buffers_map(const struct pu_buffers *b)
{
	return map(b->bytes);
}

void pu_buffers_unmap(const struct pu_buffers *b, uint8_t *buffer)
{
	if (b->process == pu_process() && among_first(b, buffer))
		madvise(buffer, b->bytes, MADV_DONTNEED);
	else
		unmap(b, buffer, b->bytes);
}

void pu_buffers_retire(struct pu_buffers *b, uint8_t *buffer)
{
	struct pu_retired *retired = malloc(sizeof(*retired));

	if (!retired) /* then it stays for ever: better than to be another's */
		return;
	retired->buffer = buffer;
	pthread_mutex_lock(&b->lock);
	retired->next = b->retired;
	b->retired = retired;
	pthread_mutex_unlock(&b->lock);
}

void pu_buffers_trim(const struct pu_buffers *b)
{
	uint32_t from = 0;

	/* Neighbours together, as they all are at first. */
	for (uint32_t tag = 1; tag <= b->depth; tag++) {
		if (tag < b->depth && b->of_tag[tag] == b->of_tag[tag - 1] + b->bytes)
			continue;
		madvise(b->of_tag[from], (tag - from) * b->bytes, MADV_DONTNEED);
		from = tag;
	}
}
