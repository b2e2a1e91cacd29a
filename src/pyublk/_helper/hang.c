/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "hang.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LOOKS 8 /* in the time that a disk may take */
#define LONGEST_MS 5000

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

static int look_after(const struct guarded *disk)
{
	return disk->hang_ms / LOOKS < LONGEST_MS ? (int)(disk->hang_ms / LOOKS) + 1 : LONGEST_MS;
}

int hang_next_look(void)
{
	int64_t now = now_ms(), least = -1;

	for (struct guarded *one = guarded; one; one = one->next) {
		int64_t left = one->looked + look_after(one) - now;

		if (one->hang_ms && (least < 0 || left < least))
			least = left > 0 ? left : 0;
	}
	return (int)least;
}

/* Documentation/block/stat.rst: of each kind, how many requests have ended; how many are in flight. */
static bool read_counters(uint32_t id, uint64_t *answered, uint64_t *in_flight)
{
	char path[64], text[512];
	uint64_t reads, writes, discards = 0, flushes = 0;
	ssize_t bytes;
	int fd;

	snprintf(path, sizeof(path), "/sys/block/ublkb%u/stat", id);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	bytes = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (bytes <= 0)
		return false;
	text[bytes] = 0;
	if (sscanf(text,
		   "%" SCNu64 " %*s %*s %*s %" SCNu64 " %*s %*s %*s %" SCNu64 " %*s %*s %" SCNu64
		   " %*s %*s %*s %" SCNu64,
		   &reads, &writes, in_flight, &discards, &flushes) < 3)
		return false;
	*answered = reads + writes + discards + flushes;
	return true;
}

bool hang_seen(struct guarded *disk)
{
	uint64_t answered, in_flight;
	int64_t now = now_ms();
	bool hangs;

	if (!disk->hang_ms || now - disk->looked < look_after(disk))
		return false;
	disk->looked = now;
	if (!read_counters(disk->id, &answered, &in_flight))
		return false; /* it is being taken down */
	if (!disk->since || !in_flight || answered != disk->answered)
		disk->since = now;
	disk->answered = answered;
	hangs = now - disk->since >= disk->hang_ms;
	if (hangs)
		disk->since = now;
	return hangs;
}
