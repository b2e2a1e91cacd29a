/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ram.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "forked.h"
#include "ublk.h"

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

/* A descriptor of our own for a caller's file; a forked child has it not. */
static int own_file(int file)
{
	int own;

	if (file < 0)
		return -1;
	pu_fork_hold();
	own = pu_fork_add(fcntl(file, F_DUPFD_CLOEXEC, 0));
	pu_fork_release();
	return own;
}

/* ---- which pages of the file there are ---- */

static size_t bits_bytes(const struct pu_ram *ram)
{
	return ram->size / page_bytes() / 8 + 1;
}

static bool is_there(const struct pu_ram *ram, uint64_t page)
{
	return ram->there[page / 8] >> page % 8 & 1;
}

/* Pages from `first` to before `end`. A byte of bits belongs to one granule of the lock. */
static void mark(struct pu_ram *ram, uint64_t first, uint64_t end, bool there)
{
	while (first < end) {
		uint8_t *byte = ram->there + first / 8;
		uint64_t next = (first / 8 + 1) * 8 < end ? (first / 8 + 1) * 8 : end;
		uint8_t bits = (uint8_t)(((1u << (next - first)) - 1) << first % 8);

		/* Looked at first: the bits of a hole are to be one, too. */
		if (there && (*byte & bits) != bits)
			*byte |= bits;
		else if (!there && *byte & bits)
			*byte &= (uint8_t)~bits;
		first = next;
	}
}

static void mark_written(struct pu_ram *ram, uint64_t offset, uint64_t length)
{
	if (ram->there && length)
		mark(ram, offset / page_bytes(), (offset + length - 1) / page_bytes() + 1, true);
}

/* Those that the file has from whoever had it before. */
static int look_at_file(struct pu_ram *ram)
{
	off_t data, hole = 0;

	ram->there = mmap(NULL, bits_bytes(ram), PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram->there == MAP_FAILED) {
		ram->there = NULL;
		return -errno;
	}
	while ((data = lseek(ram->file, hole, SEEK_DATA)) >= 0 && (uint64_t)data < ram->size) {
		hole = lseek(ram->file, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		if ((uint64_t)hole > ram->size)
			hole = (off_t)ram->size;
		mark_written(ram, (uint64_t)data, (uint64_t)(hole - data));
	}
	return data < 0 && errno != ENXIO ? -errno : 0; /* ENXIO: only a hole is left */
}

static void close_file(struct pu_ram *ram)
{
	if (ram->there)
		munmap(ram->there, bits_bytes(ram));
	if (ram->file < 0)
		return;
	pu_fork_drop(ram->file);
	close(ram->file);
}

/* ---- the memory ---- */

/* Over the middle of what is reserved. */
static int open_memory(struct pu_ram *ram)
{
	if (ram->file < 0)
		return mprotect(ram->bytes, ram->size, PROT_READ | PROT_WRITE) ? -errno : 0;
	if (mmap(ram->bytes, ram->size, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_FIXED | MAP_NORESERVE, ram->file, 0) == MAP_FAILED)
		return -errno;
	return look_at_file(ram);
}

int pu_ram_init(struct pu_ram *ram, uint64_t size, int file)
{
	uint8_t *map;
	int error;

	*ram = (struct pu_ram){ .size = size, .file = own_file(file) };
	if (file >= 0 && ram->file < 0)
		return -errno;
	/* NORESERVE: a sparse terabyte costs nothing. */
	map = mmap(NULL, mapped_bytes(ram), PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED) {
		error = -errno;
		close_file(ram);
		return error;
	}
	ram->bytes = map + page_bytes();
	/* A child process has no use for the disk, and copying its page tables would make every
	 * control command slow. A huge page for a 4 KiB write would break the promise to stay
	 * sparse. */
	error = open_memory(ram);
	if (!error && madvise(ram->bytes, size, MADV_DONTFORK))
		error = -errno;
	if (!error)
		error = pu_lock_init(&ram->lock, PU_LOCK_SHARDS, PU_LOCK_GRANULE);
	madvise(ram->bytes, size, MADV_NOHUGEPAGE); /* refused where there are none: as well */
	if (error) {
		munmap(map, mapped_bytes(ram));
		close_file(ram);
	}
	return error;
}

void pu_ram_destroy(struct pu_ram *ram)
{
	pu_lock_destroy(&ram->lock);
	munmap(ram->bytes - page_bytes(), mapped_bytes(ram));
	close_file(ram);
}

static int64_t give_back(struct pu_ram *ram, uint64_t offset, uint64_t length)
{
	uint64_t page = page_bytes(), end = offset + length;
	uint64_t first = (offset + page - 1) / page * page, last = end / page * page;

	if (ram->file >= 0) { /* parts of pages are zeroed */
		if (fallocate(ram->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
			      (off_t)length))
			return -errno;
		mark(ram, first / page, last / page, false);
		return 0;
	}
	if (first >= last) {
		memset(ram->bytes + offset, 0, length);
		return 0;
	}
	memset(ram->bytes + offset, 0, first - offset);
	memset(ram->bytes + last, 0, end - last);
	return madvise(ram->bytes + first, last - first, MADV_DONTNEED) ? -errno : 0;
}

static void get(const struct pu_ram *ram, uint64_t offset, uint64_t length, uint8_t *buffer)
{
	uint64_t end = offset + length, page = page_bytes();

	if (!ram->there) {
		memcpy(buffer, ram->bytes + offset, length);
		return;
	}
	while (offset < end) {
		bool there = is_there(ram, offset / page);
		uint64_t next = (offset / page + 1) * page;

		while (next < end && is_there(ram, next / page) == there)
			next += page;
		if (next > end)
			next = end;
		if (there)
			memcpy(buffer, ram->bytes + offset, next - offset);
		else
			memset(buffer, 0, next - offset);
		buffer += next - offset;
		offset = next;
	}
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
		get(ram, offset, length, buffer);
		pu_lock_unlock(&ram->lock, offset, length);
		return 0;
	}
	pu_lock_write(&ram->lock, offset, length);
	if (op == PU_OP_WRITE || (op == PU_OP_WRITE_ZEROES && flags & PU_FLAG_NOUNMAP))
		mark_written(ram, offset, length);
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
	struct stat found;

	if (ram->file >= 0) /* pages that are swapped out are counted too */
		return fstat(ram->file, &found) ? 0 : (uint64_t)found.st_blocks * 512;
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
