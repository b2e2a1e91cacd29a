/* SPDX-License-Identifier: MIT
 * Requests served by an NBD server that the test plays, at the other end of a socket pair.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "answer.h"
#include "check.h"
#include "loopback.h"
#include "nbd.h"
#include "open.h"

#define DEPTH 8
#define BUFFER (256 * 1024)
#define BYTES (1u << 20)
#define ANSWER 0x67446698u
#define SECOND 1000000000

enum { READ, WRITE, FLUSH = 3, TRIM, WRITE_ZEROES = 6 };

struct asked {
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
};

static struct pu_queue queue;
static struct pu_nbd nbd;
static int ours[2], theirs[2]; /* of each link */
static uint8_t disk[BYTES], expected[BYTES], scratch[BYTES];
static unsigned seed = 7;
static int rounds; /* of the order of answers */

static void connect_link(uint32_t link)
{
	int ends[2];

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	ours[link] = ends[0];
	theirs[link] = ends[1];
	pu_nbd_attach(&nbd, link, ends[0]);
}

static void open_disk(uint32_t nr_links)
{
	const int files[] = { -1, -1 };
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = BUFFER,
		.extra_entries = pu_nbd_entries(nr_links),
		.files = files,
		.nr_files = nr_links,
	};

	CHECK_EQUAL(pu_queue_open(&queue, -1, &options), 0);
	CHECK_EQUAL(pu_nbd_open(&nbd, &queue, nr_links), 0);
	CHECK_EQUAL(pu_queue_fetch(&queue), 0);
	for (uint32_t link = 0; link < nr_links; link++)
		connect_link(link);
}

static void close_disk(void)
{
	uint32_t nr_links = nbd.nr_links;

	pu_nbd_stop(&nbd);
	CHECK(pu_queue_close(&queue));
	pu_nbd_close(&nbd);
	pu_queue_free(&queue);
	for (uint32_t link = 0; link < nr_links; link++) {
		close(ours[link]);
		close(theirs[link]);
	}
}

static void turn(void)
{
	CHECK_EQUAL(pu_nbd_turn(&nbd, 0), 0);
}

static void inject(uint16_t tag, uint32_t op, uint64_t offset, uint64_t length)
{
	CHECK_EQUAL(pu_loopback_inject(&queue, tag, op, offset >> 9, (uint32_t)(length >> 9)), 0);
}

static bool is_answered(uint16_t tag)
{
	return pu_tag_state(&queue.tags[tag]) == PU_TAG_FETCHING;
}

/* ---- the server ---- */

static void take(int fd, void *to, size_t length)
{
	for (size_t at = 0; at < length;) {
		ssize_t done = recv(fd, (uint8_t *)to + at, length - at, MSG_DONTWAIT);

		if (done > 0)
			at += (size_t)done;
		else
			turn(); /* the rest of a send */
	}
}

/* The next request, with a write's data in scratch. */
static struct asked next_request(int fd)
{
	struct asked asked;
	uint8_t header[28];
	uint32_t magic;

	take(fd, header, sizeof(header));
	memcpy(&magic, header, 4);
	CHECK_EQUAL(be32toh(magic), 0x25609513);
	memcpy(&asked.flags, header + 4, 2);
	memcpy(&asked.type, header + 6, 2);
	memcpy(&asked.cookie, header + 8, 8);
	memcpy(&asked.offset, header + 16, 8);
	memcpy(&asked.length, header + 24, 4);
	asked.flags = be16toh(asked.flags);
	asked.type = be16toh(asked.type);
	asked.offset = be64toh(asked.offset);
	asked.length = be32toh(asked.length);
	CHECK(asked.offset + asked.length <= BYTES);
	if (asked.type == WRITE)
		take(fd, scratch, asked.length);
	return asked;
}

