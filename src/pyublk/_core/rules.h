/* SPDX-License-Identifier: MIT
 * The rules of a disk: one set for all of its queues, never changed but exchanged for another one
 */
#ifndef PU_RULES_H
#define PU_RULES_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "rule.h"

struct pu_gate;
struct pu_queue;

struct pu_rule_set {
	uint32_t refs; /* atomic */
	uint32_t count;
	bool changes_requests;
	struct pu_rule *rules[];
};

/* Those of a disk. */
struct pu_rules {
	pthread_mutex_t lock; /* guards set and gates; before a queue's inbox_lock */
	struct pu_rule_set *set; /* NULL: there are no rules */
	struct pu_gate *gates; /* of its queues */
	uint64_t changes; /* atomic */
	uint64_t size;	/* atomic: bytes of the disk; 0: not known yet */
	uint64_t zone_size; /* atomic: of each zone; 0: there are none */
	bool open;	/* atomic: no rule applies for now, and nothing is kept */
};

void pu_rules_init(struct pu_rules *rules);
void pu_rules_destroy(struct pu_rules *rules); /* with no queue */
/* Has these rules from now on, in their order. 0 or -ENOMEM. [any thread] */
int pu_rules_exchange(struct pu_rules *rules, struct pu_rule *const *now, uint32_t count);
/* Lets go of what a rule keeps, or (NULL) all of them. [any thread] */
void pu_rules_release(struct pu_rules *rules, struct pu_rule *rule);
/* Bytes of the disk, and of each of its zones (0: it has none). [any thread] */
void pu_rules_set_size(struct pu_rules *rules, uint64_t size, uint64_t zone_size);
/* Whether the gate stands open: every rule is suspended, and what is kept goes on. [any thread] */
void pu_rules_open(struct pu_rules *rules, bool open);

/* What there is now, to be given back, and after which change; NULL: there are no rules. [any thread] */
struct pu_rule_set *pu_rules_get_set(struct pu_rules *rules, uint64_t *change);
void pu_rules_put_set(struct pu_rule_set *set);
/* Has a queue's requests meet its gate, or (NULL) not any more. With its inbox_lock. */
void pu_rules_arm(struct pu_queue *q, struct pu_gate *gate);

#endif
