/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ram.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "ublk.h"

#define PAGE 4096u
#define MIB (1u << 20)
#ifdef __SANITIZE_THREAD__
#define HUGE (1ull << 34) /* its shadow memory leaves less room */
#else
#define HUGE (1ull << 40)
#endif

static uint8_t buffer[4 * MIB];

static bool in_file; /* where the disks that are made have their bytes */

static void make(struct pu_ram *ram, uint64_t size)
{
	int file = in_file ? memfd_create("ram_test", MFD_CLOEXEC) : -1;

	if (file >= 0)
		CHECK_EQUAL(ftruncate(file, (off_t)size), 0);
	CHECK_EQUAL(in_file, file >= 0);
	CHECK_EQUAL(pu_ram_init(ram, size, file), 0);
	if (file >= 0)
		close(file); /* it has its own */
}

static int64_t request(struct pu_ram *ram, uint32_t op, uint32_t flags, uint64_t offset,
		       uint64_t length)
{
	return pu_ram_handle(ram, op, flags, offset, length, buffer);
}

static void check_bytes(struct pu_ram *ram, uint64_t offset, uint64_t length, uint8_t wanted)
{
	memset(buffer, 0xee, length);
	CHECK_EQUAL(request(ram, PU_OP_READ, 0, offset, length), 0);
	for (uint64_t i = 0; i < length; i++)
		if (buffer[i] != wanted)
			CHECK_EQUAL(buffer[i], wanted);
}

static void fill(struct pu_ram *ram, uint64_t offset, uint64_t length, uint8_t value)
{
	memset(buffer, value, length);
	CHECK_EQUAL(request(ram, PU_OP_WRITE, 0, offset, length), 0);
}

static void holes_read_as_zeroes_and_stay_holes(void)
{
	struct pu_ram ram;

	make(&ram, HUGE);
	check_bytes(&ram, HUGE - MIB, MIB, 0);
	CHECK_EQUAL(pu_ram_resident(&ram), 0);
	fill(&ram, HUGE / 2 + 512, 512, 7);
	check_bytes(&ram, HUGE / 2 + 512, 512, 7);
	CHECK_EQUAL(pu_ram_resident(&ram), PAGE);
	pu_ram_destroy(&ram);
}

static void freed_pages_are_given_back(uint32_t op)
{
	struct pu_ram ram;

	make(&ram, 4 * MIB);
	fill(&ram, 0, 4 * MIB, 9);
	CHECK_EQUAL(pu_ram_resident(&ram), 4 * MIB);
	/* from inside page 0 to inside page 256: both edges stay, zeroed */
	CHECK_EQUAL(request(&ram, op, 0, 512, MIB), 0);
	CHECK_EQUAL(pu_ram_resident(&ram), 3 * MIB + PAGE);
	check_bytes(&ram, 0, 512, 9);
	check_bytes(&ram, 512, MIB, 0);
	check_bytes(&ram, 512 + MIB, 4 * MIB - 512 - MIB, 9);
	/* inside one page: nothing to give back */
	CHECK_EQUAL(request(&ram, op, 0, 2 * MIB + 512, 1024), 0);
	check_bytes(&ram, 2 * MIB, 512, 9);
	check_bytes(&ram, 2 * MIB + 512, 1024, 0);
	check_bytes(&ram, 2 * MIB + 1536, 512, 9);
	pu_ram_destroy(&ram);
}

static void nounmap_keeps_the_memory(void)
{
	struct pu_ram ram;
	uint64_t before;

	make(&ram, 4 * MIB);
	fill(&ram, 0, 2 * MIB, 1);
	before = pu_ram_resident(&ram);
	CHECK_EQUAL(request(&ram, PU_OP_WRITE_ZEROES, PU_FLAG_NOUNMAP, 0, 2 * MIB), 0);
	check_bytes(&ram, 0, 2 * MIB, 0);
	CHECK_EQUAL(pu_ram_resident(&ram), before);
	pu_ram_destroy(&ram);
}