/* In pieces, with turns between them. */
static void give(int fd, const void *from, size_t length)
{
	for (size_t at = 0; at < length;) {
		size_t piece = rand_r(&seed) % 4 ? length - at : 1 + (size_t)rand_r(&seed) % (length - at);
		ssize_t done = send(fd, (const uint8_t *)from + at, piece, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (done > 0)
			at += (size_t)done;
		if (done < 0 || rounds++ % 3 == 0)
			turn();
	}
}

static void give_header(int fd, uint32_t magic, uint32_t error, uint64_t cookie)
{
	uint8_t reply[16];

	magic = htobe32(magic);
	error = htobe32(error);
	memcpy(reply, &magic, 4);
	memcpy(reply + 4, &error, 4);
	memcpy(reply + 8, &cookie, 8);
	give(fd, reply, sizeof(reply));
}

static void answer(int fd, const struct asked *asked)
{
	if (asked->type == WRITE_ZEROES || asked->type == TRIM)
		memset(disk + asked->offset, 0, asked->length);
	give_header(fd, ANSWER, 0, asked->cookie);
	if (asked->type == READ)
		give(fd, disk + asked->offset, asked->length);
}

static struct asked take_request(int fd)
{
	struct asked asked = next_request(fd);

	if (asked.type == WRITE)
		memcpy(disk + asked.offset, scratch, asked.length);
	return asked;
}

static void serve_one(int fd)
{
	struct asked asked = take_request(fd);

	answer(fd, &asked);
}

static void wait_for(uint16_t tag, int32_t result)
{
	for (int i = 0; i < 100 && !is_answered(tag); i++)
		CHECK_EQUAL(pu_nbd_turn(&nbd, SECOND / 100), 0);
	CHECK(is_answered(tag));
	CHECK_EQUAL(pu_loopback_result(&queue, tag), result);
}

/* Until a link is told to be down: why. */
static int broken(uint32_t link)
{
	int reason = 0, told;

	for (int i = 0; i < 100 && !nbd.to_tell; i++)
		CHECK_EQUAL(pu_nbd_turn(&nbd, SECOND / 100), 0);
	told = pu_nbd_tell(&nbd, &reason);
	CHECK_EQUAL(told, link);
	CHECK_EQUAL(pu_nbd_tell(&nbd, &reason), -1);
	return reason;
}

static void connect_again(uint32_t link)
{
	close(ours[link]);
	close(theirs[link]);
	pu_nbd_release(&nbd, link);
	connect_link(link);
}

/* ---- what is kept ---- */

/* A batch of requests to different parts of the disk, answered in another order, over both links. */
static void random_batch(uint32_t nr_links)
{
	const uint64_t part = BYTES / DEPTH;
	struct asked asked[2][DEPTH];
	uint32_t count[2] = { 0, 0 }, op[DEPTH];
	uint64_t offset[DEPTH], length[DEPTH];

	for (uint16_t tag = 0; tag < DEPTH; tag++) {
		uint8_t *buffer = pu_queue_next_buffer(&queue, tag);

		op[tag] = (uint32_t[]){ PU_OP_READ, PU_OP_WRITE, PU_OP_READ, PU_OP_WRITE_ZEROES }
			[rand_r(&seed) % 4];
		length[tag] = (1 + (uint64_t)rand_r(&seed) % (rand_r(&seed) % 3 ? 16 : part / 512)) * 512;
		offset[tag] = tag * part + (uint64_t)rand_r(&seed) % ((part - length[tag]) / 512 + 1) * 512;
		for (uint64_t at = 0; at < length[tag]; at++)
			buffer[at] = (uint8_t)rand_r(&seed);
		if (op[tag] == PU_OP_WRITE)
			memcpy(expected + offset[tag], buffer, length[tag]);
		else if (op[tag] == PU_OP_WRITE_ZEROES)
			memset(expected + offset[tag], 0, length[tag]);
		inject(tag, op[tag], offset[tag], length[tag]);
	}
	turn();
	for (uint32_t link = 0; link < nr_links; link++)
		for (count[link] = 0; count[link] < DEPTH / nr_links; count[link]++)
			asked[link][count[link]] = take_request(theirs[link]);
	for (uint32_t link = 0; link < nr_links; link++)
		for (uint32_t left = count[link]; left; left--) {
			uint32_t i = (uint32_t)rand_r(&seed) % left;

			answer(theirs[link], &asked[link][i]);
			asked[link][i] = asked[link][left - 1];
		}
	for (uint16_t tag = 0; tag < DEPTH; tag++) {
		bool moves = op[tag] != PU_OP_WRITE_ZEROES;

		wait_for(tag, moves ? (int32_t)length[tag] : 0);
		if (op[tag] == PU_OP_READ)
			CHECK(!memcmp(pu_queue_next_buffer(&queue, tag), expected + offset[tag],
				      length[tag]));
	}
	CHECK(!memcmp(disk, expected, BYTES));
}

static void bytes_are_kept(uint32_t nr_links)
{
	open_disk(nr_links);
	for (int i = 0; i < 60; i++)
		random_batch(nr_links);
	close_disk();
}

static void operations_and_flags_are_the_servers(void)
{
	const struct {
		uint32_t op;
		uint16_t type, flags;
	} cases[] = {
		{ PU_OP_READ | PU_FLAG_FUA, READ, 0 },
		{ PU_OP_WRITE | PU_FLAG_FUA, WRITE, 1 },
		{ PU_OP_FLUSH, FLUSH, 0 },
		{ PU_OP_DISCARD, TRIM, 0 },
		{ PU_OP_WRITE_ZEROES, WRITE_ZEROES, 0 },
		{ PU_OP_WRITE_ZEROES | PU_FLAG_NOUNMAP | PU_FLAG_FUA, WRITE_ZEROES, 3 },
	};

	open_disk(1);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		bool flush = cases[i].type == FLUSH;
		struct asked asked;

		inject(3, cases[i].op, flush ? 0 : 8192, flush ? 0 : 4096);
		turn();
		asked = take_request(theirs[0]);
		CHECK_EQUAL(asked.type, cases[i].type);
		CHECK_EQUAL(asked.flags, cases[i].flags);
		CHECK_EQUAL(asked.offset, flush ? 0 : 8192);
		CHECK_EQUAL(asked.length, flush ? 0 : 4096);
		answer(theirs[0], &asked);
		wait_for(3, asked.type <= WRITE ? 4096 : 0);
	}
	inject(3, PU_OP_ZONE_APPEND, 0, 4096);
	wait_for(3, -EOPNOTSUPP);
	close_disk();
}

