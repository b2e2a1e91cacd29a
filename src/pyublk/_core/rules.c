/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "rules.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tapping.h"

void pu_rules_init(struct pu_rules *rules)
{
	memset(rules, 0, sizeof(*rules));
	pthread_mutex_init(&rules->lock, NULL);
}

void pu_rules_put_set(struct pu_rule_set *set)
{
	if (!set || __atomic_sub_fetch(&set->refs, 1, __ATOMIC_ACQ_REL))
		return;
	for (uint32_t i = 0; i < set->count; i++)
		pu_rule_put(set->rules[i]);
	free(set);
}

struct pu_rule_set *pu_rules_get_set(struct pu_rules *rules, uint64_t *change)
{
	struct pu_rule_set *set;

	pthread_mutex_lock(&rules->lock);
	set = rules->set;
	*change = rules->changes;
	if (set)
		__atomic_fetch_add(&set->refs, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&rules->lock);
	return set;
}

void pu_rules_destroy(struct pu_rules *rules)
{
	pu_rules_put_set(rules->set);
	pthread_mutex_destroy(&rules->lock);
}

void pu_rules_arm(struct pu_queue *q, struct pu_gate *gate)
{
	__atomic_store_n(&q->taps.gate, gate, __ATOMIC_RELEASE);
	pu_taps_arm(q);
}

/* Each queue looks again, at its next request or now. The rules are locked. */
static void tell_queues(struct pu_rules *rules)
{
	__atomic_fetch_add(&rules->changes, 1, __ATOMIC_RELEASE);
	for (struct pu_gate *gate = rules->gates; gate; gate = gate->next) {
		struct pu_queue *q = gate->q;

		pthread_mutex_lock(&q->inbox_lock);
		pu_rules_arm(q, gate);
		pu_wake_call(&q->wake);
		pthread_mutex_unlock(&q->inbox_lock);
	}
}

int pu_rules_exchange(struct pu_rules *rules, struct pu_rule *const *now, uint32_t count)
{
	struct pu_rule_set *before, *set = NULL;

	if (count) {
		set = calloc(1, sizeof(*set) + count * sizeof(set->rules[0]));
		if (!set)
			return -ENOMEM;
		set->refs = 1;
		set->count = count;
	}
	for (uint32_t i = 0; i < count; i++) {
		enum pu_action action = now[i]->spec.action;

		set->rules[i] = pu_rule_get(now[i]);
		if (action == PU_ACT_TEAR || action == PU_ACT_MISDIRECT)
			set->changes_requests = true;
	}
	pthread_mutex_lock(&rules->lock);
	before = rules->set;
	rules->set = set;
	tell_queues(rules);
	pthread_mutex_unlock(&rules->lock);
	pu_rules_put_set(before);
	return 0;
}

void pu_rules_release(struct pu_rules *rules, struct pu_rule *rule)
{
	uint64_t change;

	pthread_mutex_lock(&rules->lock);
	change = rules->changes + 1;
	if (rule)
		__atomic_store_n(&rule->released, change, __ATOMIC_RELAXED);
	for (uint32_t i = 0; !rule && rules->set && i < rules->set->count; i++)
		__atomic_store_n(&rules->set->rules[i]->released, change, __ATOMIC_RELAXED);
	tell_queues(rules);
	pthread_mutex_unlock(&rules->lock);
}

void pu_rules_open(struct pu_rules *rules, bool open)
{
	pthread_mutex_lock(&rules->lock);
	__atomic_store_n(&rules->open, open, __ATOMIC_RELAXED);
	tell_queues(rules);
	pthread_mutex_unlock(&rules->lock);
}

void pu_rules_set_size(struct pu_rules *rules, uint64_t size, uint64_t zone_size)
{
	__atomic_store_n(&rules->zone_size, zone_size, __ATOMIC_RELAXED);
	__atomic_store_n(&rules->size, size, __ATOMIC_RELAXED);
}