static void what_cannot_be_is_refused(void)
{
	struct pu_ram ram;

	make(&ram, MIB);
	CHECK_EQUAL(request(&ram, PU_OP_READ, 0, MIB - 512, 1024), -EIO);
	CHECK_EQUAL(request(&ram, PU_OP_WRITE, 0, UINT64_MAX - 511, 1024), -EIO);
	CHECK_EQUAL(request(&ram, 13, 0, 0, 512), -EOPNOTSUPP);
	CHECK_EQUAL(request(&ram, PU_OP_FLUSH, 0, 0, 0), 0);
	pu_ram_destroy(&ram);
	CHECK_EQUAL(pu_ram_init(&ram, 1ull << 60, -1), -ENOMEM);
}

struct writer {
	struct pu_ram *ram;
	uint8_t value;
};

#define SPAN (3 * MIB / 2) /* over two shards */

static void *write_over_and_over(void *argument)
{
	struct writer *writer = argument;
	uint8_t *mine = malloc(SPAN);

	memset(mine, writer->value, SPAN);
	for (int i = 0; i < 30; i++)
		CHECK_EQUAL(pu_ram_handle(writer->ram, PU_OP_WRITE, 0, MIB / 2, SPAN, mine), 0);
	free(mine);
	return NULL;
}

static void *read_over_and_over(void *argument)
{
	struct writer *reader = argument;
	uint8_t *mine = malloc(SPAN);

	for (int i = 0; i < 30; i++) {
		CHECK_EQUAL(pu_ram_handle(reader->ram, PU_OP_READ, 0, MIB / 2, SPAN, mine), 0);
		CHECK(!memcmp(mine, mine + 1, SPAN - 1)); /* one writer's bytes, whole */
	}
	free(mine);
	return NULL;
}

static void overlapping_requests_stay_whole(void)
{
	struct pu_ram ram;
	pthread_t threads[4];
	struct writer roles[4] = { { &ram, 1 }, { &ram, 2 }, { &ram, 0 }, { &ram, 0 } };

	make(&ram, 4 * MIB);
	for (int i = 0; i < 4; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL,
					   i < 2 ? write_over_and_over : read_over_and_over,
					   &roles[i]),
			    0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	pu_ram_destroy(&ram);
}

static int next_descriptor(void)
{
	int fd = dup(0);

	close(fd);
	return fd;
}

static void a_file_keeps_the_bytes(void)
{
	struct pu_ram ram;
	int file = memfd_create("ram_test", MFD_CLOEXEC), before;

	CHECK_EQUAL(ftruncate(file, 4 * MIB), 0);
	before = next_descriptor();
	for (uint8_t turn = 1; turn < 4; turn++) {
		CHECK_EQUAL(pu_ram_init(&ram, 4 * MIB, file), 0);
		check_bytes(&ram, MIB, MIB, turn == 1 ? 0 : turn - 1);
		check_bytes(&ram, 0, MIB, 0);
		fill(&ram, MIB, MIB, turn);
		CHECK_EQUAL(pu_ram_resident(&ram), MIB);
		/* over both edges of what is there */
		CHECK_EQUAL(request(&ram, PU_OP_READ, 0, 512, 3 * MIB), 0);
		CHECK(!buffer[MIB - 513] && buffer[MIB - 512] == turn);
		CHECK(buffer[2 * MIB - 513] == turn && !buffer[2 * MIB - 512]);
		pu_ram_destroy(&ram);
	}
	CHECK_EQUAL(next_descriptor(), before);
	close(file);
	CHECK_EQUAL(pu_ram_init(&ram, MIB, file), -EBADF);
}

int main(void)
{
	for (int kind = 0; kind < 2; kind++) {
		in_file = kind;
		holes_read_as_zeroes_and_stay_holes();
		freed_pages_are_given_back(PU_OP_DISCARD);
		freed_pages_are_given_back(PU_OP_WRITE_ZEROES);
		nounmap_keeps_the_memory();
		what_cannot_be_is_refused();
		overlapping_requests_stay_whole();
	}
	a_file_keeps_the_bytes();
	return 0;
}