static void errors_are_the_servers(void)
{
	const struct {
		uint32_t error;
		int32_t result;
	} cases[] = { { 1, -EPERM }, { 5, -EIO },	 { 12, -ENOMEM }, { 22, -EINVAL },
		      { 28, -ENOSPC }, { 75, -EOVERFLOW }, { 95, -EOPNOTSUPP }, { 12345, -EIO } };

	open_disk(1);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct asked asked;

		inject(1, i & 1 ? PU_OP_READ : PU_OP_WRITE, 0, 512);
		turn();
		asked = take_request(theirs[0]);
		give_header(theirs[0], ANSWER, cases[i].error, asked.cookie);
		wait_for(1, cases[i].result);
	}
	close_disk();
}

/* ---- links that break ---- */

enum lie { CLOSES, SHUTS_DOWN, NO_MAGIC, NOT_ASKED, TWICE, NO_SUCH_TAG, HALF_A_HEADER, HALF_THE_DATA, LIES };

static int tell_lie(enum lie lie, const struct asked *asked)
{
	int fd = theirs[0];

	switch (lie) {
	case SHUTS_DOWN:
		give_header(fd, ANSWER, 108, asked->cookie);
		return PU_NBD_SHUTTING_DOWN;
	case NO_MAGIC:
		give_header(fd, 0x668e33ef, 0, asked->cookie);
		return PU_NBD_BAD_MAGIC;
	case NOT_ASKED:
		give_header(fd, ANSWER, 0, asked->cookie ^ htobe64(1 << 16));
		return PU_NBD_UNKNOWN_COOKIE;
	case NO_SUCH_TAG:
		give_header(fd, ANSWER, 0, asked->cookie | htobe64(0xffff));
		return PU_NBD_UNKNOWN_COOKIE;
	case TWICE:
		answer(fd, asked);
		give_header(fd, ANSWER, 0, asked->cookie);
		return PU_NBD_UNKNOWN_COOKIE;
	case HALF_A_HEADER:
		give(fd, "\x67\x44\x66", 3);
		shutdown(fd, SHUT_RDWR);
		return PU_NBD_CLOSED;
	case HALF_THE_DATA:
		give_header(fd, ANSWER, 0, asked->cookie);
		give(fd, disk, asked->length / 2);
		shutdown(fd, SHUT_RDWR);
		return PU_NBD_CLOSED;
	default:
		shutdown(fd, SHUT_RDWR);
		return PU_NBD_CLOSED;
	}
}

