/* SPDX-License-Identifier: MIT
 * The life of a tag, which brings one request after the other
 *
 *     IDLE --fetch--> FETCHING --request--> OWNED --answer--> ANSWERED
 *                                             ^                   |
 *                                             +-----request-------+ (a commit is the next fetch)
 *     FETCHING, ANSWERED --abort (-ENODEV)--> GONE
 *
 * Each request is another generation of its tag. State and generation are one word, so that an answer
 * that comes late cannot be given to the tag's next request. The word also counts pins: whoever copies
 * a request's data pins it, and no answer is given meanwhile.
 */
#ifndef PU_TAG_H
#define PU_TAG_H

#include <stdbool.h>
#include <stdint.h>

enum pu_tag_state {
	PU_TAG_IDLE,
	PU_TAG_FETCHING,
	PU_TAG_OWNED,
	PU_TAG_ANSWERED,
	PU_TAG_GONE,
};

struct pu_tag {
	uint64_t life; /* generation << 32 | pins << 8 | state */
	bool fetched; /* user copy: a write's data is in the buffer already */
	bool carried_over; /* within pu_queue_carry_over: seen */
	uint8_t operation; /* what its latency counts as: PU_READS, ... */
	uint8_t *buffer; /* of its request, whatever the next one is offered */
	uint64_t zone_lba; /* zone append: where it was written, in 512-byte sectors */
	int64_t arrived; /* ns */
};

#define PU_PIN UINT64_C(0x100)
#define PU_PINS UINT64_C(0xffffff00)

static inline uint64_t pu_life(enum pu_tag_state state, uint32_t generation)
{
	return (uint64_t)generation << 32 | (uint32_t)state;
}

static inline enum pu_tag_state pu_tag_state(const struct pu_tag *tag)
{
	return (enum pu_tag_state)(uint8_t)__atomic_load_n(&tag->life, __ATOMIC_ACQUIRE);
}

static inline uint32_t pu_tag_generation(const struct pu_tag *tag)
{
	return (uint32_t)(__atomic_load_n(&tag->life, __ATOMIC_RELAXED) >> 32);
}

/* Whether the request of that generation is there, and not answered. */
static inline bool pu_tag_holds(const struct pu_tag *tag, uint32_t generation)
{
	uint64_t life = __atomic_load_n(&tag->life, __ATOMIC_ACQUIRE);

	return (life & ~PU_PINS) == pu_life(PU_TAG_OWNED, generation);
}

/* By the owner, of a tag that has no request. */
static inline void pu_tag_set_state(struct pu_tag *tag, enum pu_tag_state state)
{
	__atomic_store_n(&tag->life, pu_life(state, pu_tag_generation(tag)), __ATOMIC_RELEASE);
}

/* The tag's next request is there. */
static inline void pu_tag_own(struct pu_tag *tag)
{
	__atomic_store_n(&tag->life, pu_life(PU_TAG_OWNED, pu_tag_generation(tag) + 1),
			 __ATOMIC_RELEASE);
}

/* Nobody's any more. Whether somebody was copying its data. */
static inline bool pu_tag_take_away(struct pu_tag *tag)
{
	uint64_t gone = pu_life(PU_TAG_GONE, pu_tag_generation(tag) + 1);

	return __atomic_exchange_n(&tag->life, gone, __ATOMIC_ACQ_REL) & PU_PINS;
}

/* Who claims a request answers it, and nobody else does. False: it is answered, or pinned. */
static inline bool pu_tag_try_to_claim(struct pu_tag *tag, uint32_t generation)
{
	uint64_t owned = pu_life(PU_TAG_OWNED, generation);

	return __atomic_compare_exchange_n(&tag->life, &owned, pu_life(PU_TAG_ANSWERED, generation),
					   false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Claims a request that may be pinned: looks at it again until it is not, `retries` times at most. */
bool pu_tag_claim_unpinned(struct pu_tag *tag, uint32_t generation, uint32_t retries);

/* Waits for pins. False: it is answered. */
static inline bool pu_tag_claim(struct pu_tag *tag, uint32_t generation)
{
	return pu_tag_try_to_claim(tag, generation) ||
	       pu_tag_claim_unpinned(tag, generation, UINT32_MAX);
}

/* The request of that generation is not answered, and its tag brings no other, until it is unpinned.
 * False: it is answered already. */
bool pu_tag_pin(struct pu_tag *tag, uint32_t generation);
void pu_tag_unpin(struct pu_tag *tag, uint32_t generation);

#endif
