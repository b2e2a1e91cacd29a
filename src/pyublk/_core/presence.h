/* SPDX-License-Identifier: MIT
 * The presence map: which blocks of a disk its upper file has; the others are below
 *
 * One bit for each block, shared by all queues of the disk, which follow it (present.h), and by those
 * who fill and evict blocks. The upper file is the layout's first; a block lies at its own offset.
 *
 * The bits are in memory, the caller's, and are looked at without a lock. They never say too much:
 *
 * - Whoever wants to change an absent block - a write, a copy of what is below, an eviction - holds it
 *   first: `busy`, another bit for each block, is set by him who finds it clear. While he holds it,
 *   nobody else writes these bytes of the upper file, and nobody else makes the block present. So what
 *   was read below cannot come to lie over what a client wrote later: either the write had the block,
 *   then the reader below never got it, or it waits, and is done after the fill.
 * - He makes the block present when all of its bytes are in the upper file, and lets go of it after
 *   that. Who finds `busy` clear then looks at `present` again, and finds it set. When something failed
 *   he only lets go: what the upper file has got in an absent block is never looked at.
 * - A request holds all blocks that it needs to hold, or none: nobody waits for one while he holds
 *   another. Who fetches blocks from below holds those that were free, waits for nobody, and is not
 *   waited for by queues: the request that wants them is looked at again when he is done.
 * - A present block is written as in any file. It becomes absent only by pu_presence_evict, while its
 *   region is blocked and drained (regions.h): no request is between looking at the bit and using the
 *   file. He who evicts holds the block until the map on disk says that it is absent, and the upper
 *   file has been punched: who would fetch it again waits for that. Before it is punched, the file has
 *   the block whole, whatever the map says; after, the map says that it is absent.
 *
 * Durable is what the map file says, which is written here by nobody: `dirty` tells which pages of it
 * are out of date. Who syncs takes a page's copy first, then syncs the upper file, then writes the
 * copy: so no bit gets there before its block's bytes. A bit is set before its page is marked dirty, and
 * both before the write is answered: a flush that comes later finds it. While somebody syncs, the map
 * is not synced, even if nothing is marked: a flush must not be answered by what another has yet to
 * write.
 */
#ifndef PU_PRESENCE_H
#define PU_PRESENCE_H

#include <pthread.h>

#include "layout.h"
#include "policy.h"
#include "regions.h"

#define PU_PRESENCE_PAGE 4096u /* bytes of the map that are written together */
#define PU_SMALLEST_BLOCK 4096u
#define PU_KEPT_FAILURES 64u
#define PU_COUNTER_SHARDS 16u

/* A fetch of blocks that failed. */
struct pu_fetch_failure {
	uint64_t number; /* counts up from 1; 0: none */
	uint64_t first, end; /* blocks */
	int error; /* -errno */
};

struct pu_presence_counters {
	_Alignas(64) uint64_t hits, misses; /* requests all of whose blocks were present, or not */
	uint64_t copy_ups; /* parts of blocks that writes copied up */
};

struct pu_presence {
	struct pu_policy policy; /* first: who has the policy has the map */
	struct pu_layout *layout; /* its files: the upper one, those of the maps below, the bottom's */
	const struct pu_presence *next; /* a map below this one, which does not change; NULL: none */
	const struct pu_layout *bottom; /* a table or stripe below all maps; NULL: it is asked for */
	uint32_t shift; /* of a block's bytes */
	uint64_t nr_blocks;
	uint64_t *present; /* the caller's */
	uint64_t *busy;
	uint64_t *writable; /* blocks that may be written; NULL: all */
	uint64_t *touched;  /* blocks that a request wanted, since somebody asked; NULL: not kept */
	uint64_t *dirty;    /* pages of `present` */
	uint64_t unsynced;  /* of these, and syncs under way */
	bool always_deferred; /* flushes, also when the map is synced */
	bool writes_through;  /* writes are deferred when they are in the upper file */
	bool evicts;
	struct pu_regions regions; /* if it evicts: all requests under way */
	uint32_t waiters; /* requests that wait for blocks that somebody holds */
	pthread_mutex_t lock; /* guards what follows */
	uint64_t failures; /* how many there were */
	struct pu_fetch_failure failed[PU_KEPT_FAILURES];
	/* Added up; those of a queue by its number, so that queues seldom share a line. */
	struct pu_presence_counters counters[PU_COUNTER_SHARDS];
};

struct pu_presence_options {
	uint32_t block_bytes; /* a power of two, PU_SMALLEST_BLOCK at least */
	uint64_t *present; /* pu_presence_words of them, which stay the caller's */
	bool gated;   /* a block is written only when pu_presence_set_writable has said so */
	bool evicts;
	bool writes_through;
	bool always_deferred;
};

