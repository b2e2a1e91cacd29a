/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "layout.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SMALLEST_REGION (UINT64_C(1) << 20)
#define MOST_REGIONS (UINT64_C(1) << 16)

int pu_layout_init(struct pu_layout *layout, enum pu_layout_kind kind, uint64_t size,
		   uint32_t nr_files, uint32_t nr_extents)
{
	uint64_t regions = kind == PU_LAYOUT_MIRROR ? MOST_REGIONS : 0;

	memset(layout, 0, sizeof(*layout));
	layout->kind = kind;
	layout->size = size;
	layout->nr_files = nr_files;
	layout->nr_extents = nr_extents;
	layout->blocked_region = PU_NO_REGION;
	if (kind == PU_LAYOUT_MIRROR) {
		layout->region_bytes = SMALLEST_REGION;
		while ((size - 1) / layout->region_bytes >= MOST_REGIONS)
			layout->region_bytes *= 2;
		layout->leg_bits.in_step = (uint16_t)((1u << nr_files) - 1);
	}
	layout->files = calloc(nr_files, sizeof(*layout->files));
	layout->extents = calloc(nr_extents + 1u, sizeof(*layout->extents));
	layout->regions = calloc(regions + 1, sizeof(*layout->regions));
	if (layout->files && layout->extents && layout->regions)
		return 0;
	pu_layout_destroy(layout);
	return -ENOMEM;
}

