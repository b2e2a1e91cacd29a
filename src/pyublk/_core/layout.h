/* SPDX-License-Identifier: MIT
 * Where a disk's bytes live: files, and which of their bytes are which of the disk's
 */
#ifndef PU_LAYOUT_H
#define PU_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "file_map.h"
#include "lock.h"

enum pu_layout_kind {
	PU_LAYOUT_TABLE,   /* extents, one after the other */
	PU_LAYOUT_STRIPE,  /* chunks, in turn from every file */
	PU_LAYOUT_MIRROR,  /* the same in every file */
	PU_LAYOUT_PER_REQUEST, /* somebody says it for each request (pu_mapped_plan) */
};

struct pu_file {
	int fd;
	bool memory; /* its bytes are in memory: calls on it do not wait */
	bool device; /* a block device */
	bool read_only; /* no request may change it, and none has to be made durable */
	struct pu_file_map map; /* of one in memory */
};

struct pu_extent {
	uint64_t start; /* on the disk; all in bytes */
	uint64_t length;
	uint64_t offset; /* in the file */
	uint32_t file;
};

struct pu_layout {
	enum pu_layout_kind kind;
	uint64_t size;
	struct pu_file *files;
	uint32_t nr_files;
	bool defers_flushes; /* somebody finishes a flush once the files are synced (deferred.h) */
	uint32_t version; /* counts replaced files: queues that see a new one register them anew */
	struct pu_extent *extents;
	uint32_t nr_extents;
	uint64_t chunk;
	uint32_t nr_queues; /* that have joined it */
	bool locked;	    /* there are several, and files are mapped */
	struct pu_lock lock; /* keeps their requests whole where they overlap in a mapped file */
};

/* A part of a request that is one contiguous range of one file. In the request's data it is
 * contiguous too, or (chunk > 0) cut into chunks that lie `stride` apart, the first one shorter. */
struct pu_part {
	uint32_t file;
	uint64_t offset; /* in the file */
	uint64_t length;
	uint64_t data;	 /* where it begins in the request's data */
	uint64_t first;	 /* bytes of the first chunk */
	uint64_t chunk, stride;
	uint8_t *own; /* a policy's memory, which this part reads, or (own_write) writes; NULL: it is
		       * of the request, and does what that asks for */
	bool own_write;
};

int pu_layout_init(struct pu_layout *layout, enum pu_layout_kind kind, uint64_t size,
		   uint32_t nr_files, uint32_t nr_extents);
void pu_layout_destroy(struct pu_layout *layout);

/* Gives it another size while queues use it: each request sees the old one or the new one. Of a table,
 * the last extent grows; what is cut off stays where it is. One thread at a time. -EINVAL: it cannot
 * have that size. */
int pu_layout_resize(struct pu_layout *layout, uint64_t size);
static inline uint64_t pu_layout_size(const struct pu_layout *layout)
{
	return __atomic_load_n(&layout->size, __ATOMIC_ACQUIRE);
}

/* Maps the files whose bytes are in memory. */
void pu_layout_map_memory(struct pu_layout *layout);
void pu_layout_unmap_memory(struct pu_layout *layout);
/* A queue is about to use it. 0 or -ENOMEM. */
int pu_layout_join(struct pu_layout *layout);

enum pu_cut {
	PU_NO_PART, /* there are no more */
	PU_PART,
	PU_LAST_PART, /* saves the question whether there is another */
};

/* The next part of a range of the disk, for a table or a stripe; *cut, 0 at first, is moved on. */
enum pu_cut pu_layout_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
			   uint64_t *cut, struct pu_part *part);

/* Whether parts that somebody said are a range of `length` bytes: 0, or -EINVAL, or -EROFS when they
 * are to be changed, and one is in a file that can only be read. */
int pu_layout_check(const struct pu_layout *layout, const struct pu_extent *parts, uint32_t count,
		    uint64_t length, bool changed);

/* As pu_part_data, of a part that is cut into chunks. */
uint64_t pu_striped_part_data(const struct pu_part *part, uint64_t done, uint64_t *contiguous);

/* Of a part: the place in the request's data of its byte `done`, and how many bytes lie there in
 * one piece. */
static inline uint64_t pu_part_data(const struct pu_part *part, uint64_t done, uint64_t *contiguous)
{
	if (part->chunk)
		return pu_striped_part_data(part, done, contiguous);
	*contiguous = part->length - done;
	return part->data + done;
}

/* Puts a file in a place. Where queues are open, they look for it once it is published. */
void pu_layout_set_file(struct pu_layout *layout, uint32_t index, int fd, bool memory, bool device);
/* The queues take up the files with their next request. */
void pu_layout_publish_files(struct pu_layout *layout);

/* Whether every file is mapped. */
static inline bool pu_layout_is_mapped(const struct pu_layout *layout)
{
	for (uint32_t i = 0; i < layout->nr_files; i++)
		if (!layout->files[i].map.bytes)
			return false;
	return true;
}

static inline uint32_t pu_layout_version(const struct pu_layout *layout)
{
	return __atomic_load_n(&layout->version, __ATOMIC_ACQUIRE);
}

#endif
