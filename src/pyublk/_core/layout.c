/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "layout.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int pu_layout_init(struct pu_layout *layout, enum pu_layout_kind kind, uint64_t size,
		   uint32_t nr_files, uint32_t nr_extents)
{
	memset(layout, 0, sizeof(*layout));
	layout->kind = kind;
	layout->size = size;
	layout->nr_files = nr_files;
	layout->nr_extents = nr_extents;
	layout->files = calloc(nr_files, sizeof(*layout->files));
	layout->extents = calloc(nr_extents + 1u, sizeof(*layout->extents));
	if (layout->files && layout->extents)
		return 0;
	pu_layout_destroy(layout);
	return -ENOMEM;
}

void pu_layout_set_file(struct pu_layout *layout, uint32_t index, int fd, bool memory, bool device)
{
	layout->files[index].fd = fd;
	layout->files[index].memory = memory;
	layout->files[index].device = device;
}

void pu_layout_publish_files(struct pu_layout *layout)
{
	__atomic_fetch_add(&layout->version, 1, __ATOMIC_RELEASE);
}

void pu_layout_map_memory(struct pu_layout *layout)
{
	if (layout->kind == PU_LAYOUT_MIRROR) /* whose files may be replaced */
		return;
	for (uint32_t i = 0; i < layout->nr_files; i++)
		if (layout->files[i].memory)
			pu_file_map_open(&layout->files[i].map, layout->files[i].fd);
}

void pu_layout_unmap_memory(struct pu_layout *layout)
{
	for (uint32_t i = 0; i < layout->nr_files; i++)
		pu_file_map_close(&layout->files[i].map);
}

int pu_layout_join(struct pu_layout *layout)
{
	uint64_t asked = (uint64_t)sysconf(_SC_PAGESIZE) * PU_FILE_MAP_PAGES;
	bool mapped = false;
	int error;

	for (uint32_t i = 0; i < layout->nr_files; i++)
		mapped |= layout->files[i].map.bytes != NULL;
	if (!mapped || __atomic_add_fetch(&layout->nr_queues, 1, __ATOMIC_ACQ_REL) != 2)
		return 0;
	error = pu_lock_init(&layout->lock, PU_LOCK_SHARDS,
			     asked > PU_LOCK_GRANULE ? asked : PU_LOCK_GRANULE);
	if (error)
		__atomic_sub_fetch(&layout->nr_queues, 1, __ATOMIC_ACQ_REL);
	else
		__atomic_store_n(&layout->locked, true, __ATOMIC_RELEASE);
	return error;
}

void pu_layout_destroy(struct pu_layout *layout)
{
	if (layout->files)
		pu_layout_unmap_memory(layout);
	if (layout->locked)
		pu_lock_destroy(&layout->lock);
	free(layout->files);
	free(layout->extents);
	layout->files = NULL;
	layout->extents = NULL;
}

static const struct pu_extent *find_extent(const struct pu_layout *layout, uint64_t offset)
{
	uint32_t low = 0, high = layout->nr_extents;

	while (low + 1 < high) {
		uint32_t middle = low + (high - low) / 2;

		if (layout->extents[middle].start <= offset)
			low = middle;
		else
			high = middle;
	}
	return &layout->extents[low];
}

static enum pu_cut table_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
			      uint64_t *cut, struct pu_part *part)
{
	const struct pu_extent *extent;
	uint64_t at = *cut, inside, whole; /* bytes */

	if (at >= length)
		return PU_NO_PART;
	extent = find_extent(layout, offset + at);
	inside = offset + at - extent->start;
	whole = __atomic_load_n(&extent->length, __ATOMIC_RELAXED); /* a resize may make it longer */
	*part = (struct pu_part){ .file = extent->file, .offset = extent->offset + inside, .data = at };
	part->length = whole - inside;
	if (part->length > length - at)
		part->length = length - at;
	part->first = part->length;
	*cut = at + part->length;
	return *cut == length ? PU_LAST_PART : PU_PART;
}

static enum pu_cut stripe_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
			       uint64_t *cut, struct pu_part *part)
{
	uint64_t chunk = layout->chunk, files = layout->nr_files;
	uint64_t first = offset / chunk, last = (offset + length - 1) / chunk;
	uint64_t nth = *cut, from = first + nth; /* the file's first chunk */
	uint64_t to, end;

	if (nth >= files || from > last)
		return PU_NO_PART;
	to = last - (last - from) % files;
	part->file = (uint32_t)(from % files);
	part->offset = from / files * chunk + (nth ? 0 : offset % chunk);
	end = to / files * chunk + (to == last ? (offset + length - 1) % chunk + 1 : chunk);
	part->length = end - part->offset;
	part->data = nth ? from * chunk - offset : 0;
	part->first = nth ? chunk : chunk - offset % chunk;
	if (part->first > part->length)
		part->first = part->length;
	part->chunk = chunk;
	part->stride = chunk * files;
	part->own = NULL;
	*cut = nth + 1;
	return *cut == files || from == last ? PU_LAST_PART : PU_PART;
}

enum pu_cut pu_layout_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
			   uint64_t *cut, struct pu_part *part)
{
	if (layout->kind == PU_LAYOUT_STRIPE)
		return stripe_part(layout, offset, length, cut, part);
	return table_part(layout, offset, length, cut, part);
}

int pu_layout_check(const struct pu_layout *layout, const struct pu_extent *parts, uint32_t count,
		    uint64_t length, bool changed)
{
	bool refused = false;

	for (uint32_t i = 0; i < count; i++) {
		if (parts[i].file >= layout->nr_files || !parts[i].length || parts[i].length > length)
			return -EINVAL;
		length -= parts[i].length;
		refused |= changed && layout->files[parts[i].file].read_only;
	}
	if (length)
		return -EINVAL;
	return refused ? -EROFS : 0;
}

uint64_t pu_striped_part_data(const struct pu_part *part, uint64_t done, uint64_t *contiguous)
{
	uint64_t beyond, nth, left = part->length - done;

	if (done < part->first) {
		*contiguous = part->first < part->length ? part->first - done : left;
		return part->data + done;
	}
	beyond = done - part->first;
	nth = beyond / part->chunk;
	*contiguous = part->chunk - beyond % part->chunk;
	if (*contiguous > left)
		*contiguous = left;
	/* The first chunk may have begun before the request. */
	return part->data + part->first - part->chunk + (nth + 1) * part->stride +
	       beyond % part->chunk;
}

/* Files that were cut, and are extended now, are holes from there on. */
static void forget_beyond(const struct pu_layout *layout, const struct pu_extent *last, uint64_t size)
{
	if (last) {
		pu_file_map_forget(&layout->files[last->file].map, last->offset + size - last->start,
				   UINT64_MAX);
		return;
	}
	for (uint32_t i = 0; i < layout->nr_files; i++)
		pu_file_map_forget(&layout->files[i].map, size / layout->nr_files, UINT64_MAX);
}

int pu_layout_resize(struct pu_layout *layout, uint64_t size)
{
	struct pu_extent *last = layout->nr_extents ? &layout->extents[layout->nr_extents - 1] : NULL;

	if (!size || layout->kind == PU_LAYOUT_PER_REQUEST || (last && size <= last->start))
		return -EINVAL;
	if (size > layout->size)
		forget_beyond(layout, last, layout->size);
	/* Never made shorter: a request that began before may still be cut by it. */
	if (last && size - last->start > last->length)
		__atomic_store_n(&last->length, size - last->start, __ATOMIC_RELAXED);
	__atomic_store_n(&layout->size, size, __ATOMIC_RELEASE); /* who sees it sees the extent */
	return 0;
}
