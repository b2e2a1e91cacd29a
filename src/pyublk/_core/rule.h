/* SPDX-License-Identifier: MIT
 * Rules for a disk's requests: which ones each is for, what it does to them, and how often it has
 *
 * A rule is counted by whichever thread has a request, so each has a lock. Nothing here knows of
 * queues: what is done to a request is gate.h's.
 */
#ifndef PU_RULE_H
#define PU_RULE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "past.h"

enum pu_action {
	PU_ACT_DELAY, /* these three hold a request, and the rules after them are asked too */
	PU_ACT_HANG,
	PU_ACT_LIMIT,
	PU_ACT_FAIL, /* of these the first decides */
	PU_ACT_DROP,
	PU_ACT_TEAR,
	PU_ACT_MISDIRECT,
	PU_ACT_ROT,
	PU_ACT_STALE,
};

#define PU_ALWAYS_FIRES (UINT64_C(1) << 32)

typedef bool (*pu_when)(void *context, uint32_t op, uint64_t offset, uint64_t length);

struct pu_rule_spec {
	enum pu_action action;
	uint32_t ops;	 /* a bit for each operation */
	uint64_t begin, end; /* bytes: for requests that touch any of them; end 0: for all */
	bool jumps;	 /* only those that do not begin where the last one of `ops` ended */
	pu_when when;	 /* and for which this is true; NULL: for all */
	void *context;
	uint64_t nth; /* of these only the nth; 0: each */
	bool every;   /* each nth */
	uint64_t times;	 /* so often at most; 0: no limit */
	uint64_t chance; /* of PU_ALWAYS_FIRES */
	uint64_t seed;
	int32_t error;		 /* FAIL: the errno */
	const int64_t *delays_ns; /* DELAY: one of these, at random; copied */
	uint32_t nr_delays;
	uint32_t amount; /* TEAR: sectors that are written; ROT: bits that are flipped */
	uint64_t place;	 /* MISDIRECT: the byte where the request goes */
	double request_ns, byte_ns; /* LIMIT: what each costs; 0: nothing */
	int64_t burst_ns;	    /* LIMIT: so much may be saved up */
};

struct pu_rule {
	struct pu_rule_spec spec;
	pthread_mutex_t lock; /* guards what follows, but for refs and released */
	uint64_t matched, fired;
	uint64_t random;
	uint64_t last_end;
	double requests_at, bytes_at; /* LIMIT: when the next one would be due without a burst */
	uint32_t refs;	   /* atomic */
	uint64_t released; /* atomic: the change of the rules that let go of what it had held until then */
	struct pu_past *past; /* STALE */
};

/* With one reference, or NULL: no memory. */
struct pu_rule *pu_rule_new(const struct pu_rule_spec *spec);
struct pu_rule *pu_rule_get(struct pu_rule *rule);
void pu_rule_put(struct pu_rule *rule);

/* Whether it is for any of these bytes. A rule of a range is for no request without any: a flush. */
bool pu_rule_covers(const struct pu_rule *rule, uint64_t offset, uint64_t length);
/* Whether it fires for a request that it covers, and which it then counts. LIMIT: *due_ns is raised
 * to when the request may go on, and it fires if that is later than now. DELAY: to when it is over. */
bool pu_rule_fires(struct pu_rule *rule, uint32_t op, uint64_t offset, uint64_t length,
		   int64_t now_ns, int64_t *due_ns);
uint64_t pu_rule_random(struct pu_rule *rule);
void pu_rule_counts(struct pu_rule *rule, uint64_t *matched, uint64_t *fired);

#endif