void pu_layout_map_memory(struct pu_layout *layout)
{
	if (layout->kind == PU_LAYOUT_MIRROR) /* whose files may be replaced */
		return;
	for (uint32_t i = 0; i < layout->nr_files; i++) {
		struct pu_file *file = &layout->files[i];
		struct stat about;
		void *map;

		if (!file->memory || fstat(file->fd, &about) || about.st_size <= 0)
			continue;
		map = mmap(NULL, (size_t)about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
		if (map == MAP_FAILED) /* opened for reading: the calls will do */
			continue;
		madvise(map, (size_t)about.st_size, MADV_DONTFORK);
		file->map = map;
		file->mapped = (uint64_t)about.st_size;
	}
}

void pu_layout_unmap_memory(struct pu_layout *layout)
{
	for (uint32_t i = 0; i < layout->nr_files; i++) {
		if (layout->files[i].map)
			munmap(layout->files[i].map, layout->files[i].mapped);
		layout->files[i].map = NULL;
		layout->files[i].mapped = 0;
	}
}

bool pu_file_holds(const struct pu_file *file, uint64_t offset, uint64_t length)
{
	unsigned char there[1024];
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t at = offset / page * page, end = offset + length;

	while (at < end) {
		uint64_t pages = (end - at + page - 1) / page;

		if (pages > sizeof(there))
			pages = sizeof(there);
		if (mincore(file->map + at, pages * page, there) ||
		    memchr(there, 0, pages)) /* bit 0; the others are not used */
			return false;
		at += pages * page;
	}
	return true;
}

void pu_layout_destroy(struct pu_layout *layout)
{
	if (layout->files)
		pu_layout_unmap_memory(layout);
	free(layout->files);
	free(layout->extents);
	free(layout->regions);
	layout->files = NULL;
	layout->extents = NULL;
	layout->regions = NULL;
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

static bool table_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
		       uint64_t at, struct pu_part *part)
{
	const struct pu_extent *extent;
	uint64_t inside, length_of;

	if (at >= length)
		return false;
	extent = find_extent(layout, offset + at);
	inside = offset + at - extent->start;
	length_of = __atomic_load_n(&extent->length, __ATOMIC_RELAXED);
	*part = (struct pu_part){ .file = extent->file, .offset = extent->offset + inside, .data = at };
	part->length = length_of - inside;
	if (part->length > length - at)
		part->length = length - at;
	part->first = part->length;
	return true;
}

static bool stripe_part(const struct pu_layout *layout, uint64_t offset, uint64_t length,
			uint32_t nth, struct pu_part *part)
{
	uint64_t chunk = layout->chunk, files = layout->nr_files;
	uint64_t first = offset / chunk, last = (offset + length - 1) / chunk;
	uint64_t from = first + nth, to;
	uint64_t end;

	if (nth >= files || from > last)
		return false;
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
	return true;
}

bool pu_layout_part(const struct pu_layout *layout, uint64_t offset, uint64_t length, uint32_t nth,
		    uint64_t at, struct pu_part *part)
{
	if (layout->kind == PU_LAYOUT_STRIPE)
		return stripe_part(layout, offset, length, nth, part);
	return table_part(layout, offset, length, at, part);
}

uint64_t pu_part_data(const struct pu_part *part, uint64_t done, uint64_t *contiguous)
{
	uint64_t beyond, nth, left = part->length - done;

	if (done < part->first || !part->chunk) {
		*contiguous = part->chunk && part->first < part->length ? part->first - done : left;
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

struct pu_leg_bits pu_layout_leg_bits(const struct pu_layout *layout)
{
	struct pu_leg_bits bits;

	__atomic_load(&layout->leg_bits, &bits, __ATOMIC_ACQUIRE);
	return bits;
}

enum pu_leg_state pu_layout_leg(const struct pu_layout *layout, uint32_t leg)
{
	struct pu_leg_bits bits = pu_layout_leg_bits(layout);

	if (bits.in_step & 1u << leg)
		return PU_LEG_SYNCED;
	return bits.resync & 1u << leg ? PU_LEG_RESYNC : PU_LEG_FAILED;
}

static uint16_t with(uint16_t bits, uint32_t leg, bool set)
{
	return (uint16_t)(set ? bits | 1u << leg : bits & ~(1u << leg));
}

void pu_layout_set_leg(struct pu_layout *layout, uint32_t leg, enum pu_leg_state state)
{
	struct pu_leg_bits bits = pu_layout_leg_bits(layout);

	bits.in_step = with(bits.in_step, leg, state == PU_LEG_SYNCED);
	bits.resync = with(bits.resync, leg, state == PU_LEG_RESYNC);
	__atomic_store(&layout->leg_bits, &bits, __ATOMIC_RELEASE);
}

uint32_t pu_layout_incarnation(const struct pu_layout *layout, uint32_t leg)
{
	return __atomic_load_n(&layout->legs[leg].file_generation, __ATOMIC_ACQUIRE);
}

uint32_t pu_layout_replaced(const struct pu_layout *layout, uint32_t leg)
{
	return __atomic_load_n(&layout->legs[leg].replaced, __ATOMIC_ACQUIRE);
}

uint32_t pu_layout_orphans(const struct pu_layout *layout, uint32_t leg, bool before)
{
	uint32_t which = (pu_layout_replaced(layout, leg) + before) & 1;

	return __atomic_load_n(&layout->legs[leg].orphans[which], __ATOMIC_ACQUIRE);
}

bool pu_layout_fail_leg(struct pu_layout *layout, uint32_t leg, uint32_t file_generation)
{
	struct pu_leg_bits bits = pu_layout_leg_bits(layout);

	if (pu_layout_leg(layout, leg) == PU_LEG_FAILED || bits.in_step == 1u << leg ||
	    file_generation != pu_layout_incarnation(layout, leg))
		return false;
	bits.in_step = with(bits.in_step, leg, false);
	bits.resync = with(bits.resync, leg, false);
	bits.unrecorded = with(bits.unrecorded, leg, true);
	__atomic_store(&layout->leg_bits, &bits, __ATOMIC_RELEASE);
	return true;
}

void pu_layout_recorded(struct pu_layout *layout)
{
	struct pu_leg_bits bits = pu_layout_leg_bits(layout);

	bits.unrecorded = 0;
	__atomic_store(&layout->leg_bits, &bits, __ATOMIC_RELEASE);
}

void pu_layout_replace_file(struct pu_layout *layout, uint32_t index, int fd, bool memory,
			    bool device, uint32_t file_generation)
{
	layout->files[index].fd = fd;
	layout->files[index].memory = memory;
	layout->files[index].device = device;
	if (file_generation != pu_layout_incarnation(layout, index))
		__atomic_fetch_add(&layout->legs[index].replaced, 1, __ATOMIC_RELEASE);
	__atomic_store_n(&layout->legs[index].file_generation, file_generation, __ATOMIC_RELEASE);
	__atomic_fetch_add(&layout->version, 1, __ATOMIC_RELEASE); /* who sees it sees the file */
}

int pu_layout_readable(const struct pu_layout *layout, uint64_t offset, uint32_t without)
{
	/* Neighbours from the same leg: it may read ahead. */
	uint32_t start = (uint32_t)(offset / layout->region_bytes % layout->nr_files);

	for (uint32_t i = 0; i < layout->nr_files; i++) {
		uint32_t leg = (start + i) % layout->nr_files;

		if (!(without & 1u << leg) && pu_layout_leg(layout, leg) == PU_LEG_SYNCED)
			return (int)leg;
	}
	return -1;
}

/* One that has grown has more regions than counters: those that share them are blocked together. */
static struct pu_region *counters_of(const struct pu_layout *layout, uint64_t region)
{
	return &layout->regions[region % MOST_REGIONS];
}

static uint64_t last_region(const struct pu_layout *layout, uint64_t offset, uint64_t length)
{
	return (offset + (length ? length : 1) - 1) / layout->region_bytes;
}

bool pu_layout_write_begins(struct pu_layout *layout, uint64_t offset, uint64_t length)
{
	uint64_t first = offset / layout->region_bytes, last = last_region(layout, offset, length);
	uint64_t blocked;

	for (uint64_t region = first; region <= last; region++)
		__atomic_fetch_add(&counters_of(layout, region)->begun, 1, __ATOMIC_SEQ_CST);
	/* After it is counted: who blocks the region now will see it, or it sees that. */
	blocked = __atomic_load_n(&layout->blocked_region, __ATOMIC_SEQ_CST);
	if (blocked == PU_NO_REGION)
		return true;
	for (uint64_t region = first; region <= last; region++) {
		if (counters_of(layout, region) != counters_of(layout, blocked))
			continue;
		pu_layout_write_ends(layout, offset, length);
		return false;
	}
	return true;
}

void pu_layout_write_ends(struct pu_layout *layout, uint64_t offset, uint64_t length)
{
	uint64_t last = last_region(layout, offset, length);

	for (uint64_t region = offset / layout->region_bytes; region <= last; region++)
		__atomic_fetch_add(&counters_of(layout, region)->ended, 1, __ATOMIC_SEQ_CST);
}

void pu_layout_block_writes(struct pu_layout *layout, uint64_t region)
{
	__atomic_store_n(&layout->blocked_region, region, __ATOMIC_SEQ_CST);
}

bool pu_layout_is_drained(const struct pu_layout *layout, uint64_t region)
{
	const struct pu_region *r = counters_of(layout, region);
	uint32_t ended = __atomic_load_n(&r->ended, __ATOMIC_SEQ_CST);

	return ended == __atomic_load_n(&r->begun, __ATOMIC_SEQ_CST);
}

int pu_layout_resize(struct pu_layout *layout, uint64_t size)
{
	struct pu_extent *last = layout->nr_extents ? &layout->extents[layout->nr_extents - 1] : NULL;

	if (!size || layout->kind == PU_LAYOUT_PER_REQUEST || (last && size <= last->start))
		return -EINVAL;
	/* Never made shorter: a request that began before may still be cut by it. */
	if (last && size - last->start > last->length)
		__atomic_store_n(&last->length, size - last->start, __ATOMIC_RELAXED);
	__atomic_store_n(&layout->size, size, __ATOMIC_RELEASE); /* who sees it sees the extent */
	return 0;
}
