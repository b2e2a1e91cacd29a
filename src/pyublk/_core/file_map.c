/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "file_map.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WORD PU_FILE_MAP_PAGES

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

static size_t page_bytes(const struct pu_file_map *map)
{
	return (size_t)1 << map->page_shift;
}

/* At the last place that a file has: the mapping alone takes nothing. */
static void *map_last_page(const struct pu_file_map *map, int fd)
{
	off_t last = INT64_MAX & ~(off_t)(2 * page_bytes(map) - 1);

	return mmap(NULL, page_bytes(map), PROT_READ, MAP_SHARED, fd, last);
}

void pu_file_map_open(struct pu_file_map *map, int fd)
{
	struct stat about;
	size_t length;
	void *bytes, *there, *never;

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
	never = map_last_page(map, fd);
	map->never = never == MAP_FAILED ? NULL : never;
	if (!map->there || !map->never)
		pu_file_map_close(map);
}

void pu_file_map_close(struct pu_file_map *map)
{
	if (map->never)
		munmap(map->never, page_bytes(map));
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

/* Who neither owns a file nor may write to it is told that all of it is there. It may come to that
 * when the file is open already: a server gives up its rights then. */
static bool is_told_the_truth(const struct pu_file_map *map)
{
	unsigned char there = 1;

	return !mincore(map->never, page_bytes(map), &there) && !(there & 1);
}

/* For all the pages of a word at once: their neighbours will be asked for, too. */
static void ask(const struct pu_file_map *map, uint64_t word)
{
	uint64_t begin = (word * WORD) << map->page_shift, bytes = (uint64_t)WORD << map->page_shift;
	unsigned char there[WORD] = { 0 };
	uint64_t bits = 0;
	uint32_t pages;

	if (bytes > map->length - begin)
		bytes = map->length - begin;
	pages = (uint32_t)((bytes - 1) >> map->page_shift) + 1;
	if (mincore(map->bytes + begin, bytes, there))
		return;
	for (uint32_t i = 0; i < pages; i++)
		bits |= (uint64_t)(there[i] & 1) << i; /* the other bits of a byte are not used */
	if (bits == UINT64_MAX >> (WORD - pages) && !is_told_the_truth(map))
		return;
	__atomic_fetch_or(&map->there[word], bits, __ATOMIC_RELAXED);
}

bool pu_file_map_holds(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages = pages_of(map, offset, length);

	if (is_known(map, &pages))
		return true;
	for (uint64_t word = pages.first / WORD; word <= pages.last / WORD; word++)
		ask(map, word);
	return is_known(map, &pages);
}

void pu_file_map_note(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages = pages_of(map, offset, length);

	if (is_known(map, &pages))
		return;
	for (uint64_t word = pages.first / WORD; word <= pages.last / WORD; word++)
		__atomic_fetch_or(&map->there[word], mask(&pages, word), __ATOMIC_RELAXED);
}

void pu_file_map_forget(const struct pu_file_map *map, uint64_t offset, uint64_t length)
{
	struct pages pages;

	if (offset >= map->length) /* or not mapped */
		return;
	if (length > map->length - offset)
		length = map->length - offset;
	pages = pages_of(map, offset, length);
	/* Bits that were never set take no memory, and are not to: all of a large disk is discarded. */
	for (uint64_t word = pages.first / WORD; word <= pages.last / WORD; word++)
		if (__atomic_load_n(&map->there[word], __ATOMIC_RELAXED) & mask(&pages, word))
			__atomic_fetch_and(&map->there[word], ~mask(&pages, word), __ATOMIC_RELAXED);
}
