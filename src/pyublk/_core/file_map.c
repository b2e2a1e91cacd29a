/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "file_map.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WORD 64u

/* The pages of a range, and of a word of bits those that are among them. */
struct pages {
	uint64_t first, last;
};

static struct pages pages_of(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	return (struct pages){ offset >> map->page_shift, (offset + length - 1) >> map->page_shift };
}

static uint64_t mask(const struct pages *pages, uint64_t word)
{
	uint64_t bits = UINT64_MAX;

	if (word == pages->first / WORD)
		bits &= UINT64_MAX << pages->first % WORD;
	if (word == pages->last / WORD)
		bits &= UINT64_MAX >> (WORD - 1 - pages->last % WORD);
	return bits;
}

/* From the kernel, whose zeroes take no memory before they are used. */
static size_t bytes_of_bits(const struct pu_file_map *map)
{
	return ((map->length >> map->page_shift) / WORD + 1) * sizeof(*map->there);
}

void pu_file_map_open(struct pu_file_map *map, int fd)
{
	struct stat about;
	size_t length;
	void *bytes, *there;

	*map = (struct pu_file_map){ .page_shift =
					     (uint8_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE)) };
	if (fstat(fd, &about) || about.st_size <= 0)
		return;
	length = (size_t)about.st_size;
	bytes = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (bytes == MAP_FAILED) /* opened for reading */
		bytes = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);
	if (bytes == MAP_FAILED) /* the calls will do */
		return;
	madvise(bytes, length, MADV_DONTFORK);
	map->bytes = bytes;
	map->length = length;
	there = mmap(NULL, bytes_of_bits(map), PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	map->there = there == MAP_FAILED ? NULL : there;
}

void pu_file_map_close(struct pu_file_map *map)
{
	if (map->there)
		munmap(map->there, bytes_of_bits(map));
	if (map->bytes)
		munmap(map->bytes, map->length);
	*map = (struct pu_file_map){ 0 };
}

static bool is_known(const struct pu_file_map *map, const struct pages *pages)
{
	for (uint64_t word = pages->first / WORD; word <= pages->last / WORD; word++)
		if (mask(pages, word) & ~__atomic_load_n(&map->there[word], __ATOMIC_RELAXED))
			return false;
	return true;
}

static bool ask(const struct pu_file_map *map, struct pages pages)
{
	unsigned char there[1024];

	for (uint64_t at = pages.first, count; at <= pages.last; at += count) {
		count = pages.last - at + 1;
		if (count > sizeof(there))
			count = sizeof(there);
		if (mincore(map->bytes + (at << map->page_shift), count << map->page_shift, there) ||
		    memchr(there, 0, count)) /* bit 0; the others are not used */
			return false;
	}
	return true;
}

bool pu_file_map_holds(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages = pages_of(map, offset, length);

	if (map->there && is_known(map, &pages))
		return true;
	if (!ask(map, pages))
		return false;
	pu_file_map_note(map, offset, length);
	return true;
}

void pu_file_map_note(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages = pages_of(map, offset, length);

	if (!map->there || is_known(map, &pages))
		return;
	for (uint64_t word = pages.first / WORD; word <= pages.last / WORD; word++)
		__atomic_fetch_or(&map->there[word], mask(&pages, word), __ATOMIC_RELAXED);
}

void pu_file_map_forget(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages;

	if (!map->there || offset >= map->length)
		return;
	if (length > map->length - offset)
		length = map->length - offset;
	pages = pages_of(map, offset, length);
	for (uint64_t word = pages.first / WORD; word <= pages.last / WORD; word++)
		__atomic_fetch_and(&map->there[word], ~mask(&pages, word), __ATOMIC_RELAXED);
}