/* None is lost, none is answered by what was said last, and each goes out again whole. */
static void requests_outlive(enum lie lie)
{
	struct asked first;
	uint8_t *buffer;
	int reason;

	open_disk(1);
	memset(disk, 0x11, 4 * 65536);
	for (uint16_t tag = 0; tag < 4; tag++) {
		buffer = pu_queue_next_buffer(&queue, tag);
		memset(buffer, tag, 65536);
		inject(tag, tag & 1 ? PU_OP_WRITE : PU_OP_READ, tag * 65536, 65536);
	}
	turn();
	first = take_request(theirs[0]);
	reason = tell_lie(lie, &first);
	CHECK_EQUAL(broken(0), reason);
	CHECK_EQUAL(is_answered(0), lie == TWICE);
	for (uint16_t tag = 1; tag < 4; tag++)
		CHECK(!is_answered(tag));
	turn();
	connect_again(0);
	turn();
	for (int i = lie == TWICE; i < 4; i++)
		serve_one(theirs[0]);
	for (uint16_t tag = 0; tag < 4; tag++) {
		wait_for(tag, 65536);
		memset(scratch, tag & 1 ? tag : 0x11, 65536);
		CHECK(!memcmp(disk + tag * 65536, scratch, 65536));
		if (!(tag & 1))
			CHECK(!memcmp(pu_queue_next_buffer(&queue, tag), scratch, 65536));
	}
	CHECK_EQUAL(nbd.resent, lie == TWICE ? 3 : 4);
	close_disk();
}

/* The other link goes on; what the broken one had waits until it is released. */
static void another_link_takes_over(void)
{
	struct asked asked;

	open_disk(2);
	inject(0, PU_OP_WRITE, 0, 4096);
	inject(1, PU_OP_WRITE, 4096, 4096);
	turn();
	asked = take_request(theirs[0]);
	serve_one(theirs[1]);
	wait_for(1, 4096);
	shutdown(theirs[0], SHUT_RDWR);
	CHECK_EQUAL(broken(0), PU_NBD_CLOSED);
	inject(1, PU_OP_FLUSH, 0, 0);
	turn();
	CHECK_EQUAL(next_request(theirs[1]).type, FLUSH);
	pu_nbd_release(&nbd, 0);
	turn();
	asked = take_request(theirs[1]);
	CHECK_EQUAL(asked.type, WRITE);
	answer(theirs[1], &asked);
	wait_for(0, 4096);
	CHECK(!is_answered(1));
	close_disk(); /* with a request that is never answered */
}

static void without_links_requests_fail_if_told_so(void)
{
	open_disk(1);
	turn();
	pu_nbd_drop(&nbd, 0, ETIMEDOUT);
	CHECK_EQUAL(broken(0), ETIMEDOUT);
	inject(0, PU_OP_READ, 0, 512);
	turn();
	CHECK(!is_answered(0));
	pu_nbd_set_fail(&nbd, true);
	wait_for(0, -EIO);
	inject(0, PU_OP_READ, 0, 512);
	wait_for(0, -EIO);
	connect_again(0);
	inject(0, PU_OP_READ, 0, 512);
	turn();
	serve_one(theirs[0]);
	wait_for(0, 512);
	close_disk();
}

