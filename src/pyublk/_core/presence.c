/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "presence.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define BITS 64u
#define BITS_PER_PAGE (8u * PU_PRESENCE_PAGE)

/* ---- bitmaps ---- */

static uint64_t words_for(uint64_t bits)
{
	return (bits + BITS_PER_PAGE - 1) / BITS_PER_PAGE * (PU_PRESENCE_PAGE / 8);
}

static uint64_t blocks_of(uint64_t size, uint32_t block_bytes)
{
	return (size + block_bytes - 1) / block_bytes;
}

uint64_t pu_presence_words(uint64_t size, uint32_t block_bytes)
{
	return words_for(blocks_of(size, block_bytes));
}

/* Sparse: what nobody touches takes no memory. */
static uint64_t *map_bits(uint64_t bits)
{
	void *map = mmap(NULL, words_for(bits) * 8, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return map == MAP_FAILED ? NULL : map;
}

static void unmap_bits(uint64_t **map, uint64_t bits)
{
	if (*map)
		munmap(*map, words_for(bits) * 8);
	*map = NULL;
}

/* The bits of a range that are in the word of `at`; *next is the first bit of the next word. */
static uint64_t mask_at(uint64_t at, uint64_t end, uint64_t *next)
{
	uint64_t mask = UINT64_MAX << at % BITS;

	*next = (at / BITS + 1) * BITS;
	if (*next > end)
		mask &= UINT64_MAX >> (*next - end);
	return mask;
}

static uint64_t word(const uint64_t *map, uint64_t at)
{
	return __atomic_load_n(&map[at / BITS], __ATOMIC_SEQ_CST);
}

static uint64_t set_bits(uint64_t *map, uint64_t at, uint64_t mask)
{
	return __atomic_fetch_or(&map[at / BITS], mask, __ATOMIC_SEQ_CST);
}

static uint64_t clear_bits(uint64_t *map, uint64_t at, uint64_t mask)
{
	return __atomic_fetch_and(&map[at / BITS], ~mask, __ATOMIC_SEQ_CST);
}

static bool has_all(const uint64_t *map, uint64_t first, uint64_t end)
{
	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);

		if (mask & ~word(map, at))
			return false;
	}
	return true;
}

/* ---- making it ---- */

int pu_presence_init(struct pu_presence *p, struct pu_layout *layout,
		     const struct pu_presence_options *options)
{
	int error = 0;

	memset(p, 0, sizeof(*p));
	p->layout = layout;
	p->shift = (uint32_t)__builtin_ctz(options->block_bytes);
	p->nr_blocks = blocks_of(layout->size, options->block_bytes);
	p->present = options->present;
	p->evicts = options->evicts;
	p->writes_through = options->writes_through;
	p->always_deferred = options->always_deferred;
	pthread_mutex_init(&p->lock, NULL);
	p->busy = map_bits(p->nr_blocks);
	p->dirty = map_bits(p->nr_blocks / BITS_PER_PAGE + 1);
	if (options->gated)
		p->writable = map_bits(p->nr_blocks);
	if (p->evicts) {
		p->touched = map_bits(p->nr_blocks);
		error = pu_regions_init(&p->regions, layout->size);
	}
	if (!p->busy || !p->dirty || (options->gated && !p->writable) || (p->evicts && !p->touched))
		error = -ENOMEM;
	if (error)
		pu_presence_destroy(p);
	return error;
}

void pu_presence_destroy(struct pu_presence *p)
{
	if (!p->layout)
		return;
	unmap_bits(&p->busy, p->nr_blocks);
	unmap_bits(&p->dirty, p->nr_blocks / BITS_PER_PAGE + 1);
	unmap_bits(&p->writable, p->nr_blocks);
	unmap_bits(&p->touched, p->nr_blocks);
	pu_regions_destroy(&p->regions);
	pthread_mutex_destroy(&p->lock);
	p->layout = NULL;
}

/* ---- looking ---- */

uint64_t pu_presence_run_slowly(const struct pu_presence *p, uint64_t first, uint64_t end,
				bool *present)
{
	uint64_t invert, at = first, next;

	*present = pu_presence_has(p, first);
	invert = *present ? UINT64_MAX : 0;
	for (; at < end; at = next) {
		uint64_t others = (word(p->present, at) ^ invert) & mask_at(at, end, &next);

		if (others)
			return at / BITS * BITS + (uint64_t)__builtin_ctzll(others) - first;
	}
	return end - first;
}

uint64_t pu_presence_count(const struct pu_presence *p, uint64_t first, uint64_t end)
{
	uint64_t count = 0;

	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);

		count += (uint64_t)__builtin_popcountll(word(p->present, at) & mask);
	}
	return count;
}

/* ---- where bytes are ---- */

static uint64_t bytes_alike(const struct pu_presence *p, uint64_t offset, uint64_t length,
			    bool *present)
{
	uint64_t first = offset >> p->shift, end = ((offset + length - 1) >> p->shift) + 1, run;

	run = ((first + pu_presence_run(p, first, end, present)) << p->shift) - offset;
	return run < length ? run : length;
}