/* Words of a bitmap for the blocks of a disk; whole pages. */
uint64_t pu_presence_words(uint64_t size, uint32_t block_bytes);

/* Of a layout whose first file is the upper one. 0 or -ENOMEM. */
int pu_presence_init(struct pu_presence *presence, struct pu_layout *layout,
		     const struct pu_presence_options *options);
void pu_presence_destroy(struct pu_presence *presence);

/* Blocks are counted from the start of the disk; a range is from `first` up to `end`, without it. */

static inline bool pu_presence_has(const struct pu_presence *p, uint64_t block)
{
	return __atomic_load_n(&p->present[block / 64], __ATOMIC_ACQUIRE) >> block % 64 & 1;
}

uint64_t pu_presence_run_slowly(const struct pu_presence *p, uint64_t first, uint64_t end,
				bool *present);

/* How many blocks from `first` on are alike (*present: which), of one at least. Those of a request are
 * mostly in one word of the map. */
static inline uint64_t pu_presence_run(const struct pu_presence *p, uint64_t first, uint64_t end,
				       bool *present)
{
	uint64_t bits, others, count = end - first;

	if (first / 64 != (end - 1) / 64)
		return pu_presence_run_slowly(p, first, end, present);
	bits = __atomic_load_n(&p->present[first / 64], __ATOMIC_SEQ_CST) >> first % 64;
	*present = bits & 1;
	others = (*present ? ~bits : bits) & UINT64_MAX >> (64 - count);
	return others ? (uint64_t)__builtin_ctzll(others) : count;
}

static inline bool pu_presence_has_all(const struct pu_presence *p, uint64_t first, uint64_t end)
{
	bool present;

	return first == end || (pu_presence_run(p, first, end, &present) == end - first && present);
}

/* Where the bytes from `offset` on are, as many as are in one place: in the upper file, which is the
 * first, in that of a map below, or below all maps. False: nowhere. */
bool pu_presence_part(const struct pu_presence *p, uint64_t offset, uint64_t length,
		      struct pu_part *part);
uint64_t pu_presence_count(const struct pu_presence *p, uint64_t first, uint64_t end);

/* Holds all absent blocks of a range, or none (false: somebody holds one). */
bool pu_presence_hold(struct pu_presence *p, uint64_t first, uint64_t end);
/* Holds the next run of absent blocks that nobody holds, from *first on, which is moved there; at most
 * `most`. How many; 0: there is none. */
uint64_t pu_presence_claim(struct pu_presence *p, uint64_t *first, uint64_t end, uint64_t most);
/* Lets go of the absent blocks of a range, which are all the caller's: they become present, or stay
 * absent. Whether somebody waits. */
bool pu_presence_let_go(struct pu_presence *p, uint64_t first, uint64_t end, bool present);

/* Makes the next run of present blocks absent, and holds it, but for those that may be written; the
 * range is blocked, and drained. As pu_presence_claim. */
uint64_t pu_presence_evict(struct pu_presence *p, uint64_t *first, uint64_t end);

void pu_presence_set_writable(struct pu_presence *p, uint64_t first, uint64_t end, bool writable);
bool pu_presence_is_writable(const struct pu_presence *p, uint64_t first, uint64_t end);
void pu_presence_touch(struct pu_presence *p, uint64_t first, uint64_t end);
/* Whether one of them was touched; none is any more. */
bool pu_presence_take_touched(struct pu_presence *p, uint64_t first, uint64_t end);

/* Blocks of a range could not be had: who waits for one of them fails. Before they are let go of. */
void pu_presence_fail(struct pu_presence *p, uint64_t first, uint64_t end, int error);
/* The number that the next failure will have. */
uint64_t pu_presence_next_failure(const struct pu_presence *p);
/* The error of one from number `since` on that concerns a block of the range which is still absent;
 * 0: none. */
int pu_presence_failure(struct pu_presence *p, uint64_t since, uint64_t first, uint64_t end);

/* Whether the map's file says what is here. */
static inline bool pu_presence_is_synced(const struct pu_presence *p)
{
	return !__atomic_load_n(&p->unsynced, __ATOMIC_SEQ_CST);
}

void pu_presence_begin_sync(struct pu_presence *p);
void pu_presence_end_sync(struct pu_presence *p);
/* The next dirty page, from *page on, which is not dirty any more. False: none. */
bool pu_presence_take_dirty(struct pu_presence *p, uint64_t *page);
void pu_presence_mark_dirty(struct pu_presence *p, uint64_t page);

/* What all queues counted since the map was made. */
void pu_presence_read_counters(const struct pu_presence *p, struct pu_presence_counters *sum);

#endif