/* Its server may still do what it was asked first: that must not meet the tag's next request. */
static void a_request_that_was_failed_from_outside_breaks_its_link(void)
{
	struct asked asked;

	open_disk(1);
	memset(pu_queue_next_buffer(&queue, 2), 1, 4096);
	inject(2, PU_OP_WRITE, 0, 4096);
	turn();
	asked = next_request(theirs[0]);
	pu_queue_fail_held(&queue, EIO);
	wait_for(2, -EIO);
	memset(pu_queue_next_buffer(&queue, 2), 2, 4096);
	inject(2, PU_OP_WRITE, 0, 4096);
	CHECK_EQUAL(broken(0), ETIMEDOUT);
	connect_again(0);
	turn();
	serve_one(theirs[0]);
	wait_for(2, 4096);
	CHECK_EQUAL(disk[0], 2);
	/* Answered late, with nobody waiting: no harm, and no link is lost. */
	inject(2, PU_OP_READ, 0, 4096);
	turn();
	asked = next_request(theirs[0]);
	pu_queue_fail_held(&queue, EIO);
	wait_for(2, -EIO);
	answer(theirs[0], &asked);
	turn();
	inject(2, PU_OP_READ, 0, 4096);
	turn();
	serve_one(theirs[0]);
	wait_for(2, 4096);
	close_disk();
}

/* A send that is stuck half-way does not keep the link, or the queue, from its end. */
static void a_server_that_does_not_read(void)
{
	open_disk(1);
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		inject(tag, PU_OP_WRITE, 0, BUFFER);
	turn();
	turn();
	pu_nbd_drop(&nbd, 0, ETIMEDOUT);
	CHECK_EQUAL(broken(0), ETIMEDOUT);
	connect_again(0);
	turn();
	serve_one(theirs[0]);
	close_disk();
}

static void *break_and_attach(void *unused)
{
	struct asked asked;

	(void)unused;
	for (int i = 0; i < 3; i++) {
		CHECK_EQUAL(recv(theirs[0], scratch, 28, MSG_WAITALL), 28);
		pu_nbd_drop(&nbd, 0, ETIMEDOUT);
		CHECK_EQUAL(recv(theirs[0], scratch, 28, 0), 0);
		while (__atomic_load_n(&nbd.links[0].pending, __ATOMIC_RELAXED))
			sched_yield();
		pu_nbd_release(&nbd, 0);
		close(theirs[0]);
		connect_link(0);
	}
	CHECK_EQUAL(recv(theirs[0], scratch, 28, MSG_WAITALL), 28);
	memcpy(&asked.cookie, scratch + 8, 8);
	memcpy(scratch, "\x67\x44\x66\x98\0\0\0", 8);
	memcpy(scratch + 8, &asked.cookie, 8);
	CHECK_EQUAL(send(theirs[0], scratch, 16 + 512, 0), 16 + 512);
	return NULL;
}

static void orders_come_from_other_threads(void)
{
	pthread_t thread;
	int reason, told = 0;

	open_disk(1);
	turn();
	CHECK_EQUAL(pthread_create(&thread, NULL, break_and_attach, NULL), 0);
	inject(0, PU_OP_READ, 0, 512);
	while (!is_answered(0)) {
		CHECK_EQUAL(pu_nbd_turn(&nbd, SECOND), 0);
		while (pu_nbd_tell(&nbd, &reason) >= 0)
			told++;
	}
	pthread_join(thread, NULL);
	CHECK_EQUAL(told, 3);
	CHECK_EQUAL(pu_loopback_result(&queue, 0), 512);
	close_disk();
}

int main(void)
{
	bytes_are_kept(1);
	bytes_are_kept(2);
	operations_and_flags_are_the_servers();
	errors_are_the_servers();
	for (enum lie lie = 0; lie < LIES; lie++)
		requests_outlive(lie);
	another_link_takes_over();
	without_links_requests_fail_if_told_so();
	a_request_that_was_failed_from_outside_breaks_its_link();
	a_server_that_does_not_read();
	orders_come_from_other_threads();
	return 0;
}