static struct pu_part part_of(uint32_t file, uint64_t offset, uint64_t length)
{
	return (struct pu_part){ .file = file, .offset = offset, .length = length, .first = length };
}

/* Of the files below all maps; one chunk of a stripe at a time. */
static void bottom_part(const struct pu_layout *bottom, uint32_t first_file, uint64_t offset,
			uint64_t length, struct pu_part *part)
{
	uint64_t cut = 0;

	if (bottom->kind == PU_LAYOUT_STRIPE && length > bottom->chunk - offset % bottom->chunk)
		length = bottom->chunk - offset % bottom->chunk;
	pu_layout_part(bottom, offset, length, &cut, part);
	part->file += first_file;
}

/* What is absent of the uppermost map: in the file of one below it, or below all. */
static bool part_below(const struct pu_presence *p, uint64_t offset, uint64_t length,
		       struct pu_part *part)
{
	const struct pu_layout *bottom = p->bottom; /* that of all maps below it, too */
	uint32_t file = 1;
	bool present;

	while ((p = p->next)) {
		length = bytes_alike(p, offset, length, &present);
		if (present) {
			*part = part_of(file, offset, length);
			return true;
		}
		file++;
	}
	if (!bottom)
		return false;
	bottom_part(bottom, file, offset, length, part);
	return true;
}

bool pu_presence_part(const struct pu_presence *p, uint64_t offset, uint64_t length,
		      struct pu_part *part)
{
	bool present;

	length = bytes_alike(p, offset, length, &present);
	if (!present)
		return part_below(p, offset, length, part);
	*part = part_of(0, offset, length);
	return true;
}

/* ---- dirty pages ---- */

void pu_presence_begin_sync(struct pu_presence *p)
{
	__atomic_fetch_add(&p->unsynced, 1, __ATOMIC_SEQ_CST);
}

void pu_presence_end_sync(struct pu_presence *p)
{
	__atomic_fetch_sub(&p->unsynced, 1, __ATOMIC_SEQ_CST);
}

/* Counted first: the count is never too low. */
void pu_presence_mark_dirty(struct pu_presence *p, uint64_t page)
{
	uint64_t bit = UINT64_C(1) << page % BITS;

	__atomic_fetch_add(&p->unsynced, 1, __ATOMIC_SEQ_CST);
	if (set_bits(p->dirty, page, bit) & bit)
		__atomic_fetch_sub(&p->unsynced, 1, __ATOMIC_SEQ_CST);
}

bool pu_presence_take_dirty(struct pu_presence *p, uint64_t *page)
{
	uint64_t end = (p->nr_blocks + BITS_PER_PAGE - 1) / BITS_PER_PAGE, next;

	for (uint64_t at = *page; at < end; at = next) {
		uint64_t dirty = word(p->dirty, at) & mask_at(at, end, &next);

		if (!dirty)
			continue;
		*page = at / BITS * BITS + (uint64_t)__builtin_ctzll(dirty);
		clear_bits(p->dirty, *page, UINT64_C(1) << *page % BITS);
		__atomic_fetch_sub(&p->unsynced, 1, __ATOMIC_SEQ_CST);
		return true;
	}
	return false;
}

/* ---- holding blocks ---- */

bool pu_presence_let_go(struct pu_presence *p, uint64_t first, uint64_t end, bool present)
{
	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t ours = mask_at(at, end, &next) & ~word(p->present, at);

		if (!ours)
			continue;
		if (present) {
			set_bits(p->present, at, ours);
			pu_presence_mark_dirty(p, at / BITS_PER_PAGE);
		}
		clear_bits(p->busy, at, ours);
	}
	return __atomic_load_n(&p->waiters, __ATOMIC_SEQ_CST);
}

/* Of the word of `at`: holds those of `wanted` that are absent, and that nobody holds. Who made one
 * present let go of it after that. */
static uint64_t hold_in_word(struct pu_presence *p, uint64_t at, uint64_t wanted)
{
	uint64_t absent = wanted & ~word(p->present, at), held, came;

	if (!absent)
		return 0;
	held = absent & ~set_bits(p->busy, at, absent);
	came = held & word(p->present, at);
	if (came)
		clear_bits(p->busy, at, came);
	return held & ~came;
}

bool pu_presence_hold(struct pu_presence *p, uint64_t first, uint64_t end)
{
	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t wanted = mask_at(at, end, &next);
		uint64_t held = hold_in_word(p, at, wanted);

		if (!(wanted & ~held & ~word(p->present, at)))
			continue;
		clear_bits(p->busy, at, held);
		pu_presence_let_go(p, first, at, false);
		return false;
	}
	return true;
}

/* The lowest run of bits. */
static uint64_t lowest_run(uint64_t bits)
{
	uint64_t above = bits + (bits & -bits);

	return bits & ~above;
}

