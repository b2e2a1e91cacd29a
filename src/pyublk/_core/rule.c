/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "rule.h"

#include <stdlib.h>
#include <string.h>

struct pu_rule *pu_rule_new(const struct pu_rule_spec *spec)
{
	struct pu_rule *rule = calloc(1, sizeof(*rule));
	int64_t *delays = NULL;

	if (rule && spec->nr_delays)
		delays = calloc(spec->nr_delays, sizeof(*delays));
	if (rule && spec->action == PU_ACT_STALE)
		rule->past = pu_past_new();
	if (!rule || (spec->nr_delays && !delays) || (spec->action == PU_ACT_STALE && !rule->past)) {
		free(delays);
		free(rule);
		return NULL;
	}
	if (delays)
		memcpy(delays, spec->delays_ns, spec->nr_delays * sizeof(*delays));
	rule->spec = *spec;
	rule->spec.delays_ns = delays;
	rule->random = spec->seed;
	rule->last_end = UINT64_MAX;
	rule->refs = 1;
	pthread_mutex_init(&rule->lock, NULL);
	return rule;
}

struct pu_rule *pu_rule_get(struct pu_rule *rule)
{
	__atomic_fetch_add(&rule->refs, 1, __ATOMIC_RELAXED);
	return rule;
}

void pu_rule_put(struct pu_rule *rule)
{
	if (!rule || __atomic_sub_fetch(&rule->refs, 1, __ATOMIC_ACQ_REL))
		return;
	pthread_mutex_destroy(&rule->lock);
	pu_past_free(rule->past);
	free((void *)rule->spec.delays_ns);
	free(rule);
}

/* splitmix64 */
static uint64_t next_random(struct pu_rule *rule)
{
	uint64_t z = rule->random += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

uint64_t pu_rule_random(struct pu_rule *rule)
{
	uint64_t random;

	pthread_mutex_lock(&rule->lock);
	random = next_random(rule);
	pthread_mutex_unlock(&rule->lock);
	return random;
}

void pu_rule_counts(struct pu_rule *rule, uint64_t *matched, uint64_t *fired)
{
	pthread_mutex_lock(&rule->lock);
	*matched = rule->matched;
	*fired = rule->fired;
	pthread_mutex_unlock(&rule->lock);
}

bool pu_rule_covers(const struct pu_rule *rule, uint64_t offset, uint64_t length)
{
	const struct pu_rule_spec *spec = &rule->spec;

	return !spec->end || (length && offset < spec->end && offset + length > spec->begin);
}

/* A bucket that leaks at a constant rate, told by the time at which it would be empty: what came
 * before may have filled it by burst_ns. */
static bool is_over(double *empty_at, double cost_ns, int64_t burst_ns, int64_t now_ns,
		    int64_t *due_ns)
{
	double now = (double)now_ns, due = *empty_at - (double)burst_ns;

	if (cost_ns <= 0)
		return false;
	*empty_at = (*empty_at > now ? *empty_at : now) + cost_ns;
	if (due <= now)
		return false;
	if ((int64_t)due > *due_ns)
		*due_ns = (int64_t)due;
	return true;
}

static bool limits(struct pu_rule *rule, uint64_t length, int64_t now_ns, int64_t *due_ns)
{
	const struct pu_rule_spec *spec = &rule->spec;
	bool requests = is_over(&rule->requests_at, spec->request_ns, spec->burst_ns, now_ns, due_ns);
	bool bytes = is_over(&rule->bytes_at, spec->byte_ns * (double)length, spec->burst_ns, now_ns,
			     due_ns);

	return requests || bytes;
}

/* Of a request that is of the rule's kind: whether this is one that the counts choose. */
static bool is_chosen(struct pu_rule *rule)
{
	const struct pu_rule_spec *spec = &rule->spec;
	uint64_t count = ++rule->matched;

	if (spec->nth && (spec->every ? count % spec->nth : count != spec->nth))
		return false;
	if (spec->chance < PU_ALWAYS_FIRES && next_random(rule) >> 32 >= spec->chance)
		return false;
	return !spec->times || rule->fired < spec->times;
}

static void delay(struct pu_rule *rule, int64_t now_ns, int64_t *due_ns)
{
	const struct pu_rule_spec *spec = &rule->spec;
	int64_t from_ns = *due_ns > now_ns ? *due_ns : now_ns;
	uint32_t which = spec->nr_delays > 1 ? (uint32_t)(next_random(rule) % spec->nr_delays) : 0;

	*due_ns = from_ns + spec->delays_ns[which];
}

bool pu_rule_fires(struct pu_rule *rule, uint32_t op, uint64_t offset, uint64_t length,
		   int64_t now_ns, int64_t *due_ns)
{
	const struct pu_rule_spec *spec = &rule->spec;
	bool fires, follows;

	if (!(spec->ops >> op & 1))
		return false;
	if (spec->when && !spec->when(spec->context, op, offset, length))
		return false;
	pthread_mutex_lock(&rule->lock);
	follows = offset == rule->last_end;
	rule->last_end = offset + length;
	fires = !(spec->jumps && follows) && is_chosen(rule);
	if (fires && spec->action == PU_ACT_LIMIT)
		fires = limits(rule, length, now_ns, due_ns);
	if (fires && spec->action == PU_ACT_DELAY)
		delay(rule, now_ns, due_ns);
	rule->fired += fires;
	pthread_mutex_unlock(&rule->lock);
	return fires;
}
