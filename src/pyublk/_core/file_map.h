/* SPDX-License-Identifier: MIT
 * A file in memory, mapped: the kernel copies between it and requests without a stop in between
 *
 * A page that nobody has written is a hole, which takes no memory until it is touched, be it to read.
 * Which pages are there costs a system call to ask, a fifth of what a read takes; so it is asked of
 * 64 at once, and remembered. A hole that somebody else punches later is not seen: what it saved is lost
 * again where it is read, as it would be through any mapping of the file.
 */
#ifndef PU_FILE_MAP_H
#define PU_FILE_MAP_H

#include <stdbool.h>
#include <stdint.h>

/* Of so many pages, aligned, it is asked at once. Who makes holes must not do so meanwhile: they would
 * be taken for pages that are there. */
#define PU_FILE_MAP_PAGES 64u

struct pu_file_map {
	uint8_t *bytes; /* NULL: not mapped */
	uint64_t length;
	uint64_t *there; /* a bit for each page that has been seen */
	uint8_t *never; /* a page of the file that nobody can write, so far is it beyond its end */
	uint8_t page_shift;
};

/* Leaves it unmapped where that cannot be. Nobody may touch the mapping but the kernel, to which a
 * file that was cut short is an error and no fault. */
void pu_file_map_open(struct pu_file_map *map, int fd);
void pu_file_map_close(struct pu_file_map *map);

/* Whether all of a range is there: reading what is not would allocate it. By any thread. */
bool pu_file_map_holds(const struct pu_file_map *map, uint64_t offset, uint64_t length);
/* A range was written, or (forget, which may go beyond the mapping) became a hole. By any thread. */
void pu_file_map_note(const struct pu_file_map *map, uint64_t offset, uint64_t length);
void pu_file_map_forget(const struct pu_file_map *map, uint64_t offset, uint64_t length);

#endif
