/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ram.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ublk.h"

#define SHARDS 64
#define GRANULE (UINT64_C(1) << 20)

static uint64_t page_bytes(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* A page without access on either side: the mapping never merges with a neighbour, so that
 * /proc/self/smaps speaks of this disk alone, and a stray access faults. */
static uint64_t mapped_bytes(const struct pu_ram *ram)
{
	return (ram->size + page_bytes() - 1) / page_bytes() * page_bytes() + 2 * page_bytes();
}

int pu_ram_init(struct pu_ram *ram, uint64_t size)
{
	uint8_t *map;
	int error;

	ram->size = size;
	/* NORESERVE: a sparse terabyte costs nothing. */
	map = mmap(NULL, mapped_bytes(ram), PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		return -errno;
	ram->bytes = map + page_bytes();
	/* A child process has no use for the disk, and copying its page tables would make every
	 * control command slow. A huge page for a 4 KiB write would break the promise to stay
	 * sparse. */
	if (mprotect(ram->bytes, size, PROT_READ | PROT_WRITE) ||
	    madvise(ram->bytes, size, MADV_DONTFORK))
		error = -errno;
	else
		error = pu_lock_init(&ram->lock, SHARDS, GRANULE);
	madvise(ram->bytes, size, MADV_NOHUGEPAGE); /* refused where there are none: as well */
	if (error)
		munmap(map, mapped_bytes(ram));
	return error;
}

void pu_ram_destroy(struct pu_ram *ram)
{
	pu_lock_destroy(&ram->lock);
	munmap(ram->bytes - page_bytes(), mapped_bytes(ram));
}

static int64_t give_back(struct pu_ram *ram, uint64_t offset, uint64_t length)
{
	uint64_t page = page_bytes(), end = offset + length;
	uint64_t first = (offset + page - 1) / page * page, last = end / page * page;

	if (first >= last) {
		memset(ram->bytes + offset, 0, length);
		return 0;
	}
	memset(ram->bytes + offset, 0, first - offset);
	memset(ram->bytes + last, 0, end - last);
	return madvise(ram->bytes + first, last - first, MADV_DONTNEED) ? -errno : 0;
}

int64_t pu_ram_handle(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
		      void *buffer)
{
	struct pu_ram *ram = context;
	int64_t result = 0;

	if (op == PU_OP_FLUSH)
		return 0;
	if (offset > ram->size || length > ram->size - offset)
		return -EIO;
	if (op == PU_OP_READ) {
		pu_lock_read(&ram->lock, offset, length);
		memcpy(buffer, ram->bytes + offset, length);
		pu_lock_unlock(&ram->lock, offset, length);
		return 0;
	}
	pu_lock_write(&ram->lock, offset, length);
	if (op == PU_OP_WRITE)
		memcpy(ram->bytes + offset, buffer, length);
	else if (op == PU_OP_WRITE_ZEROES && flags & PU_FLAG_NOUNMAP)
		memset(ram->bytes + offset, 0, length);
	else if (op == PU_OP_DISCARD || op == PU_OP_WRITE_ZEROES)
		result = give_back(ram, offset, length);
	else
		result = -EOPNOTSUPP;
	pu_lock_unlock(&ram->lock, offset, length);
	return result;
}

uint64_t pu_ram_resident(struct pu_ram *ram)
{
	/* Not mincore: it also counts the shared zero page, which a read of a hole maps. */
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char line[256];
	unsigned long long start, end, kilobytes, resident = 0;
	bool ours = false;

	while (smaps && fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%llx-%llx ", &start, &end) == 2)
			ours = start == (uintptr_t)ram->bytes;
		else if (ours && (sscanf(line, "Anonymous: %llu kB", &kilobytes) == 1 ||
				  sscanf(line, "Swap: %llu kB", &kilobytes) == 1))
			resident += kilobytes * 1024;
	}
	if (smaps)
		fclose(smaps);
	return resident;
}
