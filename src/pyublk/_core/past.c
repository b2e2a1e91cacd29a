/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "past.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SECTOR 512u
#define PLACES (PU_PAST_SECTORS * 2) /* half of them stay free: a search is short */

static void *map(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

struct pu_past *pu_past_new(void)
{
	struct pu_past *past = calloc(1, sizeof(*past));

	if (!past)
		return NULL;
	pthread_mutex_init(&past->lock, NULL);
	past->numbers = map(PLACES * sizeof(*past->numbers));
	past->bytes = map((size_t)PLACES * SECTOR);
	if (!past->numbers || !past->bytes) {
		pu_past_free(past);
		return NULL;
	}
	return past;
}

void pu_past_free(struct pu_past *past)
{
	if (!past)
		return;
	if (past->numbers)
		munmap(past->numbers, PLACES * sizeof(*past->numbers));
	if (past->bytes)
		munmap(past->bytes, (size_t)PLACES * SECTOR);
	pthread_mutex_destroy(&past->lock);
	free(past);
}

static uint32_t place_of(const struct pu_past *past, uint64_t sector)
{
	uint32_t place = (uint32_t)(sector * UINT64_C(0x9e3779b97f4a7c15) >> 40) % PLACES;

	while (past->numbers[place] && past->numbers[place] != sector + 1)
		place = (place + 1) % PLACES;
	return place;
}

static void go_through(struct pu_past *past, uint64_t sector, uint8_t *shown, const uint8_t *data,
		       uint32_t count)
{
	pthread_mutex_lock(&past->lock);
	for (uint32_t i = 0; i < count; i++) {
		uint32_t place = place_of(past, sector + i);
		uint8_t *bytes = past->bytes + (size_t)place * SECTOR;

		if (past->numbers[place]) {
			if (shown)
				memcpy(shown + (size_t)i * SECTOR, bytes, SECTOR);
		} else if (past->used < PU_PAST_SECTORS) {
			past->used++;
			past->numbers[place] = sector + i + 1;
			memcpy(bytes, data + (size_t)i * SECTOR, SECTOR);
		}
	}
	pthread_mutex_unlock(&past->lock);
}

void pu_past_see(struct pu_past *past, uint64_t sector, const uint8_t *data, uint32_t count)
{
	go_through(past, sector, NULL, data, count);
}

void pu_past_show(struct pu_past *past, uint64_t sector, uint8_t *data, uint32_t count)
{
	go_through(past, sector, data, data, count);
}