uint64_t pu_presence_claim(struct pu_presence *p, uint64_t *first, uint64_t end, uint64_t most)
{
	uint64_t count = 0;

	for (uint64_t at = *first, next; at < end && count < most; at = next) {
		uint64_t wanted = mask_at(at, end, &next), run, held;
		uint64_t free = wanted & ~word(p->present, at) & ~word(p->busy, at);

		if (count && !(free & UINT64_C(1) << at % BITS))
			break;
		if (!free)
			continue;
		run = lowest_run(free);
		while ((uint64_t)__builtin_popcountll(run) > most - count)
			run &= run >> 1; /* its upper end goes */
		held = hold_in_word(p, at, run);
		if (held != run) { /* somebody was faster: less will do, or another try */
			clear_bits(p->busy, at, held & ~lowest_run(held));
			held = lowest_run(held);
		}
		if (count && held && !(held & UINT64_C(1) << at % BITS)) {
			clear_bits(p->busy, at, held);
			break;
		}
		if (!held) {
			if (count)
				break;
			next = at; /* as it is now */
			continue;
		}
		if (!count)
			*first = at / BITS * BITS + (uint64_t)__builtin_ctzll(held);
		count += (uint64_t)__builtin_popcountll(held);
		if (*first + count != next)
			break;
	}
	return count;
}

uint64_t pu_presence_evict(struct pu_presence *p, uint64_t *first, uint64_t end)
{
	for (uint64_t at = *first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);
		uint64_t kept = word(p->busy, at) | (p->writable ? word(p->writable, at) : 0);
		uint64_t run = lowest_run(word(p->present, at) & ~kept & mask), held;

		if (!run)
			continue;
		/* Who has just filled one has not let go of it yet: it stays. */
		held = run & ~set_bits(p->busy, at, run);
		clear_bits(p->busy, at, held & ~lowest_run(held));
		held = lowest_run(held);
		clear_bits(p->present, at, held);
		if (!held) {
			next = at;
			continue;
		}
		*first = at / BITS * BITS + (uint64_t)__builtin_ctzll(held);
		return (uint64_t)__builtin_popcountll(held);
	}
	return 0;
}

/* ---- what else is known of blocks ---- */

void pu_presence_set_writable(struct pu_presence *p, uint64_t first, uint64_t end, bool writable)
{
	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);

		if (writable)
			set_bits(p->writable, at, mask);
		else
			clear_bits(p->writable, at, mask);
	}
}

bool pu_presence_is_writable(const struct pu_presence *p, uint64_t first, uint64_t end)
{
	return !p->writable || has_all(p->writable, first, end);
}

void pu_presence_touch(struct pu_presence *p, uint64_t first, uint64_t end)
{
	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);

		/* Mostly it is set already: the line stays shared. */
		if (mask & ~__atomic_load_n(&p->touched[at / BITS], __ATOMIC_RELAXED))
			__atomic_fetch_or(&p->touched[at / BITS], mask, __ATOMIC_RELAXED);
	}
}

bool pu_presence_take_touched(struct pu_presence *p, uint64_t first, uint64_t end)
{
	bool touched = false;

	for (uint64_t at = first, next; at < end; at = next) {
		uint64_t mask = mask_at(at, end, &next);

		touched |= (clear_bits(p->touched, at, mask) & mask) != 0;
	}
	return touched;
}

/* ---- fetches that failed ---- */

void pu_presence_fail(struct pu_presence *p, uint64_t first, uint64_t end, int error)
{
	struct pu_fetch_failure *failure;

	pthread_mutex_lock(&p->lock);
	failure = &p->failed[p->failures % PU_KEPT_FAILURES];
	*failure = (struct pu_fetch_failure){ p->failures + 1, first, end, error };
	__atomic_store_n(&p->failures, p->failures + 1, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&p->lock);
}

uint64_t pu_presence_next_failure(const struct pu_presence *p)
{
	return __atomic_load_n(&p->failures, __ATOMIC_ACQUIRE) + 1;
}

int pu_presence_failure(struct pu_presence *p, uint64_t since, uint64_t first, uint64_t end)
{
	int error = 0;

	if (pu_presence_next_failure(p) == since)
		return 0;
	pthread_mutex_lock(&p->lock);
	for (uint32_t i = 0; i < PU_KEPT_FAILURES && !error; i++) {
		const struct pu_fetch_failure *failure = &p->failed[i];
		uint64_t from = failure->first > first ? failure->first : first;
		uint64_t to = failure->end < end ? failure->end : end;

		if (failure->number >= since && from < to && !pu_presence_has_all(p, from, to))
			error = failure->error;
	}
	pthread_mutex_unlock(&p->lock);
	return error;
}

void pu_presence_read_counters(const struct pu_presence *p, struct pu_presence_counters *sum)
{
	*sum = (struct pu_presence_counters){ 0 };
	for (uint32_t i = 0; i < PU_COUNTER_SHARDS; i++) {
		const struct pu_presence_counters *shard = &p->counters[i];

		sum->hits += __atomic_load_n(&shard->hits, __ATOMIC_RELAXED);
		sum->misses += __atomic_load_n(&shard->misses, __ATOMIC_RELAXED);
		sum->copy_ups += __atomic_load_n(&shard->copy_ups, __ATOMIC_RELAXED);
	}
}
