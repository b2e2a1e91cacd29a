/* A disk whose every 8 bytes hold their own offset; writes must agree with it. */
#include <errno.h>
#include <stdint.h>
#include <string.h>

enum { READ = 0, WRITE = 1, FLUSH = 2 };

int64_t pattern_handler(void *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
			void *buffer)
{
	uint64_t *words = buffer;
	uint64_t *served = context;

	(void)flags;
	__atomic_add_fetch(served, 1, __ATOMIC_RELAXED);
	for (uint64_t i = 0; i < length / 8; i++) {
		if (op == READ)
			words[i] = offset + 8 * i;
		else if (op == WRITE && words[i] != offset + 8 * i)
			return -EILSEQ;
	}
	return op <= FLUSH ? 0 : -EOPNOTSUPP;
}
